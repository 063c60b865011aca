"""leaps.py against the paper's equations: explicit Jacobians, finite differences, hand-computed weights.

The network is a tanh MLP on (b, n, c) = (2, 3, 2), small enough to hold every Jacobian; float64 unless said.
"""

import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from leaps import (
    Rollout,
    connect,
    discount,
    hinge,
    leap,
    leap_terms,
    one_step,
    pick_leaps,
    rollout,
    similarity_weight,
    sweep,
    sweep_nested_only,
    vjp_of,
)

B, N, C = 2, 3, 2
SIGMAS = torch.tensor([1.0, 0.87, 0.66, 0.41, 0.18, 0.0], dtype=torch.float64)  # uneven on purpose
T = len(SIGMAS) - 1
PICKS = [(1,), (0, 3), (1, 4), (1, 2, 4)]  # one to three leaps
ALPHAS = [0.0, 0.3, 1.0]


class Field(nn.Module):
    """A velocity that is nonlinear in x and sigma and mixes the tokens of a sample, never two samples."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w1, self.w2, self.s, self.bias = (
            nn.Parameter(0.6 * torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
            for shape in [(N * C, 5), (5, N * C), (5,), (N * C,)]
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = torch.tanh(x.flatten(1) @ self.w1 + sigma * self.s)
        return (h @ self.w2 + self.bias).view_as(x)


class Constant(nn.Module):
    """v independent of x and sigma: every leap is exact."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(gaussian(3, 1, N, C))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.v + 0 * x  # of no value, but autograd has a path to x, as in any network


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def field() -> Field:
    return Field()


@pytest.fixture
def ro(field: Field) -> Rollout:
    return rollout(field, gaussian(1, B, N, C), SIGMAS)


@pytest.fixture
def grad() -> Tensor:
    return gaussian(2, B, N, C)


def flat_grad(module: nn.Module) -> Tensor:
    """The parameters' gradients as one vector, which are cleared."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in grads])


def leap_backward(velocity, ro, picks, alpha, grad, nested_only=False) -> None:
    """As leapalign has it: what `leap(...).backward(grad)` adds, one leap's activations at a time."""
    backward = sweep_nested_only if nested_only else sweep
    backward(vjp_of(velocity), ro, leap_terms(ro, picks, alpha), grad)


def by_autograd(field, ro, picks, alpha, grad, nested_only=False) -> Tensor:
    leap(field, ro, picks, alpha, nested_only).backward(grad)
    return flat_grad(field)


def by_sweep(field, ro, picks, alpha, grad, nested_only=False) -> Tensor:
    leap_backward(field, ro, picks, alpha, grad, nested_only)
    return flat_grad(field)


