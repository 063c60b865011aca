"""experiments.fidelity: estimators and gradients against closed forms, and a real measurement, small."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from config import Config as TrainConfig
from config import sides
from experiments import draw_fidelity, fidelity
from experiments.cells import load_method
from experiments.draw_fidelity import TAU, predictors
from experiments.fidelity import (
    FidelityFlags,
    build_batch,
    compare_draws,
    compute_once,
    gradient_of_method,
    measure_methods,
    pairs_of_steps,
    samples_of_draw,
)
from formats.folders import load_pipeline
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Rollout, Samples, hinge, leapalign, pick_leaps, similarity_weight, vjp_of
from rewards import open_reward
from sample import decode, encode, sigmas, token_grid, velocity_of
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


def test_every_pair_of_leaps_has_the_cosine_of_its_closed_form():
    network = Linear()
    batch, steps = linear_batch(network), SIGMAS.diff().tolist()
    x_1 = batch.noise(0)
    true = closed_form(network, x_1, steps, 1.0)
    measured, _ = gradient_of_method(network, fidelity.full, samples_of_draw(batch, 0))
    torch.testing.assert_close(measured["all"], true)
    pairs = pairs_of_steps(network, batch, measured["all"])
    assert len(pairs) == T * (T - 1) // 2
    for (k, j), pair in zip(itertools.combinations(range(T), 2), pairs, strict=True):
        leaps = closed_form(network, x_1, leap_weights(k, j), 0.3)
        assert (pair["k"], pair["j"]) == (SIGMAS[k], SIGMAS[j])
        assert pair["cosine"] == pytest.approx(angle(leaps, true))
        assert pair["norm"] == pytest.approx((leaps.norm() / true.norm()).item())


def test_a_measurement_is_by_layer_and_exact_for_the_true_gradient():
    network = Linear()
    batches = [linear_batch(network)] * 2
    last = partial(fidelity.full, last=1)
    result = measure_methods(FidelityFlags(draws=2), {"full": fidelity.full, "last": last}, network, batches)
    for layer in ("all", "double", "final"):
        numbers = result["methods"]["full"][layer]
        assert numbers["cosine"] == pytest.approx([1, 1]) and numbers["norm"] == pytest.approx([1, 1])
        assert numbers["mean_cosine"] == pytest.approx([1, 1]) and numbers["spread"] == pytest.approx([0, 0], abs=1e-6)
    x_1 = batches[0].noise(0)
    true = closed_form(network, x_1, SIGMAS.diff().tolist(), 1.0)
    last_step = closed_form(network, x_1, [0.0] * (T - 1) + [-SIGMAS[-2].item()], 1.0)
    cosines = {layer: numbers["cosine"][0] for layer, numbers in result["methods"]["last"].items()}
    assert cosines["all"] == pytest.approx(angle(last_step, true))
    assert cosines["double"] == pytest.approx(angle(last_step[:C], true[:C]))
    assert cosines["final"] == pytest.approx(angle(last_step[C:], true[C:]))
    x = torch.stack(states(network, x_1))
    v = x.diff(dim=0) / SIGMAS.diff()[:, None, None, None]
    bend = (v - (x[0] - x[-1])).square().mean() / (x[0] - x[-1]).square().mean()
    assert result["straightness"] == pytest.approx([bend.item()] * 2)


def test_a_true_gradient_of_zero_is_an_error():
    network = Linear()
    batch = linear_batch(network)._replace(reward=lambda x_0, weight=None: torch.zeros_like(x_0))
    with pytest.raises(ValueError, match=r"batch 0 is zero.*--batch"):
        measure_methods(FidelityFlags(), {"full": fidelity.full}, network, [batch])


@pytest.mark.parametrize("steps, shift", list(itertools.product((2, 5, 8, 25), (1, 3))))
def test_a_range_and_a_distance_name_one_pair_of_steps(steps, shift):
    levels = sigmas(dict(use_dynamic_shifting=False, shift=shift), steps, 16)
    values = levels.tolist()
    for k, j in itertools.combinations(range(steps), 2):
        pair = dict(low=values[j], high=values[k], distance=values[k] - values[j])
        assert pick_leaps(levels, torch.Generator(), **pair) == (k, j)


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
        return fidelity.full(s)

    measure_methods(FidelityFlags(draws=3), {"method": method}, network, [linear_batch(network)] * 2)
    assert len(seeds) == len(set(seeds)) == 6


def test_the_table_has_the_rank_correlation_of_each_predictor_and_the_cosine():
    pairs = []
    for d_j, d_0, cosine in ((3, 4, 0.1), (2, 1, 0.2), (1, 2, 0.9), (0.5, 3, 0.95)):
        pairs.append(dict(d_j=d_j, d_0=d_0, cosine=cosine))
    base = dict(model="m", rollout_steps=5, pairs=[pairs, pairs])
    head, _, row = draw_fidelity.predictors_table([base]).strip().splitlines()
    correlations = dict(zip(head.split(" | ")[1:], row.split(" | ")[1:]))
    assert correlations["-d_j"] == "1.000 ±0.000"  # in one order, though on no line
    assert correlations["-d_0"] == "0.200 ±0.000"  # 1 - 6 (0 + 4 + 0 + 4) / (4 x 15) of the ranks


# ---------------------------------------------------------------------------------- the tiny model


def test_the_true_gradient_of_the_tiny_model_is_autograds_through_the_whole_rollout():
    cfg, steps, image_size = FidelityFlags(batch=8), 3, sides(TrainConfig.size[0])
    pipe, prompts = load_pipeline(MODEL), read_prompts(TrainConfig.prompts)
    reward = replace(open_reward("tiny"), lam=0.0)  # which some of the samples have reached
    method, size = load_method("full", f"--rollout-steps {steps} --batch 8")
    batch = build_batch(cfg, pipe, size, reward, prompts, 0)
    assert not torch.equal(batch.noise(0), build_batch(cfg, pipe, size, reward, prompts, 1).noise(0))
    gradient, _ = gradient_of_method(pipe.flux, method, samples_of_draw(batch, 0, 0, 1))

    indices = torch.randperm(len(prompts), generator=generator_of(0, 0))[:1].tolist()
    texts = [prompts[i] for i in indices for _ in range(8)]
    velocity = velocity_of(pipe.flux, encode(pipe, texts), *token_grid(pipe, *image_size))
    x = batch.noise(0)
    for sigma, next_sigma in itertools.pairwise(size.sigmas):
        x = x + (next_sigma - sigma) * velocity(x, sigma)
    pipe.flux.zero_grad()
    scores = reward.score(decode(pipe, x, *image_size), texts)
    assert 0 < (scores > reward.lam).sum() < len(scores)
    hinge(scores, reward.lam).mean().backward()
    exact = torch.cat([p.grad.flatten() for p in pipe.flux.parameters()])
    assert {"all", "embedders", "double", "single", "final"} == set(gradient)
    assert len(gradient["all"]) == len(exact)
    assert gradient["all"].norm().item() == pytest.approx(exact.norm().item(), rel=1e-4)
    double = torch.cat([p.grad.flatten() for n, p in pipe.flux.named_parameters() if n.startswith("double_blocks")])
    torch.testing.assert_close(gradient["double"], double, rtol=1e-3, atol=1e-5 * double.abs().max().item())


def test_a_small_measurement_writes_its_table_and_pictures(tmp_path):
    results = tmp_path / "fidelity.json"
    methods = ("full", "leapalign --alpha 1", "flow_grpo")
    cfg = FidelityFlags(methods=methods, rollout_steps=(2, 3), noises=2, draws=2, batch=8, results=results)
    fidelity.measure_fidelity(cfg)
    two_steps, three_steps = json.loads(results.read_text())["bases"]
    assert (two_steps["rollout_steps"], three_steps["rollout_steps"]) == (2, 3)
    assert (len(two_steps["pairs"][0]), len(three_steps["pairs"][0])) == (1, 3)
    assert three_steps["evaluations"] == {"full": 12, "leapalign --alpha 1": 9, "flow_grpo": 9}
    assert three_steps["methods"]["full"]["all"]["cosine"] == pytest.approx([1, 1])
    assert "| full | 1.000 ±0.000 | 1.000 ±0.000 |" in results.with_suffix(".md").read_text()
    assert {f.name for f in tmp_path.iterdir()} == {
        "fidelity.json", "fidelity.md", "fidelity.png", "fidelity-pairs.png",
    }  # fmt: skip


def test_what_the_picture_calls_the_weight_of_eq_12_is_what_leapalign_weighs_with():
    ro = Rollout(gaussian(0, T + 1, B, N, C), gaussian(1, T, B, N, C), SIGMAS)
    for scale in (1.0, 0.05):  # distances near 1, and around tau, where some are clamped
        scaled = Rollout(ro.x * scale, ro.v * scale, ro.sigmas)
        weight, (d_j, d_0) = similarity_weight(scaled, (1, 3), TAU)
        torch.testing.assert_close(torch.tensor(predictors(d_j.numpy(), d_0.numpy())["weight of Eq. 12"]), weight)


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(draws=1), "--draws 1"),
        (dict(methods=()), "--methods"),
        (dict(rollout_steps=(0,)), "--rollout-steps"),
        (dict(methods=("flow_grpo --group 0",)), "--group 0"),
        (dict(batch=12), "--batch 12"),
        (dict(methods=("leapalign --rollout-steps 12",)), "--rollout-steps in"),
        (dict(reward="judge", methods=("full",)), "--reward judge has no gradient"),
        (dict(methods=("leapalign --anchor 1",)), "--anchor in"),
        (dict(methods=("flow_grpo --group 16",)), "--group 16 in"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        fidelity.measure_fidelity(FidelityFlags(**flags))


def test_leapaligns_two_steps_of_two_are_the_true_gradient_but_for_its_weight():
    """Of T = 2 there is one pair, its leaps are Euler's steps, and alpha 1 keeps the nested term whole."""
    network = Linear()
    samples = samples_of_draw(linear_batch(network, torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)), 0)
    true, _ = gradient_of_method(network, fidelity.full, samples)
    leaps, _ = gradient_of_method(network, partial(leapalign, alpha=1.0, weight="none"), samples)
    torch.testing.assert_close(leaps["all"], true["all"])
