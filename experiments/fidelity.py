"""How good is a surrogate gradient?  Each method's against the true one, in the weights, on the same samples.

    python -m experiments.fidelity                                         # the base that the repository ships
    python -m experiments.fidelity --model shapes/tiny-flux runs/leapalign-seed0/final --rollout-steps 5 8 16
    python -m experiments.fidelity --methods leapalign refl my_method.py:noisy_steps

The true gradient is baselines.full, through every step.  A method's is drawn several times for the same noise, which
tells bias and variance apart:

    cosine       of a single draw and the true gradient, and norm, their ratio of lengths: what an update sees
    mean_cosine  of the mean over all draws and the true gradient: 1 is no bias but of length
    spread       of the draws about their mean, relative to its length: the standard deviation

The mean is of finitely many draws, so its squared length is too large by the variance of a draw, divided by their
number: that is taken off.  Where nothing is left, mean_cosine is NaN: more --draws are needed.  All is told by layer
too, and for two leaps from every pair (k, j) of steps, beside the distances d_j and d_0 of Eq. 12.

All methods see the same prompts and noise, but dance_grpo and mix_grpo start a group from the x_1 of its first sample.
mix_grpo is as in its first update: its window is at the noisiest steps.

Numbers are kept a batch of noise, and intervals are over batches (draw.py, draw_fidelity.py).
"""

import itertools
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from baselines import full
from config import Config as TrainConfig
from config import Experiment, Machine, Run, sides
from experiments.cells import config_of, opened, spent
from experiments.command import main
from experiments.draw import draw
from experiments.record import file_of, named, record
from formats.folders import Pipeline, load_pipeline
from infra.distributed import device_of
from infra.methods import find_method, method_keywords, method_options
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Samples, Velocity, hinge, leapalign, rollout, vjp_of
from rewards import Reward, open_reward
from sample import decode, encode, token_grid, velocity_of
from start import check_gradient

TRAIN = TrainConfig()
GROUP = 8  # samples of a prompt, neighbours: policy gradients compare them, and all methods see the same samples
LAYERS = {"double_blocks": "double", "single_blocks": "single", "final_layer": "final"}  # all others embed
METHODS = (
    "leapalign", "leapalign --weight none", "leapalign --alpha 0", "leapalign --alpha 1", "leapalign --leaps 1",
    "leapalign --leaps 3", "leapalign --leaps 3 --alpha 1", "leapalign --reward-input xhat_0",
    "refl", "draft_lv", "drtune", "full --last 1", "full --last 2",
    "flowbp_sparse", "flowbp_sparse --bias 0", "flowbp_bridge", "flowbp_lagrange",
    "flow_grpo", "dance_grpo", "mix_grpo",
)  # fmt: skip
Gradient = dict[str, Tensor]  # layer -> a flat vector
Numbers = dict[str, float]


@dataclass(frozen=True)
class Config:
    """Compare the gradients of methods with the true one."""

    model: tuple[str, ...] = (TRAIN.model,)
    """Model folders: bases of different straightness."""
    methods: tuple[str, ...] = METHODS
    """Methods, each with its flags: "leapalign --alpha 0", or my_file.py:FUNCTION."""
    rollout_steps: tuple[int, ...] = (TRAIN.rollout_steps,)
    """Euler steps of a rollout (T); several are measured one after the other."""
    noises: int = 8
    """Batches of prompts and noise, which the intervals are over."""
    batch: int = 16
    """Samples of a batch, 8 of each prompt."""
    draws: int = 8
    """Draws of each method's gradient in each batch."""
    reward: str = TRAIN.reward[0]
    """The reward, as train.py takes it."""
    prompts: Path = TRAIN.prompts
    """Prompts to draw from."""
    seed: int = 0
    """Seed of prompts, noise and draws."""
    device: str = TRAIN.device
    """Where to compute."""
    out: Path | None = None
    """File of the results, beside which tables and pictures are written; the default is
    experiments/results/fidelity.json, and runs/fidelity.json where you set anything that results depend on."""


# ------------------------------------------------------------------------------------ the numbers


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def compare(draws: Tensor, true: Tensor) -> Numbers:
    """Cosine, norm, mean_cosine and spread (see above) of draws (p, n) of a gradient, p > 1; true (n,)."""
    draws, true = draws.double(), true.double()
    mean = draws.mean(0)
    variance = (draws - mean).square().sum() / (len(draws) - 1)  # of a draw, summed over its entries
    length = (mean @ mean - variance / len(draws)).item()  # squared, of the mean over infinitely many draws
    length = length**0.5 if length > 0 else np.nan
    return dict(
        cosine=float(np.mean([cosine(d, true) for d in draws])),
        norm=(draws.norm(dim=1).mean() / true.norm()).item(),
        mean_cosine=(mean @ true / true.norm()).item() / length,
        spread=variance.sqrt().item() / length,
    )


