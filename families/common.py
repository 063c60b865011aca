"""What families of models share: patches, prompts as token ids, levels of noise, and how frozen networks are loaded."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infra.reading import check_finite, parse_file

PATCH = 2  # a token is a 2x2 patch of latents
Text = tuple[Tensor, ...]  # what a network reads of b prompts: a tensor of their tokens, (b, m, c), and perhaps others


def pack(z: Tensor) -> Tensor:
    """Latents to tokens: one token per 2x2 patch, channel-major within it."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens to latents: the inverse of `pack`."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


def shifted_levels(shift: float, steps: int) -> Tensor:
    """Noise levels from 1 to 0, (steps + 1,): evenly spaced, then moved up by a shift above 1."""
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    # FLUX's e^mu / (e^mu + 1/sigma - 1), with numerator and denominator multiplied by sigma.
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    zero = sigma.new_zeros(1)
    return torch.cat([sigma, zero]).float()


# --------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(folder: Path, vocab_size: int, model: str) -> PreTrainedTokenizerBase:
    """A tokenizer for a text encoder of `vocab_size` embeddings. Raises ValueError if its folder does not fit."""
    remedy = f"copy or download {model}'s own {folder.name}/"
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False, local_files_only=True)
    tokenizer = parse_file(folder, load, remedy)
    # FLUX.1's CLIP has 49408 tokens for as many embeddings, its T5 32100 for 32128. Ids beyond the embeddings would
    # fail in the first forward; a tokenizer of few tokens is the other encoder's. Where files are missing, transformers
    # invents a tokenizer of few tokens, or one that cannot pad.
    size, padding = len(tokenizer), tokenizer.pad_token
    if not 0.9 * vocab_size <= size <= vocab_size or padding is None:
        raise ValueError(f"{folder} holds {size} tokens, padding {padding}, for an encoder of {vocab_size}: {remedy}")
    return tokenizer


def padded_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids padded or truncated to (b, length), and their mask, (b, length): 1 for a token, 0 for padding."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


# ---------------------------------------------------------------------------------- frozen networks


def load_frozen(network: type, folder: Path, **options: Any) -> Any:
    """A network of diffusers or transformers, frozen. Raises ValueError naming the folder."""
    # Folders come from strangers: no code in them is run, and no pickle, which may hold code, is read.
    options |= dict(use_safetensors=True, local_files_only=True, output_loading_info=True)

    def parse(folder: Path) -> nn.Module:
        loaded, info = network.from_pretrained(folder, trust_remote_code=False, **options)
        # Both libraries invent tensors that are missing, with a warning at most.
        missing_keys = sorted(info["missing_keys"])
        if missing_keys:
            raise ValueError(
                f"{len(missing_keys)} tensors of {network.__name__} are missing, such as {missing_keys[0]}"
            )
        check_finite(loaded.named_parameters())
        return loaded

    return parse_file(folder, parse).eval().requires_grad_(False)


def lend_layers(layers: Iterable[nn.Module], device: str | torch.device) -> None:
    """Keep each layer of a text encoder on the device only while it computes: all layers together may not fit there."""

    # Hooks of torch: these run before and after the forward of a layer.
    def to_device(layer: nn.Module, inputs: Any) -> None:
        layer.to(device)

    def to_host(layer: nn.Module, inputs: Any, output: Any) -> None:
        layer.to("cpu")

    for layer in layers:
        layer.register_forward_pre_hook(to_device)
        layer.register_forward_hook(to_host)
