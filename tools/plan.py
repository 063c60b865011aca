"""What a run on FLUX.1-dev needs, counted before anything is rented: memory, disk, traffic and hours.

    python -m tools.plan --gpus 1 8 16 64               # all weights
    python -m tools.plan --gpus 1 --batch 16 --lora 64  # a LoRA;  --lean  all weights, in bf16

Left out: buffers of the allocator, cuDNN and NCCL, a few GB; what a reward keeps for its backward, 0.6 GB a sample for
HPSv2 or PickScore; and, of the hours, evaluations, VAE and rewards. GB is 1e9 bytes.
"""

import math
from collections import Counter
from typing import Literal

import torch
import tyro

from config import sides
from formats.lora import add_lora
from infra.flags import flags
from infra.meter import PEAK, network_flops
from infra.methods import find_method
from model import FLUX_DEV, Flux, FluxConfig
from samples import zero_samples

# Bytes of published networks: T5-XXL's encoder and CLIP-L's text model in bf16, and all of T5's 24 layers but one;
# FLUX's autoencoder in fp32; the rewards in fp32, fp32 and bf16.
ENCODERS = 2 * (4_762_310_656 + 123_060_480)
OFFLOADED = 2 * 23 * 192_946_176
VAE = 4 * 83_819_683
REWARDS = {"hpsv2": 4 * 986_109_441, "pickscore": 4 * 985_987_457, "hpsv3": 16.6e9}
# Bytes kept for a backward, with --recompute and without: through the VAE for a pixel, through FLUX for a token of text
# or image. tests/test_plan.py counts them in the real modules. Without --recompute a LoRA keeps a quarter less.
DECODE = {True: 14_017, False: 23_265}
LEAP = {True: 548_000, False: 9_726_000}
TEXT_TOKENS = 512


@flags
class PlanFlags:
    """Count memory, disk, traffic and hours. Flags as in train.py; with its --shard N, memory is that of N GPUs."""

    gpus: tuple[int, ...] = (1, 8, 16, 64)
    """Numbers of GPUs to count for."""
    gpu: Literal[tuple(PEAK)] = "H200"
    """Kind of GPU, for the hours."""
    mfu: float = 0.4
    """Share of the GPU's published bf16 FLOP/s that a run attains: an assumption, not a measurement."""
    method: str = "leapalign"
    """Method whose evaluations of the network are counted."""
    reward: tuple[Literal[tuple(REWARDS)], ...] = ("hpsv2", "pickscore")
    """Rewards that are loaded, trained on or watched."""
    size: str = "720"
    """Pixels: one number for a square, or HEIGHTxWIDTH; of several sizes the largest."""
    updates: int = 300
    """Updates of the weights."""
    batch: int = 64
    """Rollouts per update, over all GPUs."""
    rollout_steps: int = 25
    """Euler steps of a rollout."""
    rollout_batch: int = 4
    """Rollouts at a time on a GPU."""
    micro_batch: int = 1
    """Samples at a time in the backward."""
    recompute: bool = True
    """Recompute activations in the backward."""
    offload_encoders: bool = False
    """Keep T5's layers on the CPU except while they compute."""
    lean: bool = False
    """Weights in bf16, 8-bit optimizer states, averages in the host's memory."""
    lora: int | None = None
    """Rank of a LoRA; None: all weights are trained."""
    fp8: bool = False
    """Keep what the LoRA changes in fp8."""


def main() -> None:
    cfg = tyro.cli(PlanFlags, description=__doc__)
    flux = planned_flux(FLUX_DEV, cfg.lora, torch.bfloat16)
    flux.recompute = cfg.recompute  # which costs a forward more in each backward
    try:
        forwards, backwards = evaluations(cfg)
        cost = network_flops(flux, image_tokens=math.prod(sides(cfg.size)) // 16**2, text_tokens=TEXT_TOKENS)
        flops = cfg.batch * (forwards * cost.forward + backwards * cost.forward_backward)
        columns = []
        for gpus in cfg.gpus:
            sizes = memory(cfg, gpus, flux) | traffic(cfg, gpus, flux, forwards, backwards)
            column = {f"{name}, GB": size / 1e9 for name, size in sizes.items()}
            column["computed in an update, PFLOP"] = flops / gpus / 1e15
            column["hours of the run"] = cfg.updates * flops / gpus / (cfg.mfu * PEAK[cfg.gpu]) / 3600
            columns.append(column)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

    print(f"FLUX.1-dev at {cfg.size} pixels, {cfg.updates} updates of {cfg.batch} rollouts by {cfg.method}")
    print(
        f"Hours assume that a run attains {cfg.mfu:.0%} (--mfu) of the {cfg.gpu}'s {PEAK[cfg.gpu] / 1e12:.0f} TFLOP/s"
    )
    print("| each GPU, of this many | " + " | ".join(map(str, cfg.gpus)) + " |\n|---|" + "--:|" * len(cfg.gpus))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:,.1f}" for column in columns) + " |")


