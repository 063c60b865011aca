"""experiments.fidelity: estimators and gradients against closed forms, and a real measurement, small."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.direct import full
from config import Config as TrainConfig
from config import sides
from experiments import fidelity
from experiments.cells import load_method
from experiments.fidelity import (
    FidelityFlags,
    build_batch,
    compare_draws,
    compute_once,
    gradient_of_method,
    measure_methods,
    samples_of_draw,
)
from experiments.record import RESULTS
from formats.folders import load_pipeline
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Samples, hinge, leapalign, vjp_of
from rewards import open_reward
from sample import decode, encode, token_grid, velocity_of
from tests.test_leaps import SIGMAS, T, gaussian

B, N, C = 3, 4, 2
MODEL = TrainConfig().model


# ---------------------------------------------------------------------------------------- estimators


def test_bias_and_spread_of_draws_are_those_of_their_distribution():
    """Draws of c g + e + noise, e at right angles to g: mean_cosine is the angle of c g + e, spread its noise."""
    size, c, deviation = 400, 0.5, 0.3
    g = torch.zeros(size, dtype=torch.float64)
    g[0], mean = 2.0, torch.zeros(size, dtype=torch.float64)
    mean[0], mean[1] = c * 2.0, 0.75
    numbers = compare_draws(mean + deviation * gaussian(1, 2000, size), g)
    length = np.hypot(1.0, 0.75)
    assert numbers["mean_cosine"] == pytest.approx(1.0 / length, abs=0.01)
    assert numbers["spread"] == pytest.approx(deviation * size**0.5 / length, rel=0.01)
    assert numbers["cosine"] == pytest.approx(1.0 / np.sqrt(length**2 + deviation**2 * size), rel=0.03)
    assert numbers["norm"] == pytest.approx(np.sqrt(length**2 + deviation**2 * size) / 2, rel=0.01)


def test_few_draws_of_an_unbiased_gradient_have_no_bias_on_average():
    """Not corrected, four draws as noisy as these would show a cosine of the mean of 0.9."""
    g = gaussian(2, 500)
    sets = g + gaussian(3, 400, 4, 500)
    assert np.mean([compare_draws(draws, g)["mean_cosine"] for draws in sets]) == pytest.approx(1, abs=0.01)
    assert np.mean([compare_draws(draws, g)["spread"] for draws in sets]) == pytest.approx(
        500**0.5 / g.norm().item(), rel=0.02
    )


def test_a_mean_that_the_draws_do_not_show_is_not_a_number():
    draws = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    numbers = compare_draws(draws, torch.tensor([0.0, 1.0]))
    assert np.isnan(numbers["mean_cosine"]) and np.isnan(numbers["spread"]) and numbers["norm"] > 0


# --------------------------------------------------------------------------------- a linear velocity


class Linear(nn.Module):
    """v = a x + b, a number a channel each: every gradient has a closed form. Named as Flux' layers are."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))  # a
        self.final_layer = nn.Parameter(torch.tensor([0.2, 0.5], dtype=torch.float64))  # b

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.double_blocks * x + self.final_layer


def linear_batch(network: Linear, levels: Tensor = SIGMAS) -> Samples:
    """The loss is |x_0|^2 / 2, so its slope is x_0."""
    x_1 = gaussian(5, B, N, C)

    def reward(x_0: Tensor, weight: Tensor | None = None) -> Tensor:
        return x_0 / B if weight is None else weight[:, None, None] * x_0 / B

    return Samples(
        noise=lambda i: x_1,
        sigmas=levels,
        generator=torch.Generator(),
        velocity=compute_once(torch.no_grad()(network)),
        base=None,
        vjp=vjp_of(network),
        reward=reward,
        score=lambda x_0: -x_0.square().flatten(1).sum(1) / 2,
        total=B,
        update=0,
    )


def states(network: Linear, x1: Tensor) -> list[Tensor]:
    a, b = network.double_blocks.detach(), network.final_layer.detach()
    return list(itertools.accumulate(SIGMAS.diff(), lambda x, step: x + step * (a * x + b), initial=x1))


def closed_form(network: Linear, x1: Tensor, weights: list[float], alpha: float) -> Tensor:
    """Gradient of the mean of |x_0|^2 / 2 in (a, b) of a sum of steps with these weights, dx_0/dv.

    A step's input carries alpha of its gradient.  With Euler's weights and alpha 1 it is the true gradient.
    """
    a, x = network.double_blocks.detach(), states(network, x1)
    by_a, by_b = torch.zeros_like(x1), torch.zeros_like(a)
    for state, weight in zip(x, weights):  # d(x + w (a x + b)) = dx + w (x da + db + alpha a dx)
        by_a = by_a * (1 + alpha * a * weight) + weight * state
        by_b = by_b * (1 + alpha * a * weight) + weight
    return torch.cat([(x[-1] * by_a).sum((0, 1)) / B, (x[-1] * by_b).sum((0, 1)) / B])


