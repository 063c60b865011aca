"""baselines.py in float64: each gradient against autograd through its surrogate, written out as its paper has it.

The network is test_leaps' small MLP.  What a method draws is drawn again from the same seed, then written literally: a
loop over Euler steps with `.detach()` where the paper stops a gradient, a density of torch.distributions.
"""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import baselines
import train
from baselines import advantages, draw_pair, draw_steps, lagrange_weights, late_step, transition
from config import Config
from infra.distributed import copy_values, full_tensor, join
from infra.methods import find_method
from leaps import Samples, leap, leapalign, pick_leaps, rollout, similarity_weight, vjp_of
from start import prepare
from tests.processes import spread
from tests.test_leaps import SIGMAS, Constant, Field, T, flat_grad, gaussian, generator

B, N, C = 4, 3, 2
METHODS = ["leapalign", "refl", "draft_lv", "drtune", "full", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange",
           "flow_grpo", "dance_grpo", "mix_grpo"]  # fmt: skip


def noise(i: int) -> Tensor:
    return gaussian(100 + i, B, N, C)


def score(x0: Tensor) -> Tensor:
    """A reward that is nonlinear in x_0 and of its own for every sample, (b,)."""
    return (torch.sin(x0) * torch.arange(1, 1 + x0.numel()).view_as(x0) / 10).flatten(1).sum(1)


def samples(field, seed: int, update: int = 0) -> Samples:
    def reward(x0: Tensor, weight: Tensor | None = None) -> Tensor:
        x0 = x0.detach().requires_grad_()
        loss = -score(x0) * (1 if weight is None else weight)
        return torch.autograd.grad(loss.sum() / B, x0)[0]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            return field(x, sigma)

    return Samples(noise, SIGMAS, generator(seed), velocity, vjp_of(field), reward, score, B, update)


def gradient_of(method, field=None, seed: int = 0, update: int = 0, **options) -> Tensor:
    """The gradient that a method adds to a field's parameters."""
    field = field or Field()
    method(samples(field, seed, update), **options)
    return flat_grad(field)


def close(a: Tensor, b: Tensor) -> bool:
    return (a - b).norm() < 1e-11 * b.norm() and b.norm() > 1e-3


def times(v: Tensor, factor: float) -> Tensor:
    """v, with `factor` times its gradient."""
    return v.detach() + factor * (v - v.detach())


def steps_of(x: Tensor, field: Field, active, detach: bool, stop: int = T) -> Tensor:
    """Euler steps to level `stop`; velocities have a gradient at `active` steps, their inputs unless `detach`."""
    for i in range(stop):
        v = field(x.detach() if detach else x, SIGMAS[i])
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * (v if i in active else v.detach())
    return x


# ---------------------------------------------------------------------------------------------- leapalign, whole

OPTIONS = [{}, dict(leaps=1), dict(leaps=3), dict(alpha=1.0), dict(low=0.3), dict(high=0.7), dict(distance=0.4),
           dict(nested_only=True), dict(nested_only=True, leaps=3), dict(weight="d_j"), dict(weight="none"),
           dict(reward_input="xhat_0"), dict(reward_input="xhat_0", leaps=3)]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_leapalign_is_autograd_through_its_leaps_with_each_of_its_options_and_logs_what_they_were(options):
    plain = dict(alpha=0.3, tau=0.1, leaps=2, weight="both", low=0.0, high=1.0, distance=None, nested_only=False)
    o, field, xhat = plain | options, Field(), "reward_input" in options
    ro = rollout(field, noise(0), SIGMAS)
    for seed in range(4):
        picks = pick_leaps(SIGMAS, generator(seed), o["leaps"], o["low"], o["high"], o["distance"])
        w, d = similarity_weight(ro, picks, o["tau"], o["weight"])
        x0 = leap(field, ro, picks, o["alpha"], o["nested_only"])
        last = picks[-1]
        rewarded = ro.x[last] - SIGMAS[last] * ro.v[last] if xhat else ro.x[-1]
        (-(w * score(x0 - x0.detach() + rewarded)).mean()).backward()
        expected = flat_grad(field)
        assert close(gradient_of(leapalign, seed=seed, **options), expected)
        log = leapalign(samples(Field(), seed), **options)
        assert (log["k"], log["j"]) == (SIGMAS[picks[0]], SIGMAS[last])
        torch.testing.assert_close(log["d_0"], d[-1])
        torch.testing.assert_close(log["d_j"], sum(d[:-1]) / (len(d) - 1) if len(d) > 1 else torch.zeros_like(w))
        torch.testing.assert_close(log["w"], w)


