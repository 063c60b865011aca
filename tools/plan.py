"""What a run on FLUX.1-dev or FLUX.2 [klein] base 4B needs, counted before anything is rented: memory, disk and hours.

    python -m tools.plan flux-dev-hpsv2 --gpus 1 8 16 64     # all weights
    python -m tools.plan flux-dev-lora --gpus 1 --size 512   # a LoRA
    python -m tools.plan flux-dev-lora --check               # which of its files are here, and what gets the others

Flags of train.py; without a preset flux-dev-hpsv2. With train.py's --shard N, memory is that of N GPUs.
Left out: buffers of the allocator, cuDNN and NCCL, a few GB; what a reward keeps for its backward, 0.6 GB a sample for
HPSv2 or PickScore; and, of the hours, evaluations, VAE and rewards. GB is 1e9 bytes.
"""

import math
from collections import Counter
from functools import partial

import torch
import tyro

from config import Config, parse, sides
from families import Network, family_of, flux1, flux2
from infra.checks import check_numbers
from infra.downloads import list_downloads
from infra.flags import check_ranges, flags
from infra.meter import network_flops
from infra.methods import find_method, method_options
from rewards import WEIGHTS, reward_name
from samples import branch_counts, trial_samples
from start import empty_flux

# Bytes of published networks: T5-XXL's encoder and CLIP-L's text model, or 27 layers of Qwen3-4B, in bf16, and all of
# their layers but one; FLUX's autoencoders in fp32; the rewards in fp32, fp32 and bf16.
ENCODERS = {flux1: 2 * (4_762_310_656 + 123_060_480), flux2: 2 * 3_114_088_192}
OFFLOADED = {flux1: 2 * 23 * 192_946_176, flux2: 2 * 26 * 100_930_816}
VAE = {flux1: 4 * 83_819_683, flux2: 4 * 84_046_115}
REWARDS = {"hpsv2": 4 * 986_109_441, "pickscore": 4 * 985_987_457, "hpsv3": 16.6e9}
# Bytes kept for a backward, by --recompute: through the VAE for a pixel, through FLUX for a token of text or image.
# tests/test_plan.py counts them in the real modules, on a CPU: without recomputation a quarter of them is of rms_norm,
# which CUDA fuses, and a LoRA keeps a quarter less.
DECODE = {"none": 23_265, "light": 23_265, "blocks": 14_017}
LEAP = {
    flux1: {"none": 9_726_000, "light": 3_816_000, "blocks": 548_000},
    flux2: {"none": 4_850_000, "light": 2_101_000, "blocks": 372_000},
}
TEXT_TOKENS = 512


@flags
class PlanFlags:
    """Count memory, disk and hours."""

    gpus: tuple[int, ...] = (1, 8, 16, 64)
    """Numbers of GPUs to count for."""
    tflops: float = 395.6
    """TFLOP/s that a GPU attains, an assumption: 40% of the bf16 peak of an H200 or H100; of a 4090 it is 66."""
    check: bool = False
    """List the files that the run needs and the commands that get them, and stop."""


def main() -> None:
    plan, words = tyro.cli(PlanFlags, description=__doc__, return_unknown_args=True)
    if not words or words[0].startswith("-"):
        words = ["flux-dev-hpsv2", *words]
    try:
        check_ranges(plan)
        cfg, preset = parse(words)
        if plan.check:
            return list_downloads(cfg, WEIGHTS)
        check_numbers(cfg)
        if not plan.gpus or cfg.model == Config.model:
            raise ValueError("give --gpus a number, and a preset of FLUX.1 or of FLUX.2 [klein], which this counts")
        family = flux2 if "klein" in cfg.model else flux1
        flux = empty_flux(cfg, family.DEFAULT).to(torch.bfloat16)  # in which it computes
        flops = operations(cfg, preset, flux)
        columns = []
        for gpus in plan.gpus:
            seconds = flops / gpus / (plan.tflops * 1e12)
            column = {f"{name}, GB": size / 1e9 for name, size in memory(cfg, gpus, flux).items()}
            column["computed in an update, PFLOP"] = flops / gpus / 1e15
            columns.append(column | {"seconds of an update": seconds, "hours of the run": cfg.updates * seconds / 3600})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

    print(f"{cfg.model} at {' '.join(cfg.size)} pixels, {cfg.updates} updates of {cfg.batch} rollouts by {cfg.method}")
    print(f"Hours assume that a GPU attains {plan.tflops:g} TFLOP/s (--tflops; metrics.jsonl has a run's own)")
    print(f"| each GPU, of this many | {' | '.join(map(str, plan.gpus))} |\n|---|{'--:|' * len(plan.gpus)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:,.1f}' for column in columns)} |")


