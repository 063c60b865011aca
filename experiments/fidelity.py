"""How good is a surrogate gradient?  Each method's against the true one, in the weights, on the same samples.

    python -m experiments.fidelity                                         # the base that the repository ships
    python -m experiments.fidelity --model runs/leapalign-seed0/final --rollout-steps 25
    python -m experiments.fidelity --methods leapalign refl my_method.py:noisy_steps
    python -m experiments.fidelity --guidance 2 --methods full "full --detach-negative"    # guidance's own gradient

The true gradient is that of `full`, through every step. A method's gradient is drawn several times for the same noise,
which separates bias from variance:

    cosine       of a single draw and the true gradient, and norm, their ratio of lengths: what an update sees
    mean_cosine  of the mean over all draws and the true gradient: 1 is no bias but of length
    spread       of the draws about their mean, relative to its length: the standard deviation

The mean is of finitely many draws, so its squared length is too large by the variance of a draw, divided by their
number. That is subtracted; where nothing is left, mean_cosine is NaN and more --draws are needed.

All methods see the same prompts and noise, but dance_grpo and mix_grpo start a group from the x_1 of its first sample,
fdfo a pair from nearly that of its first.
mix_grpo is as in its first update: its window is at the noisiest steps. Intervals are over batches of noise.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from config import Config as TrainConfig
from config import Method
from experiments.cells import evaluations_of, flag_names, load_method
from experiments.record import format_interval, markdown_table, run_command, source_line, write_result, write_table
from formats.folders import Pipeline, load_pipeline
from infra.flags import flags
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Samples
from rewards import Reward, open_reward
from samples import Size, build_samples

TRAIN = TrainConfig()
# Neighbouring samples have one prompt, because policy gradients compare them and all methods see the same samples.
GROUP = 8
METHODS = (
    "leapalign",
    "leapalign --weight none",
    "leapalign --alpha 0",
    "leapalign --alpha 1",
    "leapalign --leaps 1",
    "leapalign --leaps 3",
    "leapalign --leaps 3 --alpha 1",
    "leapalign --reward-input xhat_0",
    "refl",
    "refl --reward-input x_0",
    "draft_lv",
    "drtune",
    "drtune --reward-input x_0",
    "full --last 1",
    "full --last 2",
    "full --last random",
    "direct_align",
    "vgg_flow",
    "flowbp_sparse",
    "flowbp_sparse --bias 0",
    "flowbp_bridge",
    "flowbp_lagrange",
    "flow_grpo",
    "flow_grpo --window 2",
    "flow_grpo --cps",
    "dance_grpo",
    "mix_grpo",
    "awm",
    "nft",
    "dpo",
    "fdfo",
    "fdfo --option dsigma=true",
)
Numbers = dict[str, float]


@flags
class FidelityFlags:
    """Compare the gradients of methods with the true one."""

    model: str = TRAIN.model
    """Model folder, whose gradients are compared."""
    methods: tuple[str, ...] = METHODS
    """Methods, each with its flags: "leapalign --alpha 0", or my_file.py:FUNCTION."""
    rollout_steps: int = TRAIN.rollout_steps
    """Euler steps of a rollout (T)."""
    guidance: float | None = None
    """Scale of guidance by a second evaluation of the network. The true gradient goes through both evaluations; that of
    a row with --detach-negative leaves out the one with the negative prompt."""
    noises: int = 8
    """Batches of prompts and noise, which the intervals are over."""
    batch: int = 16
    """Samples of a batch, 8 of each prompt."""
    draws: int = 8
    """Draws of each method's gradient in each batch."""
    reward: str = TRAIN.reward[0]
    """The reward, as train.py takes it."""
    seed: int = 0
    """Seed of prompts, noise and draws."""
    results: Annotated[Path, tyro.conf.arg(aliases=("--out",))] = Path("runs/fidelity.json")
    """JSON file of the results; the table is written beside it."""