# ------------------------------------------------------------------------------------- the paper's baselines


@pytest.mark.parametrize("seed", range(4))
def test_refl_is_one_step_and_its_prediction(seed):
    field, i = Field(), late_step(samples(Field(), seed))
    x = rollout(field, noise(0), SIGMAS).x[i]
    (-score(x - SIGMAS[i] * field(x, SIGMAS[i])).mean()).backward()
    assert close(gradient_of(baselines.refl, seed=seed), flat_grad(field))
    assert baselines.refl(samples(Field(), seed))["k"] == SIGMAS[i]


def test_refl_and_drtune_stop_at_one_of_the_last_eleven_of_twenty_five():
    sigmas = torch.linspace(1, 0, 26)
    found = {late_step(samples(Field(), seed)._replace(sigmas=sigmas)) for seed in range(200)}
    short = {late_step(samples(Field(), seed)._replace(sigmas=sigmas), last=2) for seed in range(50)}
    assert short == {23, 24} and late_step(samples(Field(), 0), last=99) in range(T)
    assert found == set(range(14, 25))
    for steps, window in ((8, 4), (12, 5)):  # of other T in proportion, rounded
        s = samples(Field(), 0)._replace(sigmas=torch.linspace(1, 0, steps + 1))
        assert {late_step(s) for _ in range(200)} == set(range(steps - window, steps))


def test_draft_lv_is_the_last_step_from_the_rollout_and_from_noised_copies_of_its_end():
    field = Field()
    ro, k = rollout(field, noise(0), SIGMAS), SIGMAS[-2]
    starts = [ro.x[-2], *((1 - k) * ro.x[-1] + k * noise(n) for n in (1, 2))]
    sum(-score(x - k * field(x, k)).mean() for x in starts).backward()
    assert close(gradient_of(baselines.draft_lv), flat_grad(field))


