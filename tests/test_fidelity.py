"""experiments.fidelity: estimators and gradients against closed forms, and a real measurement, small."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from config import Config as TrainConfig
from config import sides
from experiments import draw_fidelity, fidelity
from experiments.cells import opened
from experiments.draw_fidelity import TAU, trust
from experiments.fidelity import (
    Batch,
    Config,
    batch_of,
    compare,
    gradient_of,
    measure,
    once,
    places,
    samples_of,
    whole,
)
from formats.folders import load_pipeline
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Rollout, Samples, hinge, leapalign, pick_leaps, similarity_weight
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
    found = compare(mean + deviation * gaussian(1, 2000, size), g)
    length = np.hypot(1.0, 0.75)
    assert found["mean_cosine"] == pytest.approx(1.0 / length, abs=0.01)
    assert found["spread"] == pytest.approx(deviation * size**0.5 / length, rel=0.01)
    assert found["cosine"] == pytest.approx(1.0 / np.sqrt(length**2 + deviation**2 * size), rel=0.03)
    assert found["norm"] == pytest.approx(np.sqrt(length**2 + deviation**2 * size) / 2, rel=0.01)


def test_few_draws_of_an_unbiased_gradient_have_no_bias_on_average():
    """Not corrected, four draws as noisy as these would show a cosine of the mean of 0.9."""
    g = gaussian(2, 500)
    sets = g + gaussian(3, 400, 4, 500)
    assert np.mean([compare(draws, g)["mean_cosine"] for draws in sets]) == pytest.approx(1, abs=0.01)
    assert np.mean([compare(draws, g)["spread"] for draws in sets]) == pytest.approx(
        500**0.5 / g.norm().item(), rel=0.02
    )


def test_a_mean_that_the_draws_do_not_show_is_not_a_number():
    draws = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    found = compare(draws, torch.tensor([0.0, 1.0]))
    assert np.isnan(found["mean_cosine"]) and np.isnan(found["spread"]) and found["norm"] > 0


# --------------------------------------------------------------------------------- a linear velocity


class Linear(nn.Module):
    """v = a x + b, a number a channel each: every gradient has a closed form. Named as Flux' layers are."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))  # a
        self.final_layer = nn.Parameter(torch.tensor([0.2, 0.5], dtype=torch.float64))  # b

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.double_blocks * x + self.final_layer


def score(x0: Tensor) -> Tensor:
    return -x0.square().flatten(1).sum(1) / 2  # so the loss is |x_0|^2 / 2, and its slope x_0


def linear_batch(network: Linear) -> Batch:
    slope = once(lambda x0: x0 / len(x0))
    return Batch(SIGMAS, gaussian(5, B, N, C), once(torch.no_grad()(network)), network, slope, score)


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
    true = closed_form(network, batch.noise, steps, 1.0)
    measured, _ = gradient_of(network, fidelity.full, samples_of(batch, 0))
    torch.testing.assert_close(whole(measured), true)
    found = places(network, batch, measured)
    assert len(found) == T * (T - 1) // 2
    for (k, j), place in zip(itertools.combinations(range(T), 2), found, strict=True):
        ours = closed_form(network, batch.noise, leap_weights(k, j), 0.3)
        assert (place["k"], place["j"]) == (SIGMAS[k], SIGMAS[j])
        assert place["cosine"] == pytest.approx(angle(ours, true))
        assert place["norm"] == pytest.approx((ours.norm() / true.norm()).item())


def test_a_measurement_is_by_layer_and_the_true_gradient_is_its_own():
    network = Linear()
    batches = [linear_batch(network)] * 2
    last = lambda s: fidelity.full(s, last=1)  # noqa: E731
    found = measure(Config(draws=2), {"full": fidelity.full, "last": last}, network, batches)
    for layer in ("all", "double", "final"):
        numbers = found["methods"]["full"][layer]
        assert numbers["cosine"] == pytest.approx([1, 1]) and numbers["norm"] == pytest.approx([1, 1])
        assert numbers["mean_cosine"] == pytest.approx([1, 1]) and numbers["spread"] == pytest.approx([0, 0], abs=1e-6)
    x1 = batches[0].noise
    true = closed_form(network, x1, SIGMAS.diff().tolist(), 1.0)
    one = closed_form(network, x1, [0.0] * (T - 1) + [-SIGMAS[-2].item()], 1.0)
    assert found["methods"]["last"]["all"]["cosine"][0] == pytest.approx(angle(one, true))
    assert found["methods"]["last"]["double"]["cosine"][0] == pytest.approx(angle(one[:C], true[:C]))
    assert found["methods"]["last"]["final"]["cosine"][0] == pytest.approx(angle(one[C:], true[C:]))
    x = torch.stack(states(network, x1))
    v = x.diff(dim=0) / SIGMAS.diff()[:, None, None, None]
    bend = (v - (x[0] - x[-1])).square().mean() / (x[0] - x[-1]).square().mean()
    assert found["straightness"] == pytest.approx([bend.item()] * 2)


