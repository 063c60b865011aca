"""baselines/direct.py in float64: each gradient against autograd through its surrogate, as its paper states it.

The network is test_leaps' small MLP.  What a method draws is drawn again from the same seed, then written literally: a
loop over Euler steps with `.detach()` where the paper stops a gradient, a density of torch.distributions.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

import train
from baselines import direct
from baselines.direct import Log, draw_pair, draw_steps, lagrange_weights, late_step
from config import Config
from infra.distributed import copy_values, full_tensor, join
from infra.methods import find_method
from leaps import Samples, leap, leapalign, pick_leaps, rollout, similarity_weight, vjp_of
from tests.processes import spread
from tests.test_leaps import SIGMAS, Constant, Field, T, flat_grad, gaussian, generator

B, N, C = 4, 3, 2
METHODS = [
    *("leapalign", "refl", "draft_lv", "drtune", "full", "direct_align", "vgg_flow"),
    *("flowbp_sparse", "flowbp_bridge", "flowbp_lagrange"),
    *("flow_grpo", "dance_grpo", "mix_grpo", "awm", "nft", "dpo", "fdfo"),
]
FROM_SCORES = METHODS[10:]
FROM_BASE = ["vgg_flow", "dpo"]
ALL_ROWS = slice(0, B)
DSIGMA = SIGMAS.diff().tolist()


def noise(i: int) -> Tensor:
    return gaussian(100 + i, B, N, C)


def score(x_0: Tensor, rows: slice = ALL_ROWS) -> Tensor:
    """A reward that is nonlinear in x_0 and differs between samples, (b,)."""
    factors = torch.arange(1, 1 + B * N * C).view(B, N, C) / 10
    return (torch.sin(x_0) * factors[rows]).flatten(1).sum(1)


def base_field() -> Field:
    field = Field()
    with torch.no_grad():
        for p in field.parameters():
            p += 0.1
    return field


def samples(field: nn.Module, seed: int, update: int = 0, sigmas: Tensor = SIGMAS, rows: slice = ALL_ROWS) -> Samples:
    """Some rows of a batch of four."""

    def reward(x_0: Tensor, weight: Tensor | None = None) -> Tensor:
        x_0 = x_0.detach().requires_grad_()
        loss = -score(x_0, rows)
        if weight is not None:
            loss = weight * loss
        (grad,) = torch.autograd.grad(loss.sum() / B, x_0)
        return grad

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return field(x, sigma)

    return Samples(
        noise=lambda i: noise(i)[rows],
        sigmas=sigmas,
        generator=generator(seed),
        velocity=velocity,
        base=torch.no_grad()(base_field()),
        vjp=vjp_of(field),
        reward=reward,
        score=partial(score, rows=rows),
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
@pytest.mark.parametrize("reward_input", [None, "xhat_0", "x_0"])
def test_refl_is_one_step_and_its_prediction(seed, reward_input):
    field = Field()
    i = late_step(samples(field, seed))
    ro = rollout(field, noise(0), SIGMAS)
    xhat_0 = ro.x[i] - SIGMAS[i] * field(ro.x[i], SIGMAS[i])
    if reward_input == "x_0":
        xhat_0 = xhat_0 - xhat_0.detach() + ro.x[-1]
    expected = autograd_of(-score(xhat_0).mean(), field)
    assert close(gradient_of(direct.refl, seed, reward_input=reward_input), expected)
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
@pytest.mark.parametrize("reward_input", ["xhat_0", "x_0"])
def test_drtune_detaches_every_input_and_trains_equally_spaced_steps(seed, reward_input):
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
    if reward_input == "x_0":
        x = x - x.detach() + rollout(field, noise(0), SIGMAS).x[-1]
    expected = autograd_of(-score(x).mean(), field)
    assert close(gradient_of(direct.drtune, seed, reward_input=reward_input), expected)


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


def test_a_random_number_of_last_steps_is_uniform_on_one_to_all():
    gradients = [gradient_of(direct.full, last=k) for k in range(1, T + 1)]
    counts = [0] * T
    for seed in range(60):
        gradient = gradient_of(direct.full, seed, last="random")
        (k,) = [k for k in range(T) if torch.equal(gradient, gradients[k])]
        counts[k] += 1
    assert min(counts) >= 5  # 12 each, on average


def test_refl_says_that_it_draws_its_step_itself():
    with pytest.raises(ValueError, match="--last random is for full"):
        gradient_of(direct.refl, last="random")


# ------------------------------------------------------------------------------------- Direct-Align and VGG-Flow


@pytest.mark.parametrize("seed, ahead", [(0, 1), (1, 2), (2, 9)])
def test_direct_align_takes_a_step_from_noised_x_0_and_takes_the_noise_out(seed, ahead):
    field = Field()
    ro = rollout(field, noise(0), SIGMAS)
    (step,) = pick_leaps(SIGMAS, generator(seed), 1, 0.4, 0.9)
    k, j = SIGMAS[step], SIGMAS[min(step + ahead, T)]
    x = (1 - k) * ro.x[-1] + k * noise(0)
    x = x + (j - k) * field(x, k)
    expected = autograd_of(-score((x - j * noise(0)) / (1 - j)).mean(), field)
    options = dict(low=0.4, high=0.9, ahead=ahead)
    assert close(gradient_of(direct.direct_align, seed, **options), expected)
    assert log_of(direct.direct_align, seed, **options) == dict(k=k, j=j)


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_on_a_straight_field_direct_align_is_the_true_gradient_times_its_share_of_the_path(ahead):
    field, s = Constant(), samples(Constant(), 0)
    direct.full(s._replace(vjp=vjp_of(field)))
    true = flat_grad(field)
    log = direct.direct_align(s._replace(vjp=vjp_of(field)), low=0.4, high=0.9, ahead=ahead)
    share = (log["k"] - log["j"]) / (1 - log["j"])
    torch.testing.assert_close(flat_grad(field), share * true)


def test_the_shorter_its_step_the_nearer_is_direct_aligns_image_to_x_0():
    distances = []
    for steps in (100, 1000):
        images = []

        def reward(x_0: Tensor, weight: Tensor | None = None, images: list[Tensor] = images) -> Tensor:
            images.append(x_0)
            return x_0

        s = samples(Field(), 0, sigmas=torch.linspace(1, 0, steps + 1).double())._replace(reward=reward)
        direct.direct_align(s, low=0.5, high=0.5)
        x_0 = rollout(s.velocity, noise(0), s.sigmas).x[-1]
        distances.append((images[0] - x_0).norm().item())
    assert distances[1] == pytest.approx(distances[0] / 10, rel=0.1)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_vgg_flow_matches_the_base_moved_along_the_gradient_of_the_prediction(scale):
    field, base = Field(), base_field()
    ro = rollout(field, noise(0), SIGMAS)
    steps = draw_steps(range(1, T), 3, 0.0, generator(0))
    loss = torch.zeros(()).double()
    for i in steps:
        sigma = SIGMAS[i]
        xhat_0 = (ro.x[i] - sigma * ro.v[i]).requires_grad_()
        (ascent,) = torch.autograd.grad(score(xhat_0).sum(), xhat_0)
        target = base(ro.x[i], sigma).detach() - scale * (1 - sigma) ** 2 * ascent
        loss = loss + (field(ro.x[i], sigma) - target).square().mean() / 3
    assert close(gradient_of(direct.vgg_flow, scale=scale), autograd_of(loss, field))


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


# -------------------------------------------------------------------------------------- parts of a batch, ranks

ALL_OPTIONS = [*[(name, {}) for name in METHODS], *[(name, dict(ranks=True)) for name in ("dance_grpo", "awm", "nft")]]
ALL_OPTIONS += [("flow_grpo", dict(window=2, cps=True)), ("mix_grpo", dict(shift_every="random"))]
ALL_OPTIONS += [("full", dict(last="random")), ("drtune", dict(reward_input="x_0")), ("fdfo", dict(dsigma=True))]


def grouped(name: str, options: dict) -> dict:
    """Options for a batch of four, in which more than two samples of a prompt would be the whole batch."""
    return options | dict(group=2) if name in FROM_SCORES else options


@pytest.mark.parametrize("name, options", ALL_OPTIONS, ids=str)
def test_the_gradients_of_the_parts_of_a_batch_add_up(name, options):
    """What ranks and rollouts of a part of the batch rely on: parts draw alike, and divide by `total`."""
    method = partial(find_method(name), **grouped(name, options))
    whole = gradient_of(method, seed=3)
    field = Field()
    for rows in (slice(0, 2), slice(2, 4)):
        method(samples(field, 3, rows=rows))
    assert close(flat_grad(field), whole)


def test_no_two_methods_have_the_same_gradient():
    gradients = {}
    for name in METHODS:
        options = dict(window=1) if name == "mix_grpo" else {}  # with more it would be DanceGRPO in so few steps
        gradient = gradient_of(find_method(name), **grouped(name, options))
        gradients[name] = gradient / gradient.norm()
    for first, second in itertools.combinations(METHODS, 2):
        assert (gradients[first] - gradients[second]).norm() > 0.02, (first, second)


def updates(cfg: Config, names: list[str]) -> dict[str, Tensor]:
    """What one update by each method changes of the trained weights."""
    result = {}
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        weights = [p for p in setup.pipe.flux.parameters() if p.requires_grad]
        first_weights = [p.detach().clone() for p in weights]
        for name in names:
            options = grouped(name, {})
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


# One method of each kind: a sweep, a walk, and the forward process; vgg_flow and dpo ask for the untuned network.
@pytest.mark.parametrize(
    "lora, names", [(None, ["flowbp_bridge", "flow_grpo", "vgg_flow"]), (4, ["refl", "nft", "dpo"])]
)
def test_methods_train_alike_on_one_rank_and_on_two_with_micro_batches(lora, names):
    # A learning rate so small that Adam's first step does not turn rounding into other signs of small gradients.
    # The method named here decides that the untuned network is loaded.
    cfg = Config(out=Path("nonexistent"), method=names[-1], batch=4, rollout_steps=3, lora=lora, lr=1e-6, clip=1e9)
    cfg = replace(cfg, group=2 if names[-1] == "dpo" else None)
    (one_rank,) = spread(1, updates, cfg, names)
    for rank in spread(2, updates, replace(cfg, rollout_batch=2, micro_batch=1), names):
        for name in names:
            update = one_rank[name]
            assert update.norm() > 0
            assert (rank[name] - update).norm() < 0.05 * update.norm(), name