def jacobians(field: Field, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """dv/dtheta (bnc, parameters) and dv/dx (bnc, bnc) at one state."""
    params = dict(field.named_parameters())
    by_param, by_x = jacrev(lambda p, x: functional_call(field, p, (x, sigma)), argnums=(0, 1))(params, x)
    flat = [j.detach().reshape(x.numel(), -1) for j in by_param.values()]
    return torch.cat(flat, 1), by_x.detach().reshape(x.numel(), x.numel())


def equation_10(field, ro, picks, alpha, grad, nested_only=False) -> Tensor:
    """(dx_0/dtheta)^T grad from explicit Jacobians, forwards through the leaps.

    For two leaps it is Eq. 10 (or 14) written out; for others its recursion,
    dx_end/dtheta = dx_start/dtheta - (k - j) (dv/dtheta + alpha dv/dx dx_start/dtheta).
    """
    levels = [ro.sigmas[i].item() for i in picks] + [0.0]
    a, jx = zip(*(jacobians(field, ro.x[i], ro.sigmas[i]) for i in picks), strict=True)
    if len(picks) == 2:
        k, j = levels[:2]
        total = -j * a[1] + alpha * j * (k - j) * jx[1] @ a[0]
        if not nested_only:
            total = total - (k - j) * a[0]
    else:
        total = torch.zeros_like(a[0])
        for i in range(len(picks)):
            last = i == len(picks) - 1
            inside = a[i] + alpha * jx[i] @ total
            total = (0 if nested_only and last else total) - (levels[i] - levels[i + 1]) * inside
    return total.T @ grad.flatten()


# -------------------------------------------------------------------------------------- the rollout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rollout_is_the_euler_loop(dtype):
    field, x = Field(dtype), gaussian(1, B, N, C, dtype=dtype)
    ro = rollout(field, x, SIGMAS)
    sigmas = SIGMAS.to(dtype)
    assert torch.equal(ro.sigmas, sigmas) and ro.x.shape == (T + 1, B, N, C) and ro.v.shape == (T, B, N, C)
    with torch.no_grad():
        for i in range(T):
            assert torch.equal(ro.x[i], x)
            v = field(x, sigmas[i])
            assert torch.equal(ro.v[i], v)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert torch.equal(ro.x[T], x)
    assert ro.x.dtype == ro.v.dtype == dtype


def test_rollout_keeps_no_graph(ro):
    assert not ro.x.requires_grad and not ro.v.requires_grad
    assert ro.x.grad_fn is None and ro.v.grad_fn is None


def test_bf16_velocity_accumulates_in_fp32():
    def velocity(x, sigma):
        return torch.full_like(x, 1.0, dtype=torch.bfloat16)

    # from 256, a bf16 sum (spacing 1 to 2) would lose all thousand steps of 1/1000
    ro = rollout(velocity, torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16), torch.linspace(1, 0, 1001))
    assert ro.x.dtype == ro.v.dtype == ro.sigmas.dtype == torch.float32
    assert ro.x[-1].item() == pytest.approx(255.0, abs=0.01)


# ------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nested_only", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("picks", PICKS)
def test_leap_has_bitwise_the_value_of_the_rollout(picks, alpha, nested_only, dtype):
    field = Field(dtype)
    ro = rollout(field, gaussian(1, B, N, C, dtype=dtype), SIGMAS)
    assert torch.equal(leap(field, ro, picks, alpha, nested_only), ro.x[-1])


def test_leap_evaluates_the_network_on_the_states_of_the_rollout(field, ro):
    seen = []

    def velocity(x, sigma):
        seen.append((x.detach(), sigma))
        return field(x, sigma)

    leap(velocity, ro, (1, 2, 4), 0.3)
    for i, (x, sigma) in zip((1, 2, 4), seen, strict=True):
        assert torch.equal(x, ro.x[i]) and sigma == SIGMAS[i] and sigma.ndim == 0


def test_a_connector_has_the_gradient_of_the_prediction_and_a_discount_alpha_of_it():
    x, xhat = gaussian(1, 3).requires_grad_(), gaussian(2, 3).requires_grad_()
    connect(x, xhat).sum().backward()
    assert x.grad is None and xhat.grad.tolist() == [1.0] * 3
    discount(x, 0.3).sum().backward()
    assert x.grad.tolist() == [0.3] * 3