def measure_fidelity(cfg: FidelityFlags) -> None:
    """Measure all methods, and write their numbers and a table."""
    check_fidelity_flags(cfg)
    # The methods are given a prompt's samples here, so a --group that does not divide them is refused.
    flags = f"--model {shlex.quote(cfg.model)} --rollout-steps {cfg.rollout_steps} --batch {GROUP}"
    flags += f" --guidance {cfg.guidance} --reward {shlex.quote(cfg.reward)} --watch"  # none is watched
    full = load_method("full", flags)  # refuses a reward without a gradient
    methods, evaluations = {}, {}
    for spec in cfg.methods:
        methods[spec] = load_method(spec, flags).method
        # A mean over updates, because some methods differentiate as many steps as a random number says.
        evaluations[spec] = evaluations_of(spec, flags, updates=100) / 100 / GROUP
    pipe = load_pipeline(Path(cfg.model), dtype=torch.float32)  # differences of gradients are small: no bf16
    reward = open_reward(cfg.reward, tokenizer=pipe.clip_tokenizer)
    batches = [build_batch(cfg, pipe, full.size, reward, n) for n in range(cfg.noises)]
    detached = [build_batch(cfg, pipe, full.size, reward, n, detach_negative=True) for n in range(cfg.noises)]
    numbers = measure_methods(cfg, full.method, methods, pipe.flux, batches, detached)
    result = write_result(cfg.results, draws=cfg.draws, batch=cfg.batch, evaluations=evaluations, methods=numbers)
    write_table(cfg.results, report_fidelity(result))


def check_fidelity_flags(cfg: FidelityFlags) -> None:
    """Raise ValueError naming the flag."""
    if cfg.draws < 2 or cfg.noises < 1:
        raise ValueError(f"--draws {cfg.draws} must be 2 or more, for a variance, and --noises {cfg.noises} 1 or more")
    # A batch of half a prompt would hide samples from policy gradients.
    if cfg.batch < GROUP or cfg.batch % GROUP:
        raise ValueError(f"--batch {cfg.batch}: it is a multiple of {GROUP}, the samples of a prompt")
    # All rows share what this command has flags for; a row's own would win.
    allowed = {field.name for field in fields(Method)} | {"detach_negative"}
    for spec in cfg.methods:
        for flag in flag_names(spec):
            if flag.replace("-", "_") not in allowed:
                raise ValueError(f"--{flag} in {spec!r}: a row has flags of its method, or --detach-negative")


# ------------------------------------------------------------------------------------ the samples