def memory(cfg: Config, gpus: int, flux: Network) -> dict[str, float]:
    """Bytes on one of `gpus` GPUs, by what they hold; in the host's memory, for each GPU; and on the disk."""
    if cfg.batch % gpus or (gpus > 1 and (cfg.lean or cfg.fp8)):
        raise ValueError(f"--gpus {gpus}: --batch {cfg.batch} must be a multiple, and --lean and --fp8 are for one GPU")
    family = family_of(flux.config)
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
    pixels = max(math.prod(sides(size)) for size in cfg.size)
    tokens = pixels // 16**2  # patches of 2 x 2 latents, of 8 x 8 pixels each
    share_of_vae = 0.5 if cfg.vae_bf16 else 1.0
    states = (2 * cfg.rollout_steps + 1) * cfg.rollout_batch  # a rollout keeps its states and velocities, in fp32
    sizes = {
        "weights": (trained * bytes_of_weight + frozen) / gpus,
        "gradients": trained * bytes_of_weight / gpus,
        "optimizer": trained * bytes_of_moments / gpus,
        "averages": 0 if cfg.lean else trained * 4 / gpus,
        "encoders": ENCODERS[family] - OFFLOADED[family] * cfg.offload_encoders,
        "rewards": sum(REWARDS.get(reward_name(spec), 0) for spec in (*cfg.reward, *cfg.watch)),
        "VAE": VAE[family] * share_of_vae,
        "states": states * tokens * flux.config.in_channels * 4,
    }

    # FSDP all-gathers a block while the block before computes; double blocks are the largest.
    gathered = 2 * sum(p.nbytes for p in flux.double_blocks[0].parameters())
    if cfg.fp8:  # a layer at a time, up-cast by way of fp32; linear1 is the largest
        gathered = 6 * flux.single_blocks[0].linear1.linear.weight.numel()
    decode = cfg.micro_batch * pixels * DECODE[cfg.recompute] * share_of_vae
    leap = cfg.micro_batch * (tokens + TEXT_TOKENS) * LEAP[family][cfg.recompute] + gathered
    # The decode of the reward and the leaps come one after the other.
    sizes |= {"decode": decode, "leap": leap, "peak": sum(sizes.values()) + max(decode, leap)}

    checkpoint = trained * (bytes_of_weight + bytes_of_moments + 4)
    # At most at once: the copy that a checkpoint is written from, the weights while an evaluation has the averages in
    # their place, and what flags put there.
    host = checkpoint + trained * (bytes_of_weight + 4 * cfg.lean)
    sizes["in the host's memory"] = host / gpus + ENCODERS[family] * cfg.offload_encoders
    sizes["a checkpoint on disk"] = checkpoint
    # A LoRA is saved in fp32, all weights in bf16; T5 and the VAE beside them are hard links.
    sizes["best/ or final/ on disk"] = trained * (4 if cfg.lora else 2)
    return sizes


def operations(cfg: Config, preset: Config, flux: Network) -> float:
    """Floating-point operations of the network in an update, by the calls that the method makes on random samples.

    A mean over the run, because some methods stop at a random step. Raises ValueError for a method that does not exist.
    """
    method = partial(find_method(cfg.method), **method_options(cfg, preset))
    sigmas = torch.linspace(1, 0, cfg.rollout_steps + 1)  # no method counts by the values
    total: Counter[str] = Counter()
    for update in range(cfg.updates):
        samples, calls = trial_samples(sigmas, cfg.batch, torch.Generator().manual_seed(update), update)
        method(samples)
        total += calls
    flux.recompute = cfg.recompute  # blocks cost a forward more in each backward
    image_tokens = max(math.prod(sides(size)) for size in cfg.size) // 16**2
    cost = network_flops(flux, image_tokens, TEXT_TOKENS)
    forwards, backwards = branch_counts(flux.config, cfg.guidance, cfg.detach_negative)
    flops = (total["velocity"] + total["base"]) * forwards * cost.forward
    flops += total["vjp"] * backwards * cost.forward_backward
    return cfg.batch * flops / cfg.updates


if __name__ == "__main__":
    main()