def leap_weights(k: int, j: int) -> list[float]:
    weights = [0.0] * T
    weights[k], weights[j] = (SIGMAS[j] - SIGMAS[k]).item(), -SIGMAS[j].item()
    return weights


def angle(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_two_leaps_from_fixed_steps_have_the_cosine_of_their_closed_form():
    network = Linear()
    batch = linear_batch(network)
    x_1 = batch.noise(0)
    true = closed_form(network, x_1, SIGMAS.diff().tolist(), 1.0)
    for k, j in itertools.combinations(range(T), 2):
        # Between low and high there may be steps, but only this pair has the distance k - j.
        levels = dict(low=SIGMAS[j].item(), high=SIGMAS[k].item(), distance=(SIGMAS[k] - SIGMAS[j]).item())
        two_leaps = partial(leapalign, **levels, weight="none")
        result = measure_methods(FidelityFlags(draws=2), full, {"two": two_leaps}, network, [batch])
        leaps = closed_form(network, x_1, leap_weights(k, j), 0.3)
        assert result["two"]["cosine"] == [pytest.approx(angle(leaps, true))]
        assert result["two"]["norm"] == [pytest.approx((leaps.norm() / true.norm()).item())]


def test_a_measurement_is_exact_for_the_true_gradient_and_for_the_last_steps():
    network = Linear()
    batches = [linear_batch(network)] * 2
    methods = {"full": full, "last": partial(full, last=1)}
    result = measure_methods(FidelityFlags(draws=2), full, methods, network, batches)
    for name, expected in dict(cosine=1, norm=1, mean_cosine=1, spread=0).items():
        assert result["full"][name] == pytest.approx([expected] * 2, abs=1e-6)
    x_1 = batches[0].noise(0)
    true = closed_form(network, x_1, SIGMAS.diff().tolist(), 1.0)
    last_step = closed_form(network, x_1, [0.0] * (T - 1) + [-SIGMAS[-2].item()], 1.0)
    assert result["last"]["cosine"] == pytest.approx([angle(last_step, true)] * 2)


def test_a_true_gradient_of_zero_is_an_error():
    network = Linear()
    batch = linear_batch(network)._replace(reward=lambda x_0, weight=None: torch.zeros_like(x_0))
    with pytest.raises(ValueError, match=r"batch 0 is zero.*--batch"):
        measure_methods(FidelityFlags(), full, {"full": full}, network, [batch])


def test_a_function_is_computed_once_at_each_point():
    calls = []
    square = compute_once(lambda x, sigma: calls.append(1) or x**2 + sigma)
    x = torch.tensor([1.0, 2.0])
    results = [square(x, sigma) for sigma in (torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0))]
    assert len(calls) == 2 and torch.equal(results[0], results[1]) and torch.equal(results[2], x**2 + 1)
    square(x + 1, torch.tensor(0.0))
    assert len(calls) == 3


def test_draws_share_x_1_and_no_other_randomness():
    batch = linear_batch(Linear())
    first, second, repeated = (samples_of_draw(batch, 0, 0, draw) for draw in (1, 2, 1))
    assert torch.equal(first.noise(0), second.noise(0)) and not torch.equal(first.noise(1), second.noise(1))
    assert torch.equal(first.noise(1), repeated.noise(1)) and not torch.equal(first.noise(1), first.noise(2))
    numbers = [torch.rand(3, generator=s.generator).tolist() for s in (first, second, repeated)]
    assert numbers[0] == numbers[2] != numbers[1]


def test_every_draw_in_every_batch_has_a_randomness_of_its_own():
    network, seeds = Linear(), []

    def method(s: Samples) -> dict:
        seeds.append(s.generator.initial_seed())
        return full(s)

    measure_methods(FidelityFlags(draws=3), full, {"method": method}, network, [linear_batch(network)] * 2)
    assert len(seeds) == len(set(seeds)) == 6


def test_the_first_columns_of_the_shipped_table_are_made_of_the_shipped_numbers():
    shipped = json.loads((RESULTS / "fidelity.json").read_text())
    (base,) = shipped["bases"]
    methods = {spec: numbers["all"] for spec, numbers in base["methods"].items()}
    lines = fidelity.report_fidelity(shipped | dict(methods=methods, evaluations=base["evaluations"])).splitlines()
    shipped_lines = (RESULTS / "fidelity.md").read_text().splitlines()
    assert lines[0] == shipped_lines[0]
    for line in lines[4:]:
        *cells, evaluations, _ = line.split("|")
        (shipped_line,) = [row for row in shipped_lines if row.startswith("|".join(cells) + "|")]
        assert shipped_line.split("|")[-2] == evaluations
    assert len(lines) == 4 + len(methods)