@pytest.mark.parametrize("nested_only", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("picks", PICKS)
def test_leap_has_the_gradient_of_equation_10(field, ro, grad, picks, alpha, nested_only):
    expected = equation_10(field, ro, picks, alpha, grad, nested_only)
    torch.testing.assert_close(
        by_autograd(field, ro, picks, alpha, grad, nested_only), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("nested_only", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("picks", [*PICKS, tuple(range(T))])
def test_sweep_equals_autograd(field, ro, grad, picks, alpha, nested_only):
    before = grad.clone()
    expected = by_autograd(field, ro, picks, alpha, grad, nested_only)
    sweep = by_sweep(field, ro, picks, alpha, grad, nested_only)
    torch.testing.assert_close(sweep, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(grad, before)


def test_the_terms_of_equation_10_are_all_there(field, ro, grad):
    """Guards the tests above against a term that happens to be tiny on this field."""
    whole, flat, nested = (
        equation_10(field, ro, (0, 3), alpha, grad, nested_only)
        for alpha, nested_only in [(0.3, False), (0.0, False), (0.3, True)]
    )
    size = whole.norm()
    assert (whole - flat).norm() > 0.05 * size and (whole - nested).norm() > 0.05 * size


def test_nested_only_without_alpha_is_the_last_leap_alone(field, ro, grad):
    alone = by_sweep(field, ro, (3,), 0.0, grad)
    torch.testing.assert_close(by_sweep(field, ro, (0, 3), 0.0, grad, nested_only=True), alone)


def test_whole_trajectory_at_alpha_1_is_the_true_gradient(field):
    """Leaps over every single step are the rollout itself: finite differences of a function of x_0."""
    noise, c = gaussian(1, B, N, C), gaussian(4, B, N, C)

    def value() -> Tensor:
        return (c * torch.sin(rollout(field, noise, SIGMAS).x[-1])).sum()

    ro = rollout(field, noise, SIGMAS)
    sweep = by_sweep(field, ro, tuple(range(T)), 1.0, c * torch.cos(ro.x[-1]))
    params, eps = list(field.parameters()), 1e-5
    differences = []
    with torch.no_grad():
        for p in params:
            for i in range(p.numel()):
                p.view(-1)[i] += eps
                up = value()
                p.view(-1)[i] -= 2 * eps
                differences.append((up - value()) / (2 * eps))
                p.view(-1)[i] += eps
    torch.testing.assert_close(sweep, torch.stack(differences), rtol=1e-6, atol=1e-7)


def test_gradients_accumulate(field, ro, grad):
    once = by_sweep(field, ro, (0, 3), 0.3, grad)
    leap_backward(field, ro, (0, 3), 0.3, grad)
    leap_backward(field, ro, (0, 3), 0.3, grad)
    torch.testing.assert_close(flat_grad(field), 2 * once)


def test_sweep_equals_autograd_with_a_bf16_network():
    field = Field(torch.bfloat16)

    def velocity(x, sigma):
        return field(x.bfloat16(), sigma.bfloat16())

    ro = rollout(velocity, gaussian(1, B, N, C, dtype=torch.float32), SIGMAS)
    grad = gaussian(2, B, N, C, dtype=torch.float32)
    x0 = leap(velocity, ro, (0, 3), 0.3)
    assert torch.equal(x0, ro.x[-1]) and x0.dtype == torch.float32
    x0.backward(grad)
    expected = flat_grad(field)
    leap_backward(velocity, ro, (0, 3), 0.3, grad)
    torch.testing.assert_close(flat_grad(field), expected, rtol=0.02, atol=0.02)  # the network's gradients are bf16


# ---------------------------------------------------------------------------------- cost of a sweep


@pytest.mark.parametrize(
    "alpha, picks, expected",
    [(0.3, (0, 2, 3), [True, True, False]), (0.0, (0, 2, 3), [False] * 3), (0.3, (2,), [False])],
)
def test_sweep_asks_for_an_input_gradient_only_where_one_is_used(field, ro, grad, alpha, picks, expected):
    asked = []

    def velocity(x, sigma):
        asked.append(x.requires_grad)
        return field(x, sigma)

    leap_backward(velocity, ro, picks, alpha, grad)
    assert asked == expected
    assert not ro.x.requires_grad and ro.x.grad is None


class LiveBytes:
    """Bytes of activations that autograd holds, and their peak.

    Each saved tensor is packed in a box and counted until the box dies: only autograd refers to it.
    """

    class Box:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self, module: nn.Module):
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "LiveBytes.Box":
        box = self.Box(tensor.detach())
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            self.add(tensor.nbytes)
            weakref.finalize(box, self.add, -tensor.nbytes)
        return box

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)


def test_peak_of_a_sweep_does_not_grow_with_the_leaps_and_autograd_does(field, ro, grad):
    sweep, autograd = [], []
    for picks in [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)]:
        live = LiveBytes(field)
        with live.hooks():
            leap_backward(field, ro, picks, 0.3, grad)
        assert live.now == 0
        sweep.append(live.peak)
        live = LiveBytes(field)
        with live.hooks():
            x0 = leap(field, ro, picks, 0.3)
        assert live.now == live.peak
        x0.backward(grad)
        assert live.now == 0
        autograd.append(live.peak)
    assert len(set(sweep)) == 1 and sweep[0] > 0
    assert all(more >= one + sweep[0] for one, more in itertools.pairwise(autograd))


# ------------------------------------------------------------------------------------ the objective


def test_constant_velocity_makes_leaps_exact_and_weights_largest():
    ro = rollout(Constant(), gaussian(1, B, N, C), SIGMAS)
    w, d = similarity_weight(ro, (1, 3), tau=0.1)
    assert d.shape == (2, B) and w.shape == (B,)
    torch.testing.assert_close(d, torch.zeros(2, B, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(w, torch.full((B,), 1 / 0.2, dtype=torch.float64))


def test_constant_velocity_has_its_true_gradient_at_any_alpha(grad):
    field = Constant()
    ro = rollout(field, gaussian(1, B, N, C), SIGMAS)
    for alpha in ALPHAS:  # x_0 = x_1 - v, and only the part from sigmas[1] on is leapt
        leap_backward(field, ro, (1, 3), alpha, grad)
        torch.testing.assert_close(flat_grad(field), -SIGMAS[1] * grad.sum(0).flatten())


def by_hand(d: list[float], tau: float) -> float:
    return 1 / sum(max(x, tau) for x in d)


@pytest.mark.parametrize("tau", [1e-3, 0.5, 1e3])
def test_weight_is_equation_12(ro, tau):
    x, v, s = ro
    d_j = [(x[3, i] - (x[0, i] - (s[0] - s[3]) * v[0, i])).abs().mean().item() for i in range(B)]
    d_0 = [(x[5, i] - (x[3, i] - s[3] * v[3, i])).abs().mean().item() for i in range(B)]
    assert min(d_j + d_0) > 2e-3 and len({round(d, 4) for d in d_j + d_0}) == 2 * B
    w, d = similarity_weight(ro, (0, 3), tau)
    assert d.tolist() == [pytest.approx(d_j), pytest.approx(d_0)]
    assert w.tolist() == pytest.approx([by_hand(pair, tau) for pair in zip(d_j, d_0)])
    for use, kept in {"d_j": d_j, "d_0": d_0}.items():
        assert similarity_weight(ro, (0, 3), tau, use)[0].tolist() == pytest.approx([by_hand([k], tau) for k in kept])
    assert similarity_weight(ro, (0, 3), tau, "none")[0].tolist() == [1.0] * B


def test_each_distance_is_clamped_by_itself():
    """A leap that misses by 3 and one that is exact: max(3, tau) + max(0, tau), not max(3 + 0, 2 tau)."""
    x = torch.tensor([7.0, 9.0, 8.0]).view(3, 1, 1, 1)  # leaps land on 6 and 8
    v = torch.tensor([2.0, 2.0]).view(2, 1, 1, 1)
    w, d = similarity_weight(Rollout(x, v, torch.tensor([1.0, 0.5, 0.0])), (0, 1), tau=0.5)
    assert d.flatten().tolist() == [3.0, 0.0]
    assert w.item() == pytest.approx(1 / 3.5)


def test_weight_of_one_and_of_three_leaps(ro):
    for picks in [(1,), (1, 2, 4)]:
        w, d = similarity_weight(ro, picks, tau=0.05)
        assert d.shape == (len(picks), B)
        torch.testing.assert_close(w, 1 / d.clamp(min=0.05).sum(0))
    w, d = similarity_weight(ro, (1, 2, 4), 0.05, use="d_j")
    torch.testing.assert_close(w, 1 / d[:2].clamp(min=0.05).sum(0))
    with pytest.raises(ValueError, match="d_j needs two leaps"):
        similarity_weight(ro, (1,), 0.05, use="d_j")


def test_no_gradient_passes_through_the_weight(ro):
    tracked = Rollout(ro.x.requires_grad_(), ro.v.requires_grad_(), ro.sigmas)
    w, d = similarity_weight(tracked, (0, 3), tau=1e-3)
    assert not w.requires_grad and not d.requires_grad


def test_hinge_is_flat_from_lambda_on():
    reward = torch.tensor([-1.0, 0.2, 0.55, 0.7], requires_grad=True)
    loss = hinge(reward, 0.55)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1.55, 0.35, 0.0, 0.0]))
    assert reward.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_without_lambda_the_loss_is_the_negated_reward():
    reward = torch.tensor([-1.0, 0.2, 3.0], requires_grad=True)
    hinge(reward, None).sum().backward()
    assert hinge(reward, None).tolist() == (-reward).tolist()
    assert reward.grad.tolist() == [-1.0] * 3