def planned_flux(config: FluxConfig, lora: int | None, dtype: torch.dtype) -> Flux:
    """A Flux on the meta device, where tensors have shapes and no memory, with a LoRA of rank `lora`."""
    with torch.device("meta"):
        flux = Flux(config)
        if lora:
            add_lora(flux, lora, lora)
    return flux.to(dtype)


def memory(cfg: PlanFlags, gpus: int, flux: Flux) -> dict[str, float]:
    """Bytes on one of `gpus` GPUs, by what they hold; in the host's memory, for each GPU; and on the disk."""
    if gpus > 1 and (cfg.lean or cfg.fp8):
        raise ValueError(f"--gpus {gpus}: --lean and --fp8 are for one GPU")
    trained, frozen = 0, 0  # weights, bytes
    for name, p in flux.named_parameters():
        if p.requires_grad:
            trained += p.numel()
        elif cfg.fp8 and "blocks" in name and p.ndim == 2:
            frozen += p.numel() + 4 * len(p)  # a byte a weight, and an fp32 scale for each row
        else:
            frozen += p.nbytes
    # 8-bit moments have an fp32 scale for each block of 256.
    bytes_of_weight, bytes_of_moments = (2, 2 * (1 + 4 / 256)) if cfg.lean else (4, 8)
    pixels = math.prod(sides(cfg.size))
    tokens = pixels // 16**2  # patches of 2 x 2 latents, of 8 x 8 pixels each
    states = (2 * cfg.rollout_steps + 1) * cfg.rollout_batch  # a rollout keeps its states and velocities, in fp32
    sizes = {
        "weights": (trained * bytes_of_weight + frozen) / gpus,
        "gradients": trained * bytes_of_weight / gpus,
        "optimizer": trained * bytes_of_moments / gpus,
        "averages": 0 if cfg.lean else trained * 4 / gpus,
        "encoders": ENCODERS - OFFLOADED * cfg.offload_encoders,
        "rewards": sum(REWARDS[name] for name in cfg.reward),
        "VAE": VAE,
        "states": states * tokens * flux.config.in_channels * 4,
    }

    # FSDP all-gathers a block while the block before computes; double blocks are the largest.
    gathered = 2 * sum(p.nbytes for p in flux.double_blocks[0].parameters())
    if cfg.fp8:  # a layer at a time, up-cast by way of fp32; linear1 is the largest
        gathered = (4 + 2) * flux.single_blocks[0].linear1.linear.weight.numel()
    decode = cfg.micro_batch * pixels * DECODE[cfg.recompute]
    leap = cfg.micro_batch * (tokens + TEXT_TOKENS) * LEAP[cfg.recompute] + gathered
    # The decode of the reward and the leaps come one after the other.
    sizes |= {"decode": decode, "leap": leap, "peak": sum(sizes.values()) + max(decode, leap)}

    checkpoint = trained * (bytes_of_weight + bytes_of_moments + 4)
    # At most at once: the copy that a checkpoint is written from, the weights while an evaluation has the averages in
    # their place, and what flags put there.
    host = checkpoint + trained * (bytes_of_weight + 4 * cfg.lean)
    sizes["in the host's memory"] = host / gpus + ENCODERS * cfg.offload_encoders
    sizes["a checkpoint on disk"] = checkpoint
    # A LoRA is saved in fp32, all weights in bf16; T5 and the VAE beside them are hard links.
    sizes["best/ or final/ on disk"] = trained * (4 if cfg.lora else 2)
    return sizes


def evaluations(cfg: PlanFlags) -> tuple[float, float]:
    """Evaluations of the network per sample and update, without and with a gradient, as the method makes them on zeros.

    Means over the run, because some methods stop at a random step. Raises ValueError for a method that does not exist.
    """
    method = find_method(cfg.method)
    total: Counter[str] = Counter()
    sigmas = torch.linspace(1, 0, cfg.rollout_steps + 1)  # no method counts by the values
    for update in range(cfg.updates):
        samples, calls = zero_samples(sigmas, cfg.batch, torch.Generator().manual_seed(update), update)
        method(samples)
        total += calls
    return (total["velocity"] + total["base"]) / cfg.updates, total["vjp"] / cfg.updates


def traffic(cfg: PlanFlags, gpus: int, flux: Flux, forwards: float, backwards: float) -> dict[str, float]:
    """Bytes that a GPU receives in an update: weights that are all-gathered, and gradients that are reduced."""
    if cfg.batch % gpus:
        raise ValueError(f"--batch {cfg.batch} is not a multiple of --gpus {gpus}")
    rollouts = math.ceil(cfg.batch / gpus / cfg.rollout_batch)
    micro_batches = math.ceil(cfg.batch / gpus / cfg.micro_batch)
    # FSDP all-gathers the weights once for a forward, and once more for its backward.
    gathers = rollouts * forwards + micro_batches * 2 * backwards
    weights = sum(p.nbytes for p in flux.parameters())
    gradient = sum(4 * p.numel() for p in flux.parameters() if p.requires_grad)  # reduced in fp32
    from_others = (gpus - 1) / gpus  # the share that a GPU does not hold itself
    return {
        "gathered in an update": gathers * weights * from_others,
        "reduced in an update": micro_batches * backwards * gradient * from_others,
    }


if __name__ == "__main__":
    main()
