"""How good is a surrogate gradient?  Each method's against the true one, in the weights, on the same samples.

    python -m experiments.fidelity                                         # the base that the repository ships
    python -m experiments.fidelity --model shapes/tiny-flux runs/leapalign-seed0/final --rollout-steps 5 8 16
    python -m experiments.fidelity --methods leapalign refl my_method.py:noisy_steps

The true gradient is baselines.full, through every step. A method's gradient is drawn several times for the same noise,
which separates bias from variance:

    cosine       of a single draw and the true gradient, and norm, their ratio of lengths: what an update sees
    mean_cosine  of the mean over all draws and the true gradient: 1 is no bias but of length
    spread       of the draws about their mean, relative to its length: the standard deviation

The mean is of finitely many draws, so its squared length is too large by the variance of a draw, divided by their
number. That is subtracted; where nothing is left, mean_cosine is NaN and more --draws are needed. All numbers are
measured for each layer, too; and for two leaps from every pair (k, j) of steps, with the distances of Eq. 12.

All methods see the same prompts and noise, but dance_grpo and mix_grpo start a group from the x_1 of its first sample.
mix_grpo is as in its first update: its window is at the noisiest steps. Intervals are over batches of noise.
"""

import itertools
import os
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from baselines import full
from config import Config as TrainConfig
from config import Method, sides
from experiments.cells import config_of, evaluations_of, flag_names, load_method
from experiments.draw import draw_result
from experiments.record import run_command, write_result
from formats.folders import Pipeline, load_pipeline
from infra.distributed import device_of
from infra.flags import flags
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Samples, leapalign, rollout
from rewards import Reward, open_reward
from samples import Size, build_samples
from start import check_gradient

TRAIN = TrainConfig()
SIZE = sides(TRAIN.size[0])
# Neighbouring samples have one prompt, because policy gradients compare them and all methods see the same samples.
GROUP = 8
# The layers of a table, by the first part of a parameter's name. All other parameters are embedders.
LAYERS = {"double_blocks": "double", "single_blocks": "single", "final_layer": "final"}
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
    "draft_lv",
    "drtune",
    "full --last 1",
    "full --last 2",
    "flowbp_sparse",
    "flowbp_sparse --bias 0",
    "flowbp_bridge",
    "flowbp_lagrange",
    "flow_grpo",
    "dance_grpo",
    "mix_grpo",
)
Gradient = dict[str, Tensor]  # "all" or a layer -> a flat vector
Numbers = dict[str, float]


@flags
class FidelityFlags:
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
    results: Annotated[Path, tyro.conf.arg(aliases=("--out",))] = Path("runs/fidelity.json")
    """JSON file of the results; tables and pictures are written beside it."""


def measure_fidelity(cfg: FidelityFlags) -> None:
    """Measure every model at every T. Each is written when it is finished."""
    check_fidelity_flags(cfg)
    # A batch has each prompt once, for a group of samples.
    prompts = read_prompts(cfg.prompts)
    if len(prompts) < cfg.batch // GROUP:
        raise ValueError(f"--prompts {cfg.prompts} has {len(prompts)}, and --batch {cfg.batch} takes one for {GROUP}")
    conditions = list(itertools.product(cfg.model, cfg.rollout_steps))
    # A wrong flag in the last row ends the command now, not after the minutes of the rows before.
    for model, steps in conditions:
        load_methods(cfg, model, steps)
    bases = []
    device = device_of(cfg.device)
    for model, steps in conditions:
        print(f"{model}, {steps} steps", flush=True)
        methods, evaluations, size = load_methods(cfg, model, steps)
        pipe = load_pipeline(Path(model), device, torch.float32)  # differences of gradients are small: no bf16
        reward = open_reward(cfg.reward, cfg.device, pipe.clip_tokenizer)
        check_gradient(reward, prompts[:1], SIZE, device)
        batches = [build_batch(cfg, pipe, size, reward, prompts, n) for n in range(cfg.noises)]
        numbers = measure_methods(cfg, methods, pipe.flux, batches)
        # The file has the model's path from here, as it was given, not from the root of this machine.
        bases.append(dict(model=os.path.relpath(model), rollout_steps=steps, evaluations=evaluations, **numbers))
        write_result(cfg.results, kind="fidelity", draws=cfg.draws, batch=cfg.batch, bases=bases)
    draw_result(cfg.results)