# ---------------------------------------------------------------------------------- the tiny model


@pytest.mark.parametrize("guidance, detach", [(None, False), (2.0, False), (2.0, True)])
def test_the_true_gradient_of_the_tiny_model_is_autograds_through_the_whole_rollout(guidance, detach):
    cfg, steps, image_size = FidelityFlags(batch=8, guidance=guidance), 3, sides(TrainConfig.size[0])
    pipe, prompts = load_pipeline(MODEL), read_prompts(TrainConfig.prompts)
    reward = replace(open_reward("tiny"), lam=0.0)  # which some of the samples have reached
    method, size, *_ = load_method("full", f"--rollout-steps {steps} --batch 8")
    batch = build_batch(cfg, pipe, size, reward, 0, detach_negative=detach)
    assert not torch.equal(batch.noise(0), build_batch(cfg, pipe, size, reward, 1).noise(0))
    gradient = gradient_of_method(pipe.flux, method, samples_of_draw(batch, 0, 0, 1))

    indices = torch.randperm(len(prompts), generator=generator_of(0, 0))[:1].tolist()
    texts = [prompts[i] for i in indices for _ in range(8)]
    positive = velocity_of(pipe.flux, encode(pipe, texts), *token_grid(pipe, *image_size))
    negative = velocity_of(pipe.flux, encode(pipe, [""] * 8), *token_grid(pipe, *image_size))
    x = batch.noise(0)
    for sigma, next_sigma in itertools.pairwise(size.sigmas):
        velocity = positive(x, sigma)
        if guidance:
            # Detached, the negative branch is a constant: neither its weights nor its input have a gradient.
            without_prompt = negative(x, sigma).detach() if detach else negative(x, sigma)
            velocity = without_prompt + guidance * (velocity - without_prompt)
        x = x + (next_sigma - sigma) * velocity
    pipe.flux.zero_grad()
    scores = reward.score(decode(pipe, x, *image_size), texts)
    assert 0 < (scores > reward.lam).sum() < len(scores)
    hinge(scores, reward.lam).mean().backward()
    exact = torch.cat([p.grad.flatten() for p in pipe.flux.parameters()])
    assert gradient.norm().item() == pytest.approx(exact.norm().item(), rel=1e-4)
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


def test_rows_with_a_detached_negative_prompt_are_measured_against_the_whole_gradient(tmp_path):
    methods = ("full", "full --detach-negative")
    small = dict(methods=methods, rollout_steps=2, noises=1, draws=2, batch=8, results=tmp_path / "fidelity.json")
    fidelity.measure_fidelity(FidelityFlags(guidance=2.0, **small))
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert result["evaluations"] == {"full": 16, "full --detach-negative": 10}
    assert result["methods"]["full"]["cosine"] == [pytest.approx(1)]
    assert 0.5 < result["methods"]["full --detach-negative"]["cosine"][0] < 0.999
    with pytest.raises(ValueError, match="--detach-negative are for --guidance"):
        fidelity.measure_fidelity(FidelityFlags(**small))


def test_a_small_measurement_writes_its_table(tmp_path):
    results = tmp_path / "fidelity.json"
    methods = ("full", "leapalign --alpha 1", "flow_grpo")
    cfg = FidelityFlags(methods=methods, rollout_steps=2, noises=2, draws=2, batch=8, results=results)
    fidelity.measure_fidelity(cfg)
    result = json.loads(results.read_text())
    assert result["evaluations"] == {"full": 8, "leapalign --alpha 1": 8, "flow_grpo": 5}
    assert result["methods"]["full"]["cosine"] == pytest.approx([1, 1])
    assert "| full | 1.000 ±0.000 | 1.000 ±0.000 |" in results.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(draws=1), "--draws 1"),
        (dict(rollout_steps=0), "--rollout-steps"),
        (dict(methods=("flow_grpo --group 0",)), "--group 0"),
        (dict(batch=12), "--batch 12"),
        (dict(methods=("leapalign --rollout-steps 12",)), "--rollout-steps in"),
        (dict(reward="judge", methods=("full",)), "--reward judge has no gradient"),
        (dict(methods=("leapalign --anchor 1",)), "--anchor in"),
        (dict(methods=("flow_grpo --group 16",)), "--group 16"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        fidelity.measure_fidelity(FidelityFlags(**flags))


def test_leapaligns_two_steps_of_two_are_the_true_gradient_but_for_its_weight():
    """Of T = 2 there is one pair, its leaps are Euler's steps, and alpha 1 keeps the nested term whole."""
    network = Linear()
    samples = samples_of_draw(linear_batch(network, torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)), 0)
    true = gradient_of_method(network, full, samples)
    leaps = gradient_of_method(network, partial(leapalign, alpha=1.0, weight="none"), samples)
    torch.testing.assert_close(leaps, true)