def test_an_iteration_as_documented_is_autograd_on_the_objective(field):
    """The lines of the module's docstring against L = mean sg(w) max(0, lam - r(x_0)) through connectors."""
    noise, tau, alpha = gaussian(1, B, N, C), 0.01, 0.3

    def reward(x0):
        return torch.sin(x0).flatten(1).sum(1)

    ro = rollout(field, noise, SIGMAS)
    picks = pick_leaps(SIGMAS, generator())
    w, _ = similarity_weight(ro, picks, tau)
    lam = reward(ro.x[-1]).mean().item()  # one sample above it, one below
    x0 = ro.x[-1].requires_grad_()
    loss = (w * hinge(reward(x0), lam)).mean()
    loss.backward()
    leap_backward(field, ro, picks, alpha, x0.grad)
    sweep = flat_grad(field)

    assert sorted(x0.grad.flatten(1).norm(dim=1).gt(0).tolist()) == [False, True]
    ((w * hinge(reward(leap(field, ro, picks, alpha)), lam)).sum() / B).backward()
    torch.testing.assert_close(sweep, flat_grad(field), rtol=1e-10, atol=1e-12)
    assert sweep.norm() > 0 and not ro.x.requires_grad


def test_the_reward_may_be_of_the_prediction_instead(field, ro):
    """The ablation in one_step's docstring against autograd through the paper's own expressions."""
    k, j, alpha, levels = 0, 3, 0.3, ro.sigmas
    xhat = one_step(ro.x[j], ro.v[j], levels[j], levels[-1]).requires_grad_()
    torch.sin(xhat).sum().backward()
    leap_backward(field, ro, (k, j), alpha, xhat.grad)
    sweep = flat_grad(field)

    x_j = ro.x[k] - (levels[k] - levels[j]) * field(ro.x[k], levels[k])
    x_j = x_j + (ro.x[j] - x_j).detach()
    predicted = x_j - levels[j] * field(alpha * x_j + (1 - alpha) * x_j.detach(), levels[j])
    torch.testing.assert_close(predicted, xhat)
    torch.sin(predicted).sum().backward()
    torch.testing.assert_close(sweep, flat_grad(field), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------- the picks


def test_pairs_are_uniform():
    levels, g, draws = torch.linspace(1, 0, 7), generator(), 3000
    counts = {(k, j): 0 for k in range(6) for j in range(k + 1, 6)}
    for _ in range(draws):
        counts[pick_leaps(levels, g)] += 1  # a KeyError here is a pair out of order or out of range
    expected = draws / len(counts)
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi2 < 36.1  # 99.9% of chi-square with 14 degrees of freedom


def test_picks_by_level_have_odds_of_the_length_of_their_steps():
    g, draws = generator(), 4000
    odds = (SIGMAS[:-1] - SIGMAS[1:]).tolist()
    # Two draws without replacement: the first by the odds, the second by the odds of what is left.
    expected = {}
    for k, j in itertools.combinations(range(T), 2):
        either_first = odds[k] * odds[j] * (1 / (1 - odds[k]) + 1 / (1 - odds[j]))
        expected[k, j] = draws * either_first
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        counts[pick_leaps(SIGMAS, g, by_level=True)] += 1
    chi2 = sum((counts[pair] - n) ** 2 / n for pair, n in expected.items())
    assert chi2 < 27.9  # 99.9% of chi-square with 9 degrees of freedom


def test_picks_by_level_keep_to_the_range():
    picks = {pick_leaps(SIGMAS, generator(seed), low=0.3, high=0.9, by_level=True) for seed in range(50)}
    assert picks == {(1, 2), (1, 3), (2, 3)}


@pytest.mark.parametrize("leaps", [1, 2, 3, 25])
def test_picks_are_increasing_steps(leaps):
    g = generator()
    for _ in range(50):
        picks = pick_leaps(torch.linspace(1, 0, 26), g, leaps)
        assert isinstance(picks, tuple) and all(type(i) is int for i in picks)
        assert len(picks) == leaps and sorted(set(picks)) == list(picks) and picks[0] >= 0 and picks[-1] < 25


@pytest.mark.parametrize("distance", [None, 0.5])
def test_same_seed_same_picks(distance):
    levels = torch.linspace(1, 0, 26)
    runs = []
    for seed in (7, 7, 8):
        g = generator(seed)
        runs.append([pick_leaps(levels, g, distance=distance) for _ in range(10)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "low, high, steps", [(0.3, 0.7, {3, 4, 5, 6, 7}), (0.7, 0.9, {1, 2, 3}), (0, 0.4, {6, 7, 8, 9})]
)
def test_range_restricts_the_levels_and_includes_its_ends(low, high, steps):
    levels, g = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]), generator()
    assert {i for _ in range(300) for i in pick_leaps(levels, g, low=low, high=high)} == steps


