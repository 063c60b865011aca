"""baselines.py in float64: each gradient against autograd through its surrogate, written out as its paper states it.

The network is test_leaps' small MLP.  What a method draws is drawn again from the same seed, then written literally: a
loop over Euler steps with `.detach()` where the paper stops a gradient, a density of torch.distributions.
"""

import itertools
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

import train
from baselines import direct, policy
from baselines.direct import Log, draw_pair, draw_steps, lagrange_weights, late_step
from baselines.policy import advantages, transition
from config import Config
from infra.distributed import copy_values, full_tensor, join
from infra.methods import find_method
from leaps import Samples, leap, leapalign, pick_leaps, rollout, similarity_weight, vjp_of
from tests.processes import spread
from tests.test_leaps import SIGMAS, Constant, Field, T, flat_grad, gaussian, generator

B, N, C = 4, 3, 2
METHODS = [
    *("leapalign", "refl", "draft_lv", "drtune", "full"),
    *("flowbp_sparse", "flowbp_bridge", "flowbp_lagrange"),
    *("flow_grpo", "dance_grpo", "mix_grpo"),
]
DSIGMA = SIGMAS.diff().tolist()


def noise(i: int) -> Tensor:
    return gaussian(100 + i, B, N, C)


def score(x_0: Tensor) -> Tensor:
    """A reward that is nonlinear in x_0 and differs between samples, (b,)."""
    factors = torch.arange(1, 1 + x_0.numel()).view_as(x_0) / 10
    return (torch.sin(x_0) * factors).flatten(1).sum(1)


def samples(field: nn.Module, seed: int, update: int = 0, sigmas: Tensor = SIGMAS) -> Samples:
    def reward(x_0: Tensor, weight: Tensor | None = None) -> Tensor:
        x_0 = x_0.detach().requires_grad_()
        loss = -score(x_0)
        if weight is not None:
            loss = weight * loss
        (grad,) = torch.autograd.grad(loss.sum() / B, x_0)
        return grad

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return field(x, sigma)

    return Samples(
        noise=noise,
        sigmas=sigmas,
        generator=generator(seed),
        velocity=velocity,
        base=None,
        vjp=vjp_of(field),
        reward=reward,
        score=score,
        total=B,
        update=update,
    )


def log_of(method: Callable[..., Log], seed: int = 0, **options) -> Log:
    return method(samples(Field(), seed), **options)


def gradient_of(method: Callable[..., Log], seed: int = 0, update: int = 0, **options) -> Tensor:
    """The gradient that a method adds to the field's parameters."""
    field = Field()
    method(samples(field, seed, update), **options)
    return flat_grad(field)


def autograd_of(loss: Tensor, field: Field) -> Tensor:
    loss.backward()
    return flat_grad(field)


def close(gradient: Tensor, expected: Tensor) -> bool:
    assert expected.norm() > 1e-3
    return (gradient - expected).norm() < 1e-11 * expected.norm()


def scale_gradient(v: Tensor, factor: float) -> Tensor:
    """v, with `factor` times its gradient."""
    return v.detach() + factor * (v - v.detach())


# ---------------------------------------------------------------------------------------------- leapalign