def by_layer(draws: list[Gradient], true: Gradient) -> dict[str, Numbers]:
    """`compare` for each layer, and for all weights together."""
    numbers = {layer: compare(torch.stack([d[layer] for d in draws]), true[layer]) for layer in true}
    return {"all": compare(torch.stack([whole(d) for d in draws]), whole(true)), **numbers}


def whole(gradient: Gradient) -> Tensor:
    return torch.cat(list(gradient.values()))


def gradient_of(network: nn.Module, method: Callable[[Samples], dict], samples: Samples) -> tuple[Gradient, dict]:
    """A method's gradient in the weights, by layer, and what it logs."""
    network.zero_grad()
    log = method(samples)
    layers: dict[str, list[Tensor]] = {}
    for name, p in network.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        layers.setdefault(LAYERS.get(name.partition(".")[0], "embedders"), []).append(grad.flatten())
    return {layer: torch.cat(grads) for layer, grads in layers.items()}, log


# ------------------------------------------------------------------------------------ the samples


class Batch(NamedTuple):
    """Prompts and noise, and what a method is given of them but its randomness."""

    levels: Tensor  # (T + 1,)
    noise: Tensor  # x_1, (b, n, c)
    velocity: Velocity  # without gradient
    differentiable: Velocity
    slope: Callable[[Tensor], Tensor]  # x_0 -> dL/dx_0, L the mean of hinged rewards
    score: Callable[[Tensor], Tensor]  # x_0 -> (b,)