def build_batch(
    cfg: FidelityFlags, pipe: Pipeline, size: Size, reward: Reward, n: int, detach_negative: bool = False
) -> Samples:
    """The n-th batch. Prompts and noise are a function of (seed, n), the same for every model and T."""
    # Prompts before noise: the order of random draws is part of the result.
    generator = generator_of(cfg.seed, n)
    prompts = read_prompts(TRAIN.prompts)
    indices = torch.randperm(len(prompts), generator=generator)[: cfg.batch // GROUP]
    texts = [prompts[i] for i in indices.repeat_interleave(GROUP).tolist()]
    x_1 = torch.randn(cfg.batch, size.rows * size.columns, pipe.flux.config.in_channels, generator=generator)
    samples, _ = build_samples(
        pipe,
        texts,
        size,
        [reward],
        noise=lambda i: x_1,
        generator=generator,
        guidance=cfg.guidance,
        detach_negative=detach_negative,
    )
    # All draws of all methods make the same rollout, which costs more than most gradients.
    velocity = compute_once(samples.velocity)
    # The gradients are those of a first update: the network is its own base.
    return samples._replace(velocity=velocity, base=velocity)


def samples_of_draw(batch: Samples, *key: int) -> Samples:
    """A batch in the draw of a key: the same x_1 in all draws, and a randomness of its own for all else."""
    x_1 = batch.noise(0)

    def noise(i: int) -> Tensor:
        if i == 0:
            return x_1
        return torch.randn(x_1.shape, generator=generator_of(*key, i), dtype=x_1.dtype)

    return batch._replace(noise=noise, generator=generator_of(*key))


def compute_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of tensors, with the results kept by the values of the inputs."""
    results: dict[tuple[bytes, ...], Tensor] = {}

    def call(*inputs: Tensor) -> Tensor:
        # Tensors are compared by identity, so their bytes are the key.
        key = tuple(x.numpy().tobytes() for x in inputs)
        if key not in results:
            results[key] = function(*inputs)
        return results[key]

    return call


# ------------------------------------------------------------------------------------ the numbers


def measure_methods(
    cfg: FidelityFlags,
    full: Callable,
    methods: dict[str, Callable],
    network: nn.Module,
    batches: list[Samples],
    detached: Sequence[Samples] = (),
) -> dict[str, dict[str, list[float]]]:
    """The numbers of each method, a list with an entry per batch. `full` makes the true gradient.

    `detached` are the same batches for the rows with --detach-negative.
    """
    result: dict[str, dict[str, list[float]]] = {spec: {} for spec in methods}
    for n, batch in enumerate(batches):
        # Any key would do: the true gradient is a function of x_1 alone.
        true = gradient_of_method(network, full, samples_of_draw(batch, cfg.seed, n))
        if not true.norm() > 0:  # there is no direction to compare with
            raise ValueError(f"the true gradient of batch {n} is zero: all is above lambda; give a larger --batch")
        for spec, method in methods.items():
            row_batch = detached[n] if "--detach-negative" in spec else batch
            draws = []
            # Draws begin at 1: numpy makes the same random numbers of (seed, n, 0) and of (seed, n).
            for draw in range(1, cfg.draws + 1):
                samples = samples_of_draw(row_batch, cfg.seed, n, draw)
                draws.append(gradient_of_method(network, method, samples))
            for name, value in compare_draws(torch.stack(draws), true).items():
                result[spec].setdefault(name, []).append(value)
        print(f"batch {n + 1} of {len(batches)}", flush=True)  # a batch takes minutes
    return result


def gradient_of_method(network: nn.Module, method: Callable, samples: Samples) -> Tensor:
    """A method's gradient in all weights, a flat vector."""
    network.zero_grad()  # methods add to .grad
    method(samples)
    gradients = []
    for parameter in network.parameters():
        # A method that differentiates no step leaves no gradient.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.flatten())
    return torch.cat(gradients)


def compare_draws(draws: Tensor, true: Tensor) -> Numbers:
    """Cosine, norm, mean_cosine and spread (see above) of draws (p, n) of a gradient, p > 1; true (n,)."""
    draws, true = draws.double(), true.double()  # sums over a million entries
    mean = draws.mean(0)
    variance = (draws - mean).square().sum() / (len(draws) - 1)  # of a draw, summed over its entries
    # The squared length of the mean over infinitely many draws; its estimate can be negative.
    squared_length = (mean @ mean - variance / len(draws)).item()
    length = squared_length**0.5 if squared_length > 0 else np.nan
    lengths = draws.norm(dim=1)
    return dict(
        cosine=(draws @ true / (lengths * true.norm())).mean().item(),
        norm=(lengths.mean() / true.norm()).item(),
        mean_cosine=(mean @ true / true.norm()).item() / length,
        spread=variance.sqrt().item() / length,
    )


def report_fidelity(result: dict[str, Any]) -> str:
    """A table with a row per method, and where it is from."""
    lines = []
    for spec, numbers in result["methods"].items():
        intervals = map(format_interval, numbers.values())
        lines.append([spec, *intervals, f"{result['evaluations'][spec]:.1f}"])
    return (
        f"{source_line(result)} Against the true gradient, {result['draws']} draws in each of {len(numbers['norm'])} "
        f"batches of {result['batch']} samples; mean and 95% interval over batches.\n\n"
        + markdown_table(["", "cosine", "norm", "cosine of the mean", "spread", "evaluations"], lines)
    )


if __name__ == "__main__":
    run_command(measure_fidelity, FidelityFlags, __doc__)