OPTIONS = [
    *({}, dict(leaps=1), dict(leaps=3), dict(alpha=1.0)),
    *(dict(low=0.3), dict(high=0.7), dict(distance=0.4)),
    *(dict(nested_only=True), dict(nested_only=True, leaps=3)),
    *(dict(weight="d_j"), dict(weight="none")),
    *(dict(reward_input="xhat_0"), dict(reward_input="xhat_0", leaps=3)),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_leapalign_is_autograd_through_its_leaps_and_logs_them(options, seed):
    o = dict(alpha=0.3, tau=0.1, leaps=2, weight="both", low=0.0, high=1.0, distance=None, nested_only=False)
    o |= options
    field = Field()
    ro = rollout(field, noise(0), SIGMAS)
    picks = pick_leaps(SIGMAS, generator(seed), o["leaps"], o["low"], o["high"], o["distance"])
    w, d = similarity_weight(ro, picks, o["tau"], o["weight"])

    x_0 = leap(field, ro, picks, o["alpha"], o["nested_only"])
    last = picks[-1]
    if "reward_input" in options:
        xhat_0 = ro.x[last] - SIGMAS[last] * ro.v[last]
        x_0 = x_0 - x_0.detach() + xhat_0
    expected = autograd_of(-(w * score(x_0)).mean(), field)
    assert close(gradient_of(leapalign, seed, **options), expected)

    log = log_of(leapalign, seed, **options)
    assert log["k"] == SIGMAS[picks[0]]
    assert log["j"] == SIGMAS[last]
    torch.testing.assert_close(log["w"], w)
    torch.testing.assert_close(log["d_0"], d[-1])
    d_j = d[:-1].mean(0) if len(d) > 1 else torch.zeros_like(w)
    torch.testing.assert_close(log["d_j"], d_j)


# ------------------------------------------------------------- the baselines of LeapAlign's paper


@pytest.mark.parametrize("seed", range(4))
def test_refl_is_one_step_and_its_prediction(seed):
    field = Field()
    i = late_step(samples(field, seed))
    x = rollout(field, noise(0), SIGMAS).x[i]
    xhat_0 = x - SIGMAS[i] * field(x, SIGMAS[i])
    expected = autograd_of(-score(xhat_0).mean(), field)
    assert close(gradient_of(direct.refl, seed), expected)
    assert log_of(direct.refl, seed)["k"] == SIGMAS[i]


def test_a_late_step_is_one_of_the_last_eleven_of_twenty_five():
    s = samples(Field(), 0, sigmas=torch.linspace(1, 0, 26))
    assert {late_step(s) for _ in range(200)} == set(range(14, 25))
    assert {late_step(s, last=2) for _ in range(50)} == {23, 24}
    assert {late_step(s, last=99) for _ in range(400)} == set(range(25))


@pytest.mark.parametrize("steps, window", [(8, 4), (12, 5)])
def test_of_other_rollouts_a_late_step_is_one_of_as_many_in_proportion(steps, window):
    s = samples(Field(), 0, sigmas=torch.linspace(1, 0, steps + 1))
    assert {late_step(s) for _ in range(200)} == set(range(steps - window, steps))


def test_draft_lv_is_the_last_step_from_the_rollout_and_from_noised_copies_of_its_end():
    field, k = Field(), SIGMAS[-2]
    ro = rollout(field, noise(0), SIGMAS)
    loss = 0.0
    for x in (ro.x[-2], (1 - k) * ro.x[-1] + k * noise(1), (1 - k) * ro.x[-1] + k * noise(2)):
        x_0 = x - k * field(x, k)
        loss = loss - score(x_0).mean()
    assert close(gradient_of(direct.draft_lv), autograd_of(loss, field))


@pytest.mark.parametrize("seed", range(4))
def test_drtune_detaches_every_input_and_trains_equally_spaced_steps(seed):
    field = Field()
    s = samples(field, seed)
    stop = late_step(s)
    offset = int(torch.randint(T - T // 2, (), generator=s.generator))
    active = {offset, offset + T // 2}

    x = noise(0)
    for i in range(stop + 1):
        v = field(x.detach(), SIGMAS[i])
        dsigma = -SIGMAS[i] if i == stop else DSIGMA[i]
        x = x + dsigma * (v if i in active else v.detach())
    assert close(gradient_of(direct.drtune, seed), autograd_of(-score(x).mean(), field))


@pytest.mark.parametrize("active, steps", [(1, 25), (2, 25), (3, 25), (2, 2), (9, 2)])
def test_drtune_draws_equally_spaced_steps_one_of_them_before_the_stop(active, steps):
    sigmas = torch.linspace(1, 0, steps + 1).double()
    spacing = steps // min(active, steps)
    first_steps, stop_was_active = set(), False
    for seed in range(300):
        active_steps: list[int] = []

        def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False, log: list[int] = active_steps) -> None:
            log.insert(0, step_at(sigma))  # the sweep goes backwards

        def step_at(sigma: Tensor) -> int:
            return round((1 - sigma.item()) * steps)

        s = samples(Field(), seed, sigmas=sigmas)._replace(vjp=vjp)
        stop = step_at(direct.drtune(s, active=active)["k"])
        assert 1 <= len(active_steps) <= active
        assert active_steps[-1] <= stop
        assert all(j - i == spacing for i, j in itertools.pairwise(active_steps))
        first_steps.add(active_steps[0])
        stop_was_active |= active_steps[-1] == stop
    assert stop_was_active
    if (active, steps) == (2, 25):
        assert first_steps == set(range(13))


@pytest.mark.parametrize("last", [None, 1, 2, 9])
def test_full_is_backpropagation_and_its_last_steps_are_draft_k(last):
    field = Field()
    start = max(0, T - (last or T))
    x = rollout(field, noise(0), SIGMAS).x[start]
    for i in range(start, T):
        x = x + DSIGMA[i] * field(x, SIGMAS[i])
    assert close(gradient_of(direct.full, last=last), autograd_of(-score(x).mean(), field))


# --------------------------------------------------------------------------------------------------- FlowBP


def rescaling(weights: list[float], total: float, rho: float) -> float:
    return 1 + rho * (total / sum(map(abs, weights)) - 1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_sparse_is_the_euler_sum_with_gradient_at_some_steps(rho):
    field = Field()
    ro = rollout(field, noise(0), SIGMAS)
    active = draw_steps(range(T), 3, 2.0, generator(3))
    factor = rescaling([DSIGMA[i] for i in active], 1.0, rho)

    x_0 = noise(0)
    for i in range(T):
        v = scale_gradient(field(ro.x[i], SIGMAS[i]), factor) if i in active else ro.v[i]
        x_0 = x_0 + DSIGMA[i] * v
    expected = autograd_of(-score(x_0).mean(), field)
    assert close(gradient_of(direct.flowbp_sparse, seed=3, rho=rho), expected)


@pytest.mark.parametrize("seed, active", [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (3, 2)])
def test_bridge_keeps_one_nested_term(seed, active, alpha=0.3):
    random = generator(seed)
    _, bridge = pick_leaps(SIGMAS, random)
    noisy_count = min(max(round(active * bridge / T), 1), active - 1)
    noisy_steps = draw_steps(range(bridge), noisy_count, 2.0, random)
    clean_steps = draw_steps(range(bridge + 1, T), active - noisy_count - 1, 2.0, random)
    active_steps = {*noisy_steps, bridge, *clean_steps}
    factor = rescaling([DSIGMA[i] for i in active_steps], 1.0, rho=1.0)

    field = Field()
    ro = rollout(field, noise(0), SIGMAS)
    x = noise(0)
    for i in range(T):
        v = ro.v[i]
        if i in active_steps:
            start = scale_gradient(x, alpha) if i == bridge else ro.x[i]
            v = scale_gradient(field(start, SIGMAS[i]), factor)
        x = x + DSIGMA[i] * v
    expected = autograd_of(-score(x).mean(), field)
    assert close(gradient_of(direct.flowbp_bridge, seed, alpha=alpha, active=active), expected)


def integral(nodes: list[int], i: int, start: float, end: float) -> float:
    """The integral, by numpy, of the Lagrange polynomial that is 1 at node i and 0 at the others."""
    levels = SIGMAS[nodes].tolist()
    basis = Polynomial([1.0])
    for level in np.delete(levels, i):
        basis *= Polynomial([-level, 1.0]) / (levels[i] - level)
    return basis.integ()(end) - basis.integ()(start)


@pytest.mark.parametrize("seed", range(5))
def test_lagrange_integrates_the_polynomial_through_cached_velocities(seed, alpha=0.3, tau=0.05, rho=0.5):
    field = Field()
    ro = rollout(field, noise(0), SIGMAS)
    first, second = draw_pair(SIGMAS, generator(seed), "dirichlet")
    x, distances = ro.x[first], []
    for start, end in ((first, second), (second, T)):
        nodes = np.linspace(start, end - 1, min(3, end - start)).round().astype(int).tolist()
        ends = SIGMAS[start].item(), SIGMAS[end].item()
        weights = [integral(nodes, i, *ends) for i in range(len(nodes))]
        total = sum(map(abs, weights))
        factor = rescaling(weights[:2], total, rho)
        shares = [factor, factor / 4, 0.0]  # of the gradient of each velocity

        xhat = x
        for node, weight, share in zip(nodes, weights, shares):
            start_x = scale_gradient(x, alpha) if node == start else ro.x[node]
            xhat = xhat + weight * scale_gradient(field(start_x, SIGMAS[node]), share)
        gap = ro.x[end] - xhat.detach()
        distances.append(gap.abs().flatten(1).mean(1))
        x = ro.x[end] + xhat - xhat.detach()

    d_j, d_0 = distances
    w = 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))
    expected = autograd_of(-(w * score(x)).mean(), field)
    options = dict(alpha=alpha, tau=tau, rho=rho)
    assert close(gradient_of(direct.flowbp_lagrange, seed, **options), expected)

    log = log_of(direct.flowbp_lagrange, seed, **options)
    assert (log["k"], log["j"]) == (SIGMAS[first], SIGMAS[second])
    torch.testing.assert_close(log["d_j"], d_j)
    torch.testing.assert_close(log["d_0"], d_0)
    torch.testing.assert_close(log["w"], w)


@pytest.mark.parametrize("power", range(3))
def test_lagrange_weights_are_exact_for_polynomials_of_as_many_terms_as_nodes(power):
    nodes, start, end = SIGMAS[[0, 2, 3]], SIGMAS[0], SIGMAS[4]
    weights = lagrange_weights(nodes, start, end)
    exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
    assert (weights * nodes**power).sum() == pytest.approx(exact.item(), abs=1e-12)


def test_the_odds_of_steps_grow_as_the_square():
    counts = torch.zeros(4)
    for seed in range(3000):
        (step,) = draw_steps(range(3, 7), 1, 2.0, generator(seed))
        counts[step - 3] += 1
    expected = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    assert (counts / 3000 - expected).abs().max() < 0.03


def draw_pairs(draw: str, steps: int, count: int) -> list[tuple[int, int]]:
    sigmas = torch.linspace(1, 0, steps + 1)
    return [draw_pair(sigmas, generator(seed), draw) for seed in range(count)]


def test_midpoint_draws_the_first_step_and_the_second_halfway_to_the_end():
    pairs = draw_pairs("midpoint", 25, 400)
    assert {first for first, _ in pairs} == set(range(24))
    assert all(second == first + (25 - first) // 2 for first, second in pairs)


def test_midpoint_j_draws_the_second_step_and_the_first_halfway_from_the_start():
    pairs = draw_pairs("midpoint_j", 25, 400)
    assert {second for _, second in pairs} == set(range(1, 25))
    assert all(first == second // 2 for first, second in pairs)


def test_uniform_draws_as_leapalign_does():
    sigmas = torch.linspace(1, 0, 26)
    pairs = [pick_leaps(sigmas, generator(seed)) for seed in range(20)]
    assert draw_pairs("uniform", 25, 20) == pairs


@pytest.mark.parametrize("steps", [3, 4, 12, 25])
def test_dirichlet_divides_the_steps_as_the_distribution_does(steps):
    pairs = np.array(draw_pairs("dirichlet", steps, 2000))
    first, second = pairs.T
    lengths = np.stack([first + 1, second - first, steps - 1 - second], 1)
    assert lengths.min() == 1
    assert first.min() == 0
    assert (lengths.sum(1) == steps).all()

    shares = np.random.default_rng(0).dirichlet((2, 6, 2.5), 2000)
    expected = np.maximum(1, np.round(steps * shares))
    outer = [0, 2]  # the middle length is what remains, mostly the longest
    if steps > 4:
        tolerance = 0.06 * steps**0.5
        np.testing.assert_allclose(lengths[:, outer].mean(0), expected[:, outer].mean(0), atol=tolerance)
        np.testing.assert_allclose(lengths[:, outer].std(0), expected[:, outer].std(0), atol=tolerance)


@pytest.mark.parametrize("draw, minimum", [("uniform", 2), ("midpoint", 2), ("midpoint_j", 2), ("dirichlet", 3)])
def test_a_pair_needs_enough_steps(draw, minimum):
    draw_pairs(draw, minimum, 20)
    with pytest.raises(ValueError, match=f"--draw {draw} needs {minimum} steps, and a rollout has {minimum - 1}"):
        draw_pairs(draw, minimum - 1, 1)


# ------------------------------------------------------------------------------------------------ identities


def test_leaps_over_all_steps_without_nesting_are_drtune_and_sparse_with_all_steps_active():
    seed = 0
    while late_step(samples(Field(), seed)) != T - 1:
        seed += 1
    all_leaps = gradient_of(leapalign, leaps=T, alpha=0.0, weight="none")
    assert close(gradient_of(direct.drtune, seed, active=T), all_leaps)
    assert close(gradient_of(direct.flowbp_sparse, active=T), all_leaps)


def test_one_leap_from_the_last_step_is_draft_1():
    sigma = SIGMAS[-2].item()
    one_leap = gradient_of(leapalign, leaps=1, low=sigma, high=sigma, weight="none")
    assert close(one_leap, gradient_of(direct.full, last=1))
    assert close(one_leap, gradient_of(direct.draft_lv, copies=0))


def test_lagrange_through_one_node_is_leapalign():
    one_node = gradient_of(direct.flowbp_lagrange, seed=2, draw="uniform", nodes=1, alpha=0.3, tau=0.1)
    assert close(one_node, gradient_of(leapalign, seed=2))


def test_on_a_straight_field_a_polynomial_lands_where_a_leap_does():
    log = direct.flowbp_lagrange(samples(Constant(), 0), nodes=2)
    assert max(log["d_j"].max(), log["d_0"].max()) < 1e-14


# ------------------------------------------------------------------------------------------ policy gradients


def flow_density(x: Tensor, v: Tensor, i: int) -> torch.distributions.Normal:
    """A step of Flow-GRPO as its paper states it."""
    sigma, dsigma = SIGMAS[i].item(), DSIGMA[i]
    finite_sigma = sigma if sigma < 1 else SIGMAS[1].item()
    eta = 0.7 * (sigma / (1 - finite_sigma)) ** 0.5
    x_factor = 1 + eta**2 / (2 * sigma) * dsigma
    v_factor = (1 + eta**2 * (1 - sigma) / (2 * sigma)) * dsigma
    return torch.distributions.Normal(x_factor * x + v_factor * v, eta * (-dsigma) ** 0.5)


def dance_density(x: Tensor, v: Tensor, i: int) -> torch.distributions.Normal:
    """A step of DanceGRPO as its paper states it."""
    sigma, dsigma, eta = SIGMAS[i].item(), DSIGMA[i], 0.3
    xhat_0 = x - sigma * v
    score_of_x = -(x - (1 - sigma) * xhat_0) / sigma**2
    mean = x + dsigma * v - 0.5 * eta**2 * score_of_x * dsigma
    return torch.distributions.Normal(mean, eta * (-dsigma) ** 0.5)


def log_probabilities(
    field: Field,
    x: Tensor,
    density: Callable[..., torch.distributions.Normal],
    random_steps: Container[int],
) -> tuple[Tensor, Tensor]:
    """x_0 of a walk from x, and log p of its random steps: (steps, b), a mean over a latent's entries."""
    logp = []
    for i in range(T):
        v = field(x, SIGMAS[i])
        if i in random_steps:
            normal = density(x, v, i)
            x = (normal.mean + normal.stddev * noise(i + 1)).detach()
            logp.append(normal.log_prob(x).flatten(1).mean(1))
        else:
            x = (x + DSIGMA[i] * v).detach()
    return x, torch.stack(logp)


@pytest.mark.parametrize(
    "method, density, random_steps, shared, update",
    [
        (policy.flow_grpo, flow_density, range(T - 1), False, 0),
        (policy.dance_grpo, dance_density, range(T - 1), True, 0),
        (policy.mix_grpo, dance_density, range(2), True, 24),
        (policy.mix_grpo, dance_density, range(1, 3), True, 25),
        (policy.mix_grpo, dance_density, range(2, 4), True, 1000),
    ],
)
def test_a_policy_gradient_is_that_of_the_clipped_ratio_times_the_advantage(
    method, density, random_steps, shared, update
):
    field, group = Field(), 2
    x_1 = noise(0)
    if shared:
        x_1 = x_1[::group].repeat_interleave(group, 0)
    x_0, logp = log_probabilities(field, x_1, density, random_steps)

    scores = score(x_0).view(-1, group)
    centred = scores - scores.mean(1, keepdim=True)
    advantage = (centred / (scores.std(1, keepdim=True) + 1e-6)).flatten()
    ratio = (logp - logp.detach()).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))  # at the first update of a rollout
    clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    expected = autograd_of(-objective.mean(), field)

    options = dict(window=2) if method is policy.mix_grpo else {}
    assert close(gradient_of(method, update=update, group=group, **options), expected)


@pytest.mark.parametrize("method", ["flow", "dance"])
def test_random_steps_have_the_marginals_of_the_ode(method, data_mean=0.7, data_std=0.4, steps=4000):
    """Gaussian data has a linear velocity, so means and variances are propagated exactly, step by step."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    end = round(0.7 * steps)
    for sigma, next_sigma in itertools.pairwise(sigmas[: end + 1]):
        below_one = sigma.clamp(max=sigmas[1])
        eta = 0.7 * (below_one / (1 - below_one)).sqrt() if method == "flow" else torch.tensor(0.3).double()
        level_variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
        slope = (sigma - (1 - sigma) * data_std**2) / level_variance

        # The step is linear in x: two points give its mean and its slope.
        x = torch.stack([mean, mean + 1])
        v = slope * (x - (1 - sigma) * data_mean) - data_mean
        new_mean, std, _ = transition(x, v, sigma, next_sigma - sigma, eta)
        mean = new_mean[0]
        variance = (new_mean[1] - new_mean[0]) ** 2 * variance + std**2

    sigma = sigmas[end].item()
    exact_variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
    assert mean.item() == pytest.approx((1 - sigma) * data_mean, abs=2e-3)
    assert variance.item() == pytest.approx(exact_variance, rel=5e-3)


def test_without_noise_a_random_step_is_the_euler_step():
    x, v, dsigma = noise(0), noise(1), SIGMAS[2] - SIGMAS[1]
    mean, std, dmean_dv = transition(x, v, SIGMAS[1], dsigma, eta=torch.zeros(()).double())
    assert std == 0
    assert dmean_dv == dsigma
    torch.testing.assert_close(mean, x + dsigma * v, rtol=0, atol=1e-15)


def test_advantages_of_a_group_have_mean_zero_and_deviation_one_whatever_the_scale():
    scores = torch.cat([gaussian(0, 8), 100 + 50 * gaussian(1, 8)])
    advantage = advantages(scores, 8).view(2, 8)
    assert advantage.mean(1).abs().max() < 1e-6
    assert (advantage.std(1) - 1).abs().max() < 1e-5


def test_equal_scores_have_no_advantage():
    assert advantages(torch.ones(4), 2).abs().max() == 0


def test_advantages_are_clipped():
    outlier = torch.zeros(64)
    outlier[3] = 1.0
    assert advantages(outlier, 64).max() == 5.0


@pytest.mark.parametrize("group", [1, 3])
def test_samples_must_divide_into_groups_of_two_or_more(group):
    with pytest.raises(ValueError, match=f"groups of {group}"):
        advantages(torch.zeros(16), group)


# ----------------------------------------------------------------------------------------------- on the tiny Flux


def updates(cfg: Config, names: list[str]) -> dict[str, Tensor]:
    """What one update by each method changes of the trained weights."""
    result = {}
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        weights = [p for p in setup.pipe.flux.parameters() if p.requires_grad]
        first_weights = [p.detach().clone() for p in weights]
        for name in names:
            options = dict(group=2) if "grpo" in name else {}
            if name == "mix_grpo":
                options |= dict(window=1)  # with more it would be DanceGRPO in so few steps
            setup = replace(setup, method=partial(find_method(name), **options), group=options.get("group", 1))
            run = train.make_state(cfg, setup.pipe.flux)
            entry = train.one_update(cfg, setup, run, process, 0)
            assert entry["grad_norm"] > 0
            assert entry["backwards"] > 0
            assert np.isfinite(entry["reward"])

            changes = [full_tensor(p.detach() - first).flatten() for p, first in zip(weights, first_weights)]
            result[name] = torch.cat(changes)
            copy_values(first_weights, weights)
    return result


@pytest.mark.parametrize("lora", [None, 4])
def test_every_method_trains_alike_on_one_rank_and_on_two_with_micro_batches(lora):
    # A learning rate so small that Adam's first step does not turn rounding into other signs of small gradients.
    cfg = Config(out=Path("nonexistent"), batch=4, rollout_steps=3, lora=lora, lr=1e-6, clip=1e9)
    # Methods do not know of a LoRA: one of each kind is enough.
    names = ["refl", "flowbp_bridge", "flow_grpo"] if lora else list(METHODS)
    (one_rank,) = spread(1, updates, cfg, names)
    for rank in spread(2, updates, replace(cfg, rollout_batch=2, micro_batch=1), names):
        for name in names:
            update = one_rank[name]
            assert update.norm() > 0
            assert (rank[name] - update).norm() < 0.05 * update.norm(), name
    for name, second in itertools.combinations(names, 2):
        update = one_rank[name]
        assert (update - one_rank[second]).norm() > 0.05 * update.norm(), (name, second)