def load_methods(cfg: FidelityFlags, model: str, steps: int) -> tuple[dict[str, Callable], dict[str, float], Size]:
    """The methods by their rows, evaluations per sample of an update, and the size of the images with T's levels."""
    flags = f"--model {shlex.quote(model)} --rollout-steps {steps} --batch {cfg.batch}"
    methods, evaluations = {}, {}
    for spec in cfg.methods:
        methods[spec], size = load_method(spec, flags)
        # A mean over updates, because some methods differentiate as many steps as a random number says.
        evaluations[spec] = evaluations_of(spec, flags, updates=100) / 100 / cfg.batch
    return methods, evaluations, replace(size, sigmas=size.sigmas.to(cfg.device))


def check_fidelity_flags(cfg: FidelityFlags) -> None:
    """Raise ValueError naming the flag."""
    if not cfg.model or not cfg.methods or min(cfg.rollout_steps, default=0) < 1:
        raise ValueError("--model, --methods and --rollout-steps: give at least one of each, of steps at least 1")
    if cfg.draws < 2 or cfg.noises < 1:
        raise ValueError(f"--draws {cfg.draws} must be 2 or more, for a variance, and --noises {cfg.noises} 1 or more")
    # A batch of half a prompt would hide samples from policy gradients.
    if cfg.batch < GROUP or cfg.batch % GROUP:
        raise ValueError(f"--batch {cfg.batch}: it is a multiple of {GROUP}, the samples of a prompt")
    # Flags of --model, --rollout-steps and --batch are the same in all rows, and rows' own flags would win.
    method_flags = {field.name for field in fields(Method)}
    for spec in cfg.methods:
        for flag in flag_names(spec):
            if flag.replace("-", "_") not in method_flags:
                raise ValueError(f"--{flag} in {spec!r}: a row has flags of its method only")
        group = config_of(spec, "").group or GROUP  # 8 is also the methods' own default
        if GROUP % group:
            raise ValueError(f"--group {group} in {spec!r}: a prompt has {GROUP} samples here, a multiple of a group")


# ------------------------------------------------------------------------------------ the samples


