"""What a run needs, counted before anything is rented: memory per GPU, and what a step computes and sends.

    python -m tools.plan --gpus 1 8 16 64                      # FLUX.1-dev, all weights
    python -m tools.plan --gpus 1 --lora 64                    # a LoRA of it;  --lean  all weights, in bf16

Nothing is loaded.  Weights are counted from the shapes, activations by running the real modules on tensors without
memory and adding up what autograd keeps for the backward.  Tests hold the counts to what small models really keep and
send, to the byte.
Left out: the allocator's slack, cuDNN's and NCCL's buffers, a few GB in all, and what a reward keeps for its backward
(HPSv2's and PickScore's tower 0.6 GB a sample, 0.05 with recomputation; counted in the same way).

Legend: GB is 1e9 bytes; b samples at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import sides
from formats.lora import add_lora
from infra.meter import Flops, network_flops
from model import FLUX_DEV, Flux, FluxConfig

ENCODERS = 4_762_310_656 + 123_060_480  # parameters of T5-XXL's encoder and CLIP-L's text model, in bf16
LENT = 23 * 192_946_176  # of T5's 24 layers all but one
REWARD_BYTES = {"hpsv2": 986_109_441 * 4, "pickscore": 985_987_457 * 4, "hpsv3": 16.6e9}  # fp32, fp32, bf16; published


@dataclass(frozen=True)
class Plan:
    """Count memory and communication for a number of GPUs. Flags as in train.py."""

    gpus: tuple[int, ...] = (1, 8, 16, 64)
    """Numbers of GPUs to count for."""
    reward: tuple[Literal["hpsv2", "pickscore", "hpsv3"], ...] = ("hpsv2", "pickscore")
    """Published rewards that are loaded, trained on or watched: hpsv2, pickscore, hpsv3."""
    size: str = "720"
    """Pixels: one number for a square, or HEIGHTxWIDTH; of several the one with most."""
    text_length: int = 512
    """T5 tokens."""
    batch: int = 64
    """Rollouts per update, over all GPUs."""
    rollout_steps: int = 25
    """Euler steps of a rollout."""
    leaps: int = 2
    """Leaps."""
    rollout_batch: int = 4
    """Rollouts at a time on a GPU."""
    micro_batch: int = 1
    """Samples at a time in the backward."""
    recompute: bool = True
    """Recompute activations in the backward."""
    keep_gathered: bool = False
    """Keep the weights whole through a rollout."""
    shard: int | None = None
    """GPUs that share a copy of the weights; None: all."""
    shard_frozen: bool = False
    """Cut T5 and the rewards too."""
    offload_encoders: bool = False
    """Keep T5's layers on the CPU but while they compute."""
    lean: bool = False
    """Weights in bf16, 8-bit optimizer states, averages in the host's memory."""
    lora: int | None = None
    """Rank of a LoRA; None: all weights are trained."""
    fp8: bool = False
    """Keep what the LoRA changes in fp8."""
    anchor: float = 0.0
    """Weight of an anchor to the base, which is a copy of all weights unless a LoRA is trained."""


# ------------------------------------------------------------------------------------------ counting


def kept_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `run`, parameters apart: each piece of memory once."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage()._cdata, t)  # held, so that its address stays its own
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = run()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) + 0 * result.numel()