def test_a_true_gradient_of_zero_is_told():
    network = Linear()
    batch = linear_batch(network)._replace(slope=torch.zeros_like)
    with pytest.raises(ValueError, match=r"batch 0 is zero.*--batch"):
        measure(Config(), {"full": fidelity.full}, network, [batch])


@pytest.mark.parametrize("steps, shift", list(itertools.product((2, 5, 8, 25), (1, 3))))
def test_a_range_and_a_distance_name_one_pair_of_steps(steps, shift):
    levels = sigmas(dict(use_dynamic_shifting=False, shift=shift), steps, 16)
    values = levels.tolist()
    for k, j in itertools.combinations(range(steps), 2):
        pair = dict(low=values[j], high=values[k], distance=values[k] - values[j])
        assert pick_leaps(levels, torch.Generator(), **pair) == (k, j)


def test_what_is_remembered_is_computed_once():
    calls = []
    square = once(lambda x, sigma: calls.append(1) or x**2 + sigma)
    x = torch.tensor([1.0, 2.0])
    results = [square(x, s) for s in (torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0))]
    assert len(calls) == 2 and torch.equal(results[0], results[1]) and torch.equal(results[2], x**2 + 1)
    square(x + 1, torch.tensor(0.0))
    assert len(calls) == 3


def test_draws_share_their_noise_and_nothing_else():
    batch = linear_batch(Linear())
    one, two, again = (samples_of(batch, 0, 0, draw) for draw in (1, 2, 1))
    assert torch.equal(one.noise(0), two.noise(0)) and not torch.equal(one.noise(1), two.noise(1))
    assert torch.equal(one.noise(1), again.noise(1)) and not torch.equal(one.noise(1), one.noise(2))
    numbers = [torch.rand(3, generator=s.generator).tolist() for s in (one, two, again)]
    assert numbers[0] == numbers[2] != numbers[1]


# ---------------------------------------------------------------------------------- the tiny model


def test_a_weight_multiplies_each_samples_slope():
    batch, weight = linear_batch(Linear()), torch.arange(1.0, 1 + B, dtype=torch.float64)
    s = samples_of(batch, 0)
    torch.testing.assert_close(s.reward(batch.noise, weight), weight[:, None, None] * batch.noise / B)


def test_every_draw_in_every_batch_has_a_randomness_of_its_own():
    network, seen = Linear(), []

    def noted(s: Samples) -> dict:
        seen.append(s.generator.initial_seed())
        return fidelity.full(s)

    measure(Config(draws=3), {"noted": noted}, network, [linear_batch(network)] * 2)
    assert len(seen) == len(set(seen)) == 6


def test_the_table_has_the_rank_correlation_of_what_may_tell_and_the_cosine():
    places = [
        dict(d_j=d_j, d_0=d_0, cosine=c) for d_j, d_0, c in ((3, 4, 0.1), (2, 1, 0.2), (1, 2, 0.9), (0.5, 3, 0.95))
    ]
    base = dict(model="m", rollout_steps=5, places=[places, places])
    head, _, row = draw_fidelity.trust_table([base]).strip().splitlines()
    found = dict(zip(head.split(" | ")[1:], row.split(" | ")[1:]))
    assert found["-d_j"] == "1.000 ±0.000"  # in one order, though on no line
    assert found["-d_0"] == "0.200 ±0.000"  # 1 - 6 (0 + 4 + 0 + 4) / (4 x 15) of the ranks