def test_a_fixed_distance_is_kept():
    levels, g = torch.linspace(1, 0, 11), generator()
    assert {pick_leaps(levels, g, distance=0.5) for _ in range(200)} == {(i, i + 5) for i in range(5)}
    inside = {pick_leaps(levels, g, low=0.2, high=0.9, distance=0.5) for _ in range(200)}
    assert inside == {(1, 6), (2, 7), (3, 8)}


def test_a_fixed_distance_takes_the_nearest_level():
    uneven = torch.tensor([1.0, 0.9, 0.62, 0.45, 0.1, 0.0])
    pairs = {pick_leaps(uneven, generator(seed), distance=0.5) for seed in range(50)}
    assert pairs == {(0, 3), (1, 3), (2, 4)}
    thirds = torch.tensor([1.0, 0.6, 0.4, 0.0])  # 0.5 is between the two: the noisier
    assert {pick_leaps(thirds, generator(seed), distance=0.5) for seed in range(20)} == {(0, 1)}
    assert {pick_leaps(thirds, generator(seed), distance=0.01) for seed in range(50)} == {(0, 1), (1, 2)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"leaps": 11}, r"cannot pick 11 leaps from 10 steps"),
        ({"leaps": 0}, r"cannot pick 0 leaps"),
        ({"low": 0.75, "high": 0.85}, r"cannot pick 2 leaps from 1 steps with sigma in \[0.75, 0.85\]"),
        ({"low": 0.6, "high": 0.4}, r"cannot pick 2 leaps from 0 steps"),
        ({"distance": 0.95}, r"no two steps with levels from 0.1 to 1 are 0.95 apart"),
        ({"distance": 0.5, "high": 0.5}, r"no two steps with levels from 0.1 to 0.5 are 0.5 apart"),
        ({"distance": 0.5, "leaps": 3}, r"needs two leaps"),
        ({"distance": 0.0}, r"must be positive"),
        ({"distance": 0.5, "by_level": True}, r"does not go with picks by level"),
    ],
)
def test_impossible_picks_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        pick_leaps(torch.linspace(1, 0, 11), generator(), **options)