def planned_flux(config: FluxConfig, lora: int | None, dtype: torch.dtype) -> Flux:
    """The transformer in the precision it is gathered in. Built in it, as fake tensors cannot be cast in place."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        flux = Flux(config)
        if lora:
            add_lora(flux, lora, 2 * lora)
        return flux
    finally:
        torch.set_default_dtype(usual)


def flux_inputs(config: FluxConfig, b: int, image_tokens: int, text_tokens: int, dtype: torch.dtype) -> tuple:
    """Inputs of a Flux, all zero."""
    img = torch.zeros(b, image_tokens, config.in_channels, dtype=dtype)
    txt = torch.zeros(b, text_tokens, config.context_in_dim, dtype=dtype)
    vec = torch.zeros(b, config.vec_in_dim, dtype=dtype)
    img_ids, txt_ids = (torch.zeros(n, 3, dtype=torch.long) for n in (image_tokens, text_tokens))
    t = torch.zeros(b)
    return img, img_ids, txt, txt_ids, t, vec, t if config.guidance_embed else None


def leap_bytes(flux: Flux, b: int, image_tokens: int, text_tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """What a leap keeps: all activations, or the inputs of blocks and, in turn, the inside of the largest one."""
    inputs = flux_inputs(flux.config, b, image_tokens, text_tokens, dtype)
    inputs[0].requires_grad_()  # as a leap's
    flux.recompute = recompute
    kept = kept_bytes(lambda: flux(*inputs), flux.parameters())
    flux.recompute = False
    if recompute:
        shapes = [replace(flux.config, depth=d, depth_single_blocks=s) for d, s in ((0, 0), (1, 0), (0, 1))]
        small = [planned_flux(shape, None, dtype) for shape in shapes]
        outside, *inside = (kept_bytes(lambda f=f: f(*inputs), f.parameters()) for f in small)
        kept += max(inside) - outside
    return kept


def decode_bytes(vae: AutoencoderKL, b: int, rows: int, columns: int, recompute: bool) -> int:
    """What decoding `rows` x `columns` latents keeps; with recomputation, in turn, the inside of the largest block."""
    z = torch.zeros(b, vae.config.latent_channels, rows, columns, requires_grad=True)
    if not recompute:
        return kept_bytes(lambda: vae.decode(z).sample, vae.parameters())
    entered: list[tuple[nn.Module, Tensor]] = []
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    hooks = [m.register_forward_pre_hook(lambda m, x: entered.append((m, x[0].detach()))) for m in blocks]
    with torch.no_grad():
        vae.decode(z)
    for hook in hooks:
        hook.remove()
    inside = [kept_bytes(lambda m=m, x=x: m(x.requires_grad_()), m.parameters()) for m, x in entered]
    vae.enable_gradient_checkpointing()
    kept = kept_bytes(lambda: vae.decode(z).sample, vae.parameters())
    vae.disable_gradient_checkpointing()
    return kept + max(inside)


def flux_vae() -> AutoencoderKL:
    """FLUX's autoencoder."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return vae.requires_grad_(False)


def tokens_of(plan: Plan) -> int:
    """Of an image: one for 16 x 16 pixels. Raises ValueError."""
    height, width = sides(plan.size)
    if height % 16 or width % 16:
        raise ValueError(f"--size {plan.size}: FLUX draws multiples of 16 pixels")
    return height * width // 16**2


