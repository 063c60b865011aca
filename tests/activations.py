"""What autograd keeps for a backward, counted in the real modules, with memory or on fake tensors without."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from experiments.bench import LiveBytes, storages
from families import Network, NetworkConfig, family_of
from formats.lora import add_lora
from model import Flux, FluxConfig


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes of tensors that `run` makes and that are alive after it, for its backward; without its result."""
    with LiveBytes() as live:
        result = run()
    return live.now - tensor_bytes(result)


def tensor_bytes(tree: Any) -> int:
    return sum(storage.nbytes() for storage in set(storages(tree)))


def backward_bytes(run: Callable[[], Any], recomputed: Iterable[nn.Module] = ()) -> int:
    """As kept_bytes, with the inputs and the inside of the largest of the blocks that are recomputed one by one."""
    calls: list[tuple[nn.Module, Any]] = []
    hooks = []
    for block in recomputed:
        hook = block.register_forward_pre_hook(lambda block, inputs: calls.append((block, inputs)))
        hooks.append(hook)
    outside = kept_bytes(run)
    for hook in hooks:
        hook.remove()
    inside = [0]
    for block, inputs in calls:
        inside.append(tensor_bytes(inputs) + kept_bytes(partial(block, *inputs)))
    return outside + max(inside)


def leap_bytes(flux: Flux, b: int, image_tokens: int, text_tokens: int) -> int:
    """Bytes that a leap of b samples keeps, as `flux.recompute` says."""
    config, dtype = flux.config, flux.img_in.weight.dtype
    img = torch.zeros(b, image_tokens, config.in_channels, dtype=dtype, requires_grad=True)
    blocks = [*flux.double_blocks, *flux.single_blocks] if flux.recompute != "none" else []
    return backward_bytes(lambda: flux(img, *conditions(config, b, image_tokens, text_tokens, dtype)), blocks)


def conditions(config: FluxConfig, b: int, image_tokens: int, text_tokens: int, dtype: torch.dtype) -> tuple:
    """The inputs of a Flux beside its image, all zero: ids, text, time, guidance."""
    txt = torch.zeros(b, text_tokens, config.context_in_dim, dtype=dtype)
    vec = torch.zeros(b, config.vec_in_dim, dtype=dtype)
    img_ids, txt_ids = (torch.zeros(n, 3, dtype=torch.long) for n in (image_tokens, text_tokens))
    time = torch.zeros(b)
    return img_ids, txt, txt_ids, time, vec, time if config.guidance_embed else None


def decode_bytes(vae: AutoencoderKL, b: int, rows: int, columns: int, recompute: bool) -> int:
    """Bytes that decoding b samples of `rows` x `columns` latents keeps."""
    z = torch.zeros(b, vae.config.latent_channels, rows, columns, dtype=vae.dtype, requires_grad=True)
    if not recompute:
        return backward_bytes(lambda: vae.decode(z))
    vae.enable_gradient_checkpointing()
    return backward_bytes(lambda: vae.decode(z), [vae.decoder.mid_block, *vae.decoder.up_blocks])


def built_flux(config: NetworkConfig, lora: int | None, dtype: torch.dtype) -> Network:
    """A Flux built in its dtype."""
    with built_in(dtype):
        flux = family_of(config).Network(config)
        if lora:
            add_lora(flux, lora, 2 * lora)
        return flux


@contextmanager
def built_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built within have this dtype: fake tensors cannot be cast in place."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def flux_vae() -> AutoencoderKL:
    """FLUX's autoencoder."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.requires_grad_(False)