def build_batch(cfg: FidelityFlags, pipe: Pipeline, size: Size, reward: Reward, prompts: list[str], n: int) -> Samples:
    """The n-th batch. Prompts and noise are a function of (seed, n), the same for every model and T."""
    # Prompts before noise: the order of random draws is part of the result.
    generator = generator_of(cfg.seed, n)
    indices = torch.randperm(len(prompts), generator=generator)[: cfg.batch // GROUP]
    texts = [prompts[i] for i in indices.repeat_interleave(GROUP).tolist()]
    shape = (cfg.batch, size.rows * size.columns, pipe.flux.config.in_channels)
    x_1 = torch.randn(shape, generator=generator).to(pipe.device)  # drawn on the CPU, alike on all devices
    samples, _ = build_samples(pipe, texts, size, [reward], noise=lambda i: x_1, generator=generator)
    # All draws of all methods make the same rollout, which costs more than most gradients.
    return samples._replace(velocity=compute_once(samples.velocity))


def samples_of_draw(batch: Samples, *key: int) -> Samples:
    """A batch in the draw of a key: the same x_1 in all draws, and a randomness of its own for all else."""
    x_1 = batch.noise(0)

    def noise(i: int) -> Tensor:
        if i == 0:
            return x_1
        return torch.randn(x_1.shape, generator=generator_of(*key, i)).to(x_1)

    return batch._replace(noise=noise, generator=generator_of(*key))


def compute_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of tensors, with the results kept by the values of the inputs."""
    results: dict[tuple[bytes, ...], Tensor] = {}

    def call(*inputs: Tensor) -> Tensor:
        # Tensors are compared by identity, so their bytes are the key.
        key = tuple(x.detach().cpu().numpy().tobytes() for x in inputs)
        if key not in results:
            results[key] = function(*inputs)
        return results[key]

    return call


# ------------------------------------------------------------------------------------ the numbers


def measure_methods(
    cfg: FidelityFlags, methods: dict[str, Callable], network: nn.Module, batches: list[Samples]
) -> dict[str, Any]:
    """All numbers of one model and T: of each method and layer a list with an entry per batch."""
    result: dict[str, Any] = dict(straightness=[], methods={spec: {} for spec in methods}, pairs=[])
    for n, batch in enumerate(batches):
        # Any key would do: the true gradient is a function of x_1 alone.
        true, _ = gradient_of_method(network, full, samples_of_draw(batch, cfg.seed, n))
        if not true["all"].norm() > 0:  # there is no direction to compare with
            raise ValueError(f"the true gradient of batch {n} is zero: all is above lambda; give a larger --batch")
        result["straightness"].append(path_bend(batch))
        for spec, method in methods.items():
            draws = []
            # Draws begin at 1: numpy makes the same random numbers of (seed, n, 0) and of (seed, n).
            for draw in range(1, cfg.draws + 1):
                samples = samples_of_draw(batch, cfg.seed, n, draw)
                gradient, _ = gradient_of_method(network, method, samples)
                draws.append(gradient)
            for layer in true:
                gradients = torch.stack([gradient[layer] for gradient in draws])
                numbers = result["methods"][spec].setdefault(layer, {})
                for name, value in compare_draws(gradients, true[layer]).items():
                    numbers.setdefault(name, []).append(value)
        result["pairs"].append(pairs_of_steps(network, batch, true["all"]))
        print(f"batch {n + 1} of {len(batches)}", flush=True)  # a batch takes minutes
    return result


def path_bend(batch: Samples) -> float:
    """Mean squared distance of the rollout's velocities from x_1 - x_0, which all of them are on straight paths."""
    ro = rollout(batch.velocity, batch.noise(0), batch.sigmas)
    straight = ro.x[0] - ro.x[-1]
    distance = (ro.v - straight).square().mean()
    return (distance / straight.square().mean()).item()  # relative: bases may have latents of other scales


def gradient_of_method(network: nn.Module, method: Callable, samples: Samples) -> tuple[Gradient, dict]:
    """A method's gradient in the weights, and what it logs."""
    network.zero_grad()  # methods add to .grad
    log = method(samples)
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        # A method that differentiates no step leaves no gradient: a vector of zeros keeps the layers aligned.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        layer = LAYERS.get(name.partition(".")[0], "embedders")
        layers.setdefault(layer, []).append(gradient.flatten())  # in the order of parameters, for all methods
    vectors = {layer: torch.cat(gradients) for layer, gradients in layers.items()}
    return {"all": torch.cat(list(vectors.values())), **vectors}, log


def compare_draws(draws: Tensor, true: Tensor) -> Numbers:
    """Cosine, norm, mean_cosine and spread (see above) of draws (p, n) of a gradient, p > 1; true (n,)."""
    draws, true = draws.double(), true.double()  # sums over a million entries
    mean = draws.mean(0)
    variance = (draws - mean).square().sum() / (len(draws) - 1)  # of a draw, summed over its entries
    # The squared length of the mean over infinitely many draws; its estimate can be negative.
    squared_length = (mean @ mean - variance / len(draws)).item()
    length = squared_length**0.5 if squared_length > 0 else np.nan
    return dict(
        cosine=float(np.mean([cosine_of(draw, true) for draw in draws])),
        norm=(draws.norm(dim=1).mean() / true.norm()).item(),
        mean_cosine=(mean @ true / true.norm()).item() / length,
        spread=variance.sqrt().item() / length,
    )


def cosine_of(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def pairs_of_steps(network: nn.Module, batch: Samples, true: Tensor) -> list[Numbers]:
    """Two leaps from every pair of steps, unweighted: k, j, the distances, and cosine and norm as in compare_draws."""
    pairs = []
    for k, j in itertools.combinations(batch.sigmas[:-1].tolist(), 2):
        # Between low and high there may be steps, but only this pair has the distance k - j.
        two_leaps = partial(leapalign, low=j, high=k, distance=k - j, weight="none")
        gradient, log = gradient_of_method(network, two_leaps, samples_of_draw(batch, 0))
        pair = dict(k=k, j=j, d_j=log["d_j"].mean().item(), d_0=log["d_0"].mean().item())
        pair["cosine"] = cosine_of(gradient["all"], true)
        pair["norm"] = (gradient["all"].norm() / true.norm()).item()
        pairs.append(pair)
    return pairs


if __name__ == "__main__":
    run_command(measure_fidelity, FidelityFlags, __doc__)