def size_of(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    return sum(p.numel() for p in parameters) * dtype.itemsize


# ------------------------------------------------------------------------------------------ the plan


@torch.no_grad()
def memory(plan: Plan, gpus: int, flux: Flux, dtype: torch.dtype) -> dict[str, float]:
    """Bytes on one of `gpus` GPUs, by what they are for; what is not at the same time is under its stage."""
    group = plan.shard or gpus
    trained = [p for p in flux.parameters() if p.requires_grad]
    frozen = [p for p in flux.parameters() if not p.requires_grad]
    (height, width), apart = sides(plan.size), group if plan.shard_frozen else 1
    tokens = tokens_of(plan)
    largest = max(size_of(b.parameters(), dtype) for b in [*flux.double_blocks, *flux.single_blocks])
    whole = size_of(flux.parameters(), dtype)
    # Of what is gathered, or up-cast, by way of fp32.
    at_once, saved = 2 * largest, 0
    if plan.fp8:
        layers = [
            m.weight for s in (flux.double_blocks, flux.single_blocks) for m in s.modules() if type(m) is nn.Linear
        ]
        at_once = max(w.numel() for w in layers) * (4 + dtype.itemsize)
        saved = sum(w.numel() * (dtype.itemsize - 1) - 4 * len(w) for w in layers)  # a byte a weight, a scale a row
    vae = flux_vae()
    with torch.enable_grad():
        decoded = decode_bytes(vae, plan.micro_batch, height // 8, width // 8, plan.recompute)
        leap = leap_bytes(flux, plan.micro_batch, tokens, plan.text_length, dtype, plan.recompute)
    fp32, master = torch.float32, torch.bfloat16 if plan.lean else torch.float32
    return {
        "weights": (size_of(trained, master) + size_of(frozen, dtype) - plan.fp8 * saved) / group,
        "gradients": size_of(trained, master) / group,
        "optimizer": moments(plan) * size_of(trained, fp32) / group,
        "averages": 0 if plan.lean else size_of(trained, fp32) / group,
        "base": size_of(flux.parameters(), dtype) / group if plan.anchor and not plan.lora else 0,
        "encoders": (ENCODERS - LENT * plan.offload_encoders) * 2 / apart,
        "rewards": sum(REWARD_BYTES[name] for name in plan.reward) / apart,
        "VAE": size_of(vae.parameters(), fp32),
        "states": (2 * plan.rollout_steps + 1) * plan.rollout_batch * tokens * flux.config.in_channels * 4,
        "rollout": whole if plan.keep_gathered else at_once,
        "decode": decoded,
        "leap": leap + at_once,
    }


def peak(parts: dict[str, float]) -> float:
    """The highest of the stages, on top of what is always there."""
    stages = ("rollout", "decode", "leap")
    return sum(v for k, v in parts.items() if k not in stages) + max(parts[k] for k in stages)


def moments(plan: Plan) -> float:
    """Size of the optimizer's two moments in units of fp32 weights; with --lean a byte, and fp32 a block of 256."""
    return 2 * (1 / 4 + 1 / 256) if plan.lean else 2


def disk(plan: Plan, flux: Flux) -> float:
    """Bytes of a checkpoint: weights, moments, averages. --keep of them are on the disk, and one being written."""
    trained = size_of((p for p in flux.parameters() if p.requires_grad), torch.float32)
    return trained * ((0.5 if plan.lean else 1) + moments(plan) + 1)


def host_memory(plan: Plan, gpus: int, flux: Flux) -> float:
    """Bytes per GPU of the host's memory, at most: the copy that a checkpoint is written from, the weights while an
    evaluation has the averages in their place, and what a flag puts there.
    """
    group = plan.shard or gpus
    trained = size_of((p for p in flux.parameters() if p.requires_grad), torch.float32) / group
    swapped, averages = (0.5, 1) if plan.lean else (1, 0)
    return disk(plan, flux) / group + trained * (swapped + averages) + ENCODERS * 2 * plan.offload_encoders


def traffic(plan: Plan, gpus: int, flux: Flux, dtype: torch.dtype, cost: Flops) -> dict[str, float]:
    """What a GPU does in a step: gathers and bytes received in them, bytes reduced, and floating-point operations."""
    group, share = plan.shard or gpus, plan.batch // gpus
    rollouts, micros = -(-share // plan.rollout_batch), -(-share // plan.micro_batch)
    # An anchor evaluates the base at each leap, and the network again at the leaps after the first.
    base, backwards = (plan.leaps, 2 * plan.leaps - 1) if plan.anchor else (0, plan.leaps)
    # An evaluation gathers once, and its backward once more.
    gathers = rollouts * (1 if plan.keep_gathered else plan.rollout_steps) + micros * (base + 2 * backwards)
    reduces = micros * backwards
    whole, trained = size_of(flux.parameters(), dtype), [p for p in flux.parameters() if p.requires_grad]
    gradient = size_of(trained, torch.float32)
    missing = (group - 1) / group
    copies = gpus // group
    between = 2 * (copies - 1) / copies * gradient / group  # a ring all-reduce among copies
    return {
        "gathers": gathers,
        "gathered": gathers * whole * missing,
        "reduced": reduces * (gradient * missing + between),
        "flops": share * ((plan.rollout_steps + base) * cost.forward + backwards * cost.both),
    }


def main() -> None:
    plan = tyro.cli(Plan, description=__doc__)
    try:
        tokens_of(plan)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for gpus in plan.gpus:
        if plan.batch % gpus:
            raise SystemExit(f"error: --batch {plan.batch} is not a multiple of --gpus {gpus}")
        if gpus % (plan.shard or gpus):
            raise SystemExit(f"error: --gpus {gpus} is not a multiple of --shard {plan.shard}")
        if plan.fp8 and (gpus > 1 or not plan.lora):
            raise SystemExit("error: --fp8 is for one GPU (--gpus 1) and what a LoRA changes (--lora RANK)")
        if plan.lean and (gpus > 1 or plan.lora):
            raise SystemExit("error: --lean is for one GPU (--gpus 1) and all weights (no --lora)")
    dtype, rows = torch.bfloat16, {}
    with FakeTensorMode():
        flux = planned_flux(FLUX_DEV, plan.lora, dtype)
        size = "x".join(map(str, sides(plan.size)))
        print(f"FLUX.1-dev, {sum(p.numel() for p in flux.parameters()) / 1e9:.2f} B parameters, {size}")
        flux.recompute = plan.recompute
        cost = network_flops(flux, tokens_of(plan), plan.text_length)
        flux.recompute = False
        for gpus in plan.gpus:
            parts, sent = memory(plan, gpus, flux, dtype), traffic(plan, gpus, flux, dtype, cost)
            for key, value in {**parts, "peak": peak(parts)}.items():
                rows.setdefault(f"{key}, GB", []).append(value / 1e9)
            rows.setdefault("in the host's memory, GB", []).append(host_memory(plan, gpus, flux) / 1e9)
            rows.setdefault("a checkpoint on disk, GB", []).append(disk(plan, flux) / 1e9)
            rows.setdefault("gathered per step, GB", []).append(sent["gathered"] / 1e9)
            rows.setdefault("reduced per step, GB", []).append(sent["reduced"] / 1e9)
            rows.setdefault("computed per step, PFLOP", []).append(sent["flops"] / 1e15)
    print("| each GPU, of | " + " | ".join(map(str, plan.gpus)) + " |\n|---|" + "--:|" * len(plan.gpus))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:,.1f}" for v in values) + " |")


if __name__ == "__main__":
    main()