@pytest.mark.parametrize("seed", range(4))
def test_drtune_detaches_every_input_and_trains_equally_spaced_steps(seed):
    s = samples(Field(), seed)
    stop = late_step(s)
    first = int(torch.randint(T - T // 2, (), generator=s.generator))
    field, active = Field(), {first, first + T // 2}
    x = steps_of(noise(0), field, active, detach=True, stop=stop)
    v = field(x.detach(), SIGMAS[stop])
    x0 = x - SIGMAS[stop] * (v if stop in active else v.detach())
    (-score(x0).mean()).backward()
    assert close(gradient_of(baselines.drtune, seed=seed), flat_grad(field))


@pytest.mark.parametrize("active, steps", [(1, 25), (2, 25), (3, 25), (2, 2), (9, 2)])
def test_drtune_draws_its_steps_among_all_and_one_at_least_of_those_it_makes(active, steps):
    firsts, apart, reached = set(), steps // min(active, steps), False
    for seed in range(300):
        asked: list[int] = []

        def note(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False, asked: list[int] = asked) -> None:
            asked.insert(0, round((1 - sigma.item()) * steps))

        s = samples(Field(), seed)._replace(sigmas=torch.linspace(1, 0, steps + 1).double(), vjp=note)
        late = round((1 - baselines.drtune(s, active=active)["k"].item()) * steps)
        assert 1 <= len(asked) <= active and asked[-1] <= late
        assert all(b - a == apart for a, b in itertools.pairwise(asked))
        firsts.add(asked[0])
        reached |= asked[-1] == late
    assert reached
    if (active, steps) == (2, 25):
        assert firsts == set(range(13))


@pytest.mark.parametrize("last", [None, 1, 2, 9])
def test_full_is_backpropagation_and_its_last_steps_are_draft_k(last):
    field = Field()
    start = max(0, T - (last or T))
    x = rollout(field, noise(0), SIGMAS).x[start]
    for i in range(start, T):
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * field(x, SIGMAS[i])
    (-score(x).mean()).backward()
    assert close(gradient_of(baselines.full, last=last), flat_grad(field))


# --------------------------------------------------------------------------------------------------- FlowBP


def rescale(lengths: list[float], total: float, rho: float) -> float:
    return 1 + rho * (total / sum(lengths) - 1)


def dsigma(i: int) -> float:
    return (SIGMAS[i + 1] - SIGMAS[i]).item()


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_sparse_replaces_some_velocities_of_the_sum(rho):
    field, active = Field(), draw_steps(range(T), 3, 2.0, generator(3))
    ro, factor = rollout(field, noise(0), SIGMAS), rescale([-dsigma(i) for i in active], 1.0, rho)
    x0 = noise(0)
    for i in range(T):
        x0 = x0 + dsigma(i) * (times(field(ro.x[i], SIGMAS[i]), factor) if i in active else ro.v[i])
    (-score(x0).mean()).backward()
    assert close(gradient_of(baselines.flowbp_sparse, seed=3, rho=rho), flat_grad(field))


@pytest.mark.parametrize("seed, active", [*((seed, 4) for seed in range(5)), (3, 2)])  # with 2, j is the second step
def test_bridge_keeps_one_nested_term(seed, active, alpha=0.3):
    g, field = generator(seed), Field()
    j = max(pick_leaps(SIGMAS, g))
    before = min(max(round(active * j / T), 1), active - 1)
    first = draw_steps(range(j), before, 2.0, g)
    second = draw_steps(range(j + 1, T), active - before - 1, 2.0, g)
    chosen = {*first, j, *second}
    ro, factor = rollout(field, noise(0), SIGMAS), rescale([-dsigma(i) for i in chosen], 1.0, 1.0)

    def velocity(i: int, x: Tensor) -> Tensor:
        return times(field(x, SIGMAS[i]), factor) if i in chosen else ro.v[i]

    x_j = noise(0) + sum(dsigma(i) * velocity(i, ro.x[i]) for i in range(j))
    x0 = x_j + dsigma(j) * velocity(j, alpha * x_j + (1 - alpha) * x_j.detach())
    x0 = x0 + sum(dsigma(i) * velocity(i, ro.x[i]) for i in range(j + 1, T))
    (-score(x0).mean()).backward()
    assert close(gradient_of(baselines.flowbp_bridge, seed=seed, alpha=alpha, active=active), flat_grad(field))


def integral(nodes: list[int], i: int, start: float, end: float) -> float:
    """Of the Lagrange polynomial that is one at node i, by numpy."""
    at = SIGMAS[nodes].numpy()
    basis = Polynomial([1.0])
    for other in np.delete(at, i):
        basis *= Polynomial([-other, 1.0]) / (at[i] - other)
    return basis.integ()(end) - basis.integ()(start)


@pytest.mark.parametrize("seed", range(5))
def test_lagrange_integrates_the_polynomial_through_cached_velocities(seed, alpha=0.3, tau=0.05, rho=0.5):
    field, (k, j) = Field(), draw_pair(SIGMAS, generator(seed), "dirichlet")
    ro = rollout(field, noise(0), SIGMAS)
    x, distances = ro.x[k], []
    for start, end in ((k, j), (j, T)):
        nodes = np.linspace(start, end - 1, min(3, end - start)).round().astype(int).tolist()
        weights = [integral(nodes, i, SIGMAS[start].item(), SIGMAS[end].item()) for i in range(len(nodes))]
        factor = rescale([abs(w) for w in weights[:2]], sum(map(abs, weights)), rho)
        inputs = [alpha * x + (1 - alpha) * x.detach(), *(ro.x[i] for i in nodes[1:])]
        parts = (1.0, 0.25, 0.0)
        landed = x + sum(
            weight * times(field(at, SIGMAS[i]), factor * part)
            for i, at, weight, part in zip(nodes, inputs, weights, parts)
        )
        distances.append((ro.x[end] - landed.detach()).abs().flatten(1).mean(1))
        x = ro.x[end] + landed - landed.detach()
    w = 1 / (distances[0].clamp(min=tau) + distances[1].clamp(min=tau))
    (-(w * score(x)).mean()).backward()
    log = baselines.flowbp_lagrange(samples(Field(), seed), alpha=alpha, tau=tau, rho=rho)
    assert (log["k"], log["j"]) == (SIGMAS[k], SIGMAS[j])
    for name, value in dict(d_j=distances[0], d_0=distances[1], w=w).items():
        torch.testing.assert_close(log[name], value)
    options = dict(alpha=alpha, tau=tau, rho=rho)
    assert close(gradient_of(baselines.flowbp_lagrange, seed=seed, **options), flat_grad(field))


def test_lagrange_weights_are_exact_for_polynomials_of_as_many_terms_as_nodes():
    nodes = SIGMAS[[0, 2, 3]]
    for power in range(3):
        exact = (SIGMAS[4] ** (power + 1) - 1) / (power + 1)
        assert (lagrange_weights(nodes, SIGMAS[0], SIGMAS[4]) * nodes**power).sum() == pytest.approx(
            exact.item(), abs=1e-12
        )


def test_late_steps_are_drawn_more_often_with_odds_that_grow_as_the_square():
    draws = torch.bincount(torch.tensor([draw_steps(range(3, 7), 1, 2.0, generator(i))[0] - 3 for i in range(3000)]))
    expected = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    assert (draws / 3000 - expected).abs().max() < 0.03


def test_the_ways_of_drawing_k_and_j_are_as_described():
    sigmas = torch.linspace(1, 0, 26)
    drawn = {how: [draw_pair(sigmas, generator(i), how) for i in range(400)] for how in ("midpoint", "midpoint_j")}
    assert {k for k, _ in drawn["midpoint"]} == set(range(24))
    assert all(j == k + (25 - k) // 2 for k, j in drawn["midpoint"])
    assert {j for _, j in drawn["midpoint_j"]} == set(range(1, 25))
    assert all(k == j // 2 for k, j in drawn["midpoint_j"])
    assert draw_pair(sigmas, generator(5), "uniform") == pick_leaps(sigmas, generator(5))


@pytest.mark.parametrize("steps", [3, 4, 12, 25])
def test_a_dirichlet_draw_cuts_the_steps_as_numpys_dirichlet_does(steps):
    sigmas = torch.linspace(1, 0, steps + 1)
    pairs = np.array([draw_pair(sigmas, generator(i), "dirichlet") for i in range(2000)])
    lengths = np.stack([pairs[:, 0] + 1, pairs[:, 1] - pairs[:, 0], steps - 1 - pairs[:, 1]], 1)
    assert lengths.min() == 1 and pairs.min() == 0
    shares = np.random.default_rng(0).dirichlet((2, 6, 2.5), 2000)
    expected = np.maximum(1, np.round(steps * shares[:, [0, 2]]))  # the outer two; the middle one is mostly the longest
    if steps > 4:
        np.testing.assert_allclose(lengths[:, [0, 2]].mean(0), expected.mean(0), atol=0.06 * steps**0.5)
        np.testing.assert_allclose(lengths[:, [0, 2]].std(0), expected.std(0), atol=0.06 * steps**0.5)


# ------------------------------------------------------------------------------------------------ identities


def test_leaps_over_every_step_without_nesting_are_drtune_that_trains_every_step():
    seed = next(i for i in range(50) if late_step(samples(Field(), i)) == T - 1)
    every = gradient_of(leapalign, leaps=T, alpha=0.0, weight="none")
    assert close(gradient_of(baselines.drtune, seed=seed, active=T), every)
    assert close(gradient_of(baselines.flowbp_sparse, active=T), every)  # and Sparse with every step active


def test_one_leap_from_the_last_step_is_draft_1():
    low = SIGMAS[-2].item()
    one = gradient_of(leapalign, leaps=1, low=low, high=low, weight="none")
    assert close(one, gradient_of(baselines.full, last=1))
    assert close(one, gradient_of(baselines.draft_lv, copies=0))


def test_lagrange_through_one_node_is_leapalign():
    one = gradient_of(baselines.flowbp_lagrange, draw="uniform", nodes=1, seed=2, alpha=0.3, tau=0.1)
    assert close(one, gradient_of(leapalign, seed=2))


def test_on_a_straight_field_a_polynomial_lands_where_a_leap_does():
    log = baselines.flowbp_lagrange(samples(Constant(), 0), nodes=2)
    assert max(log["d_j"].max(), log["d_0"].max()) < 1e-14


# ------------------------------------------------------------------------------------------ policy gradients


def flow_density(x: Tensor, v: Tensor, i: int) -> torch.distributions.Normal:
    """A step of Flow-GRPO, as its paper has it."""
    sigma, delta = SIGMAS[i].item(), dsigma(i)
    s = 0.7 * (sigma / (1 - (sigma if sigma < 1 else SIGMAS[1].item()))) ** 0.5
    mean = x * (1 + s**2 / (2 * sigma) * delta) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * delta
    return torch.distributions.Normal(mean, s * (-delta) ** 0.5)


def dance_density(x: Tensor, v: Tensor, i: int) -> torch.distributions.Normal:
    """A step of DanceGRPO, as its paper has it."""
    sigma, delta, eta = SIGMAS[i].item(), dsigma(i), 0.3
    x0 = x - sigma * v
    score_of_x = -(x - (1 - sigma) * x0) / sigma**2
    return torch.distributions.Normal(x + delta * v - 0.5 * eta**2 * score_of_x * delta, eta * (-delta) ** 0.5)


@pytest.mark.parametrize(
    "method, density, random, shared, update",
    [
        (baselines.flow_grpo, flow_density, range(T - 1), False, 0),
        (baselines.dance_grpo, dance_density, range(T - 1), True, 0),
        (baselines.mix_grpo, dance_density, range(2), True, 24),
        (baselines.mix_grpo, dance_density, range(1, 3), True, 25),
        (baselines.mix_grpo, dance_density, range(2, 4), True, 1000),
    ],
)
def test_a_policy_gradient_is_that_of_the_clipped_ratio_times_the_advantage(method, density, random, shared, update):
    field, group = Field(), 2
    x = noise(0)[::group].repeat_interleave(group, 0) if shared else noise(0)
    logp = []
    for i in range(T):
        v = field(x, SIGMAS[i])
        if i in random:
            step = density(x, v, i)
            after = (step.mean + step.stddev * noise(i + 1)).detach()
            logp.append(step.log_prob(after).flatten(1).mean(1))
            x = after
        else:
            x = (x + dsigma(i) * v).detach()
    of_group = score(x).view(-1, group)
    a = ((of_group - of_group.mean(1, keepdim=True)) / (of_group.std(1, keepdim=True) + 1e-6)).flatten()
    ratio = (torch.stack(logp) - torch.stack(logp).detach()).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))  # at the first update of a rollout
    (-torch.minimum(ratio * a, ratio.clamp(1 - 1e-4, 1 + 1e-4) * a).mean()).backward()
    options = dict(window=2) if method is baselines.mix_grpo else {}
    assert close(gradient_of(method, update=update, group=group, **options), flat_grad(field))


@pytest.mark.parametrize("level", ["flow", "dance"])
def test_random_steps_have_the_marginals_of_the_ode(level, mean0=0.7, std0=0.4, steps=4000):
    """Gaussian data has a linear velocity, so means and variances are propagated exactly, step by step."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for i in range(round(0.7 * steps)):
        t, delta = sigmas[i], sigmas[i + 1] - sigmas[i]
        inside = t.clamp(max=sigmas[1])
        s = 0.7 * (inside / (1 - inside)).sqrt() if level == "flow" else torch.tensor(0.3).double()
        slope = (t - (1 - t) * std0**2) / ((1 - t) ** 2 * std0**2 + t**2)
        at = [transition(x, -mean0 + slope * (x - (1 - t) * mean0), t, delta, s) for x in (mean, mean + 1)]
        mean, variance = at[0][0], (at[1][0] - at[0][0]) ** 2 * variance + at[0][1] ** 2
    t = sigmas[round(0.7 * steps)]
    assert mean.item() == pytest.approx((1 - t.item()) * mean0, abs=2e-3)
    assert variance.item() == pytest.approx((1 - t.item()) ** 2 * std0**2 + t.item() ** 2, rel=5e-3)


def test_without_noise_a_random_step_is_the_euler_step():
    x, v = noise(0), noise(1)
    mean, std, by_v = transition(x, v, SIGMAS[1], SIGMAS[2] - SIGMAS[1], torch.zeros(()).double())
    assert std == 0 and by_v == SIGMAS[2] - SIGMAS[1]
    torch.testing.assert_close(mean, x + by_v * v, rtol=0, atol=1e-15)


def test_advantages_of_a_group_have_mean_zero_and_deviation_one_whatever_the_scale():
    scores = torch.cat([gaussian(0, 8), 100 + 50 * gaussian(1, 8)])
    a = advantages(scores, 8).view(2, 8)
    assert a.mean(1).abs().max() < 1e-6 and (a.std(1) - 1).abs().max() < 1e-5
    assert advantages(torch.ones(4), 2).abs().max() == 0  # nothing to learn where all are alike
    outlier = torch.zeros(64)
    outlier[3] = 1.0
    assert advantages(outlier, 64).max() == 5.0
    for group in (1, 3):
        with pytest.raises(ValueError, match=f"groups of {group}"):
            advantages(scores, group)


# ----------------------------------------------------------------------------------------------- on the tiny Flux


def moved(cfg: Config) -> dict[str, Tensor]:
    """What an update by each method changes of the trained weights."""
    result = {}
    with join("cpu") as world:
        setup = prepare(cfg, world)
        weights = [p for p in setup.pipe.flux.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in weights]
        for name in METHODS:
            options = dict(group=2) if "grpo" in name else {}
            options |= dict(window=2) if name == "mix_grpo" else {}  # or it would be DanceGRPO in so few steps
            setup = replace(setup, method=partial(find_method(name), **options), group=options.get("group", 1))
            run = train.State(setup.pipe.flux, cfg.lr, cfg.weight_decay)
            entry = train.update(cfg, setup, world, run, 0)
            assert entry["grad_norm"] > 0 and entry["backwards"] > 0 and np.isfinite(entry["reward"])
            result[name] = torch.cat([full_tensor(p.detach() - b).flatten() for p, b in zip(weights, before)])
            copy_values(before, weights)
    return result


@pytest.mark.parametrize("lora", [None, 4])
def test_every_method_trains_alike_on_one_rank_and_on_two_with_micro_batches(lora):
    # Rates so small that Adam's first steps do not turn rounding into other signs of small gradients.
    cfg = Config(out=Path("nonexistent"), batch=4, rollout_steps=4, lora=lora, lr=1e-6, clip=1e9)
    (one,) = spread(1, moved, cfg)
    for two in spread(2, moved, replace(cfg, rollout_batch=2, micro_batch=1)):
        for name in METHODS:
            assert one[name].norm() > 0 and (two[name] - one[name]).norm() < 0.05 * one[name].norm(), name
    for a, b in itertools.combinations(METHODS, 2):
        assert (one[a] - one[b]).norm() > 0.05 * one[a].norm(), (a, b)