def batch_of(cfg: Config, pipe: Pipeline, reward: Reward, prompts: list[str], levels: Tensor, n: int) -> Batch:
    """The n-th batch: prompts and noise are a function of (seed, n), the same for every model and T."""
    random = generator_of(cfg.seed, n)
    chosen = torch.randperm(len(prompts), generator=random)[: cfg.batch // GROUP].tolist()
    texts = [prompts[i] for i in chosen for _ in range(GROUP)]
    rows, columns = token_grid(pipe, *sides(TRAIN.size[0]))
    noise = torch.randn(cfg.batch, rows * columns, pipe.flux.config.in_channels, generator=random).to(pipe.device)
    velocity = velocity_of(pipe.flux, encode(pipe, texts), rows, columns)

    def score(x0: Tensor) -> Tensor:
        return reward.score(decode(pipe, x0, *sides(TRAIN.size[0])), texts)

    def slope(x0: Tensor) -> Tensor:
        x0 = x0.detach().requires_grad_()
        return torch.autograd.grad(hinge(score(x0), reward.lam).mean(), x0)[0]

    no_grad = torch.no_grad()
    return Batch(levels.to(noise), noise, once(no_grad(velocity)), velocity, once(slope), no_grad(score))


def samples_of(batch: Batch, *key: int) -> Samples:
    """A batch as a method sees it in the draw of a key: the same x_1 in all of them, else another randomness."""

    def noise(i: int) -> Tensor:
        if i == 0:
            return batch.noise
        return torch.randn(batch.noise.shape, generator=generator_of(*key, i)).to(batch.noise)

    def reward(x0: Tensor, weight: Tensor | None = None) -> Tensor:
        slope = batch.slope(x0)
        return slope if weight is None else weight[:, None, None] * slope

    vjp, shared = vjp_of(batch.differentiable), generator_of(*key)
    return Samples(noise, batch.levels, shared, batch.velocity, vjp, reward, batch.score, len(batch.noise), 0)


def once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of tensors, evaluated once at each point: all draws of a batch make the same rollout."""
    known: dict[tuple[bytes, ...], Tensor] = {}

    def call(*inputs: Tensor) -> Tensor:
        key = tuple(x.detach().cpu().numpy().tobytes() for x in inputs)
        if key not in known:
            known[key] = function(*inputs)
        return known[key]

    return call


# ------------------------------------------------------------------------------------ the measurement


def measure(cfg: Config, methods: dict[str, Callable], network: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """All numbers of one model and T, each a list with one entry a batch."""
    result: dict[str, Any] = dict(straightness=[], methods={spec: {} for spec in methods}, places=[])
    for n, batch in enumerate(batches):
        true, _ = gradient_of(network, full, samples_of(batch, cfg.seed, n))
        if not whole(true).norm() > 0:
            raise ValueError(f"the true gradient of batch {n} is zero: all is above lambda; give a larger --batch")
        ro = rollout(batch.velocity, batch.noise, batch.levels)
        straight = ro.x[0] - ro.x[-1]  # what every velocity would be if the trajectory were straight
        result["straightness"].append(((ro.v - straight).square().mean() / straight.square().mean()).item())
        for spec, method in methods.items():
            keys = [(cfg.seed, n, draw) for draw in range(1, cfg.draws + 1)]  # (seed, n, 0) is (seed, n) to numpy
            draws = [gradient_of(network, method, samples_of(batch, *key))[0] for key in keys]
            for layer, numbers in by_layer(draws, true).items():
                for name, value in numbers.items():
                    result["methods"][spec].setdefault(layer, {}).setdefault(name, []).append(value)
        result["places"].append(places(network, batch, true))
        print(f"batch {n + 1} of {len(batches)}", flush=True)
    return result


def places(network: nn.Module, batch: Batch, true: Gradient) -> list[Numbers]:
    """Two leaps from every pair of steps, unweighted: k, j, the distances, and cosine and norm as in `compare`."""
    found = []
    for k, j in itertools.combinations(batch.levels[:-1].tolist(), 2):
        samples = samples_of(batch, 0)
        pair = dict(low=j, high=k, distance=k - j, weight="none")  # no other pair of steps is like this
        gradient, log = gradient_of(network, lambda s, pair=pair: leapalign(s, **pair), samples)
        ours, exact = whole(gradient), whole(true)
        distances = {name: log[name].mean().item() for name in ("d_j", "d_0")}
        found.append(dict(k=k, j=j, **distances, cosine=cosine(ours, exact), norm=(ours.norm() / exact.norm()).item()))
    return found


def check(cfg: Config) -> None:
    """Raise ValueError naming the flag."""
    if not cfg.model or not cfg.methods or min(cfg.rollout_steps, default=0) < 1:
        raise ValueError("--model, --methods and --rollout-steps: give at least one of each, of steps at least 1")
    for spec in cfg.methods:
        row, others = config_of(spec, ""), {f.name for group in (Experiment, Run, Machine) for f in fields(group)}
        given = [word.partition("=")[0] for word in shlex.split(spec) if word.startswith("--")]
        if ignored := [flag for flag in given if flag.removeprefix("--").replace("-", "_") in others]:
            raise ValueError(f"{ignored[0]} in {spec!r}: a row has flags of its method only")
        group = method_options(row, TRAIN).get("group", method_keywords(find_method(row.method)).get("group", 1))
        if group < 1 or GROUP % group:
            raise ValueError(f"--group {group} in {spec!r}: a prompt has {GROUP} samples here, a multiple of a group")
    if cfg.draws < 2 or cfg.noises < 1:
        raise ValueError(
            f"--draws {cfg.draws} must be at least 2, for a variance, and --noises {cfg.noises} at least 1"
        )
    if cfg.batch < GROUP or cfg.batch % GROUP:
        raise ValueError(f"--batch {cfg.batch}: it is a multiple of {GROUP}, the samples of a prompt")


def run(cfg: Config) -> None:
    """Measure every model at every T; what is finished is written as it comes."""
    check(cfg)
    prompts, bases, device = read_prompts(cfg.prompts), [], device_of(cfg.device)
    out = file_of(cfg, "fidelity")
    if len(prompts) < cfg.batch // GROUP:
        raise ValueError(f"--prompts {cfg.prompts} has {len(prompts)}, and --batch {cfg.batch} takes one for {GROUP}")
    flags = {
        (model, steps): f"--model {shlex.quote(model)} --rollout-steps {steps} --batch {cfg.batch}"
        for model in cfg.model
        for steps in cfg.rollout_steps
    }
    opened_methods = {key: {spec: opened(spec, words) for spec in cfg.methods} for key, words in flags.items()}
    for (model, steps), methods in opened_methods.items():
        print(f"{model}, {steps} steps", flush=True)
        pipe = load_pipeline(Path(model), device, torch.float32)
        reward = open_reward(cfg.reward, cfg.device, pipe.clip_tokenizer)
        check_gradient(reward, prompts[:1], sides(TRAIN.size[0]), device)
        levels = next(iter(methods.values()))[1]
        batches = [batch_of(cfg, pipe, reward, prompts, levels, n) for n in range(cfg.noises)]
        numbers = measure(cfg, {spec: method for spec, (method, _) in methods.items()}, pipe.flux, batches)
        took = {spec: spent(spec, flags[model, steps], 100) / 100 / cfg.batch for spec in methods}
        bases.append(dict(model=named(model), rollout_steps=steps, evaluations=took, **numbers))
        record(out, kind="fidelity", draws=cfg.draws, batch=cfg.batch, bases=bases)
    draw(out)


if __name__ == "__main__":
    main(run, Config, __doc__)