def test_the_true_gradient_of_the_tiny_model_is_autograds_through_the_whole_rollout():
    cfg, steps, size = Config(batch=8), 3, sides(TrainConfig.size[0])
    pipe, prompts = load_pipeline(MODEL), read_prompts(TrainConfig.prompts)
    reward = replace(open_reward("tiny"), lam=0.0)  # which some of the samples have reached
    method, levels = opened("full", f"--rollout-steps {steps} --batch 8")
    batch = batch_of(cfg, pipe, reward, prompts, levels, 0)
    assert not torch.equal(batch.noise, batch_of(cfg, pipe, reward, prompts, levels, 1).noise)
    ours, _ = gradient_of(pipe.flux, method, samples_of(batch, 0, 0, 1))

    chosen = torch.randperm(len(prompts), generator=generator_of(0, 0))[:1].tolist()
    texts = [prompts[i] for i in chosen for _ in range(8)]
    velocity, x = velocity_of(pipe.flux, encode(pipe, texts), *token_grid(pipe, *size)), batch.noise
    for now, after in itertools.pairwise(levels):
        x = x + (after - now) * velocity(x, now)
    pipe.flux.zero_grad()
    scores = reward.score(decode(pipe, x, *size), texts)
    assert 0 < (scores > reward.lam).sum() < len(scores)
    hinge(scores, reward.lam).mean().backward()
    exact = torch.cat([p.grad.flatten() for p in pipe.flux.parameters()])
    assert {"embedders", "double", "single", "final"} == set(ours)
    assert sum(map(len, ours.values())) == len(exact)
    assert whole(ours).norm().item() == pytest.approx(exact.norm().item(), rel=1e-4)
    double = torch.cat([p.grad.flatten() for n, p in pipe.flux.named_parameters() if n.startswith("double_blocks")])
    torch.testing.assert_close(ours["double"], double, rtol=1e-3, atol=1e-5 * double.abs().max().item())


def test_a_small_measurement_writes_its_table_and_pictures(tmp_path, capsys):
    out = tmp_path / "fidelity.json"
    methods = ("full", "leapalign --alpha 1", "flow_grpo")
    fidelity.run(Config(methods=methods, rollout_steps=(2, 3), noises=2, draws=2, batch=8, out=out))
    result = json.loads(out.read_text())
    assert [base["rollout_steps"] for base in result["bases"]] == [2, 3]
    assert [len(base["places"][0]) for base in result["bases"]] == [1, 3]
    assert result["bases"][1]["evaluations"] == {"full": 12, "leapalign --alpha 1": 9, "flow_grpo": 9}
    assert result["bases"][1]["methods"]["full"]["all"]["cosine"] == pytest.approx([1, 1])
    assert "| full | 1.000 ±0.000 | 1.000 ±0.000 |" in out.with_suffix(".md").read_text()
    assert {f.name for f in tmp_path.iterdir()} == {
        "fidelity.json", "fidelity.md", "fidelity.png", "fidelity-places.png",
    }  # fmt: skip


def test_what_the_picture_calls_the_weight_of_eq_12_is_what_leapalign_weighs_with():
    ro = Rollout(gaussian(0, T + 1, B, N, C), gaussian(1, T, B, N, C), SIGMAS)
    for scale in (1.0, 0.05):  # distances near 1, and around tau, where some are clamped
        small = Rollout(ro.x * scale, ro.v * scale, ro.sigmas)
        weight, (d_j, d_0) = similarity_weight(small, (1, 3), TAU)
        torch.testing.assert_close(torch.tensor(trust(d_j.numpy(), d_0.numpy())["weight of Eq. 12"]), weight)


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
        fidelity.run(Config(**flags))


def test_leapaligns_two_steps_of_two_are_the_true_gradient_but_for_its_weight():
    """Of T = 2 there is one pair, its leaps are Euler's steps, and alpha 1 keeps the nested term whole."""
    network, levels = Linear(), torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    batch = linear_batch(network)._replace(levels=levels)
    true, _ = gradient_of(network, fidelity.full, samples_of(batch, 0))
    ours, _ = gradient_of(network, lambda s: leapalign(s, alpha=1.0, weight="none"), samples_of(batch, 0))
    torch.testing.assert_close(whole(ours), whole(true))
