"""LeapAlign (arXiv 2604.15311): the gradient of a reward in the weights of a flow model, from two leaps.

Setting: rectified flow.  x_1 ~ N(0, I) is noise, x_0 a clean latent, x_t = (1 - t) x_0 + t x_1, and a network
predicts the velocity v(x_t, t) ~ x_1 - x_0.  T Euler steps visit the levels sigma_0 = 1 > ... > sigma_T = 0.
Backpropagation through all steps holds the activations of T network calls, and the paper finds that its gradient tends
to explode.

One iteration, `leapalign` at the end of this file:

1. Roll out all T steps without gradient; keep every state and every velocity.
2. Pick two of the T steps, at noise levels k > j.
3. Leap x_k -> x_j -> x_0, each leap along one velocity (Eq. 3; the two predictions are Eq. 4 and 5).  A connector
   gives the end of a leap the value that the rollout had there and leaves it the gradient of the leap (Eq. 6, 7).
   Eq. 9 replaces Eq. 5: what flows back through the input of the second network call is scaled by alpha, because
   this nested term is the one that explodes.
4. The objective is a hinge on the reward of the real x_0 (Eq. 11), weighted for each sample by how closely the leaps
   follow the rollout (Eq. 12), and averaged (Eq. 13).

The connectors fix every forward value: weight, reward and dL/dx_0 are known before any leap is evaluated.
So the gradient of step 3 (Eq. 10) is a reverse sweep that re-evaluates and differentiates one leap at a time, after
the activations of reward and VAE were freed.  The price is one more forward per leap.  `leap` is the same gradient as
the paper states it, by autograd.

A method (LeapAlign, a function of baselines/, or yours) is a function of `Samples` that adds its gradient to the
weights and returns values to log.  It sees no text, no VAE, no micro-batch and, but for `total`, no rank: samples.py
hides those.

Precision: `velocity` may compute in bf16.  All else is fp32 (float64 if the noise is), because connectors and
distances are differences of nearly equal numbers.

Legend: b samples, n tokens, c channels, T steps.  k > j are noise levels as in the paper, and a pick is the
index of a step: k = sigmas[picks[0]].  sg( ) is stop-gradient, `.detach()`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (b, n, c), sigma () or (b,) -> v (b, n, c)
VJP = Callable[..., Tensor | None]  # x, sigma, u (b, n, c), wrt_x = False: see vjp_of
EPS = 1e-6  # of noise levels, which are fp32: 0.3 reads 0.30000001


class Rollout(NamedTuple):
    """A sampled trajectory, without graph: x[i] is at level sigmas[i], v[i] = velocity(x[i], sigmas[i])."""

    x: Tensor  # (T + 1, b, n, c), from x[0], the noise, to x[-1], the clean latent
    v: Tensor  # (T, b, n, c)
    sigmas: Tensor  # (T + 1,), from 1 down to 0


def one_step(x_k: Tensor, v_k: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """Eq. 3: the latent at noise level j, predicted from level k by one velocity; also the Euler step."""
    return x_k - (k - j) * v_k


def prediction(ro: Rollout, step: int) -> Tensor:
    """xhat_{0|k}: where a leap from a step to level 0 lands; ReFL and an ablation of the paper reward it."""
    level = ro.sigmas[step]
    return one_step(ro.x[step], ro.v[step], level, torch.zeros_like(level))


@torch.no_grad()  # not inference_mode: the states become inputs of differentiated networks
def rollout(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Rollout:
    """T Euler steps from noise (b, n, c) along sigmas (T + 1,), descending from 1 to 0; T network calls."""
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(x)
    states, velocities = [x], []
    for k, j in itertools.pairwise(sigmas):
        v = velocity(x, k).to(x.dtype)
        x = one_step(x, v, k, j)
        states.append(x)
        velocities.append(v)
    return Rollout(torch.stack(states), torch.stack(velocities), sigmas)


def pick_leaps(
    sigmas: Tensor,
    generator: torch.Generator,
    leaps: int = 2,
    low: float = 0.0,
    high: float = 1.0,
    distance: float | None = None,
    by_level: bool = False,
) -> tuple[int, ...]:
    """Indices, in increasing order, of the steps that leaps start from; the last leap ends at x_0.

    Uniform over the sets of `leaps` distinct steps whose noise levels lie in [low, high]; that is the paper's draw.
    With `by_level`, steps are drawn without replacement, with odds in proportion to their length sigma_i - sigma_{i+1}.
    With `distance`, an ablation of the paper, two steps are that far apart.

    `generator` is on the CPU: seeded alike, all ranks pick alike.  Raises ValueError if too few steps are in range, or
    if the settings contradict each other.
    """
    levels = sigmas[:-1].tolist()
    in_range = [i for i, level in enumerate(levels) if low - EPS <= level <= high + EPS]
    if not 1 <= leaps <= len(in_range):
        raise ValueError(f"cannot pick {leaps} leaps from {len(in_range)} steps with sigma in [{low}, {high}]")
    if distance is not None:
        if by_level:
            raise ValueError("a fixed distance draws k by step: it does not go with picks by level")
        if leaps != 2 or distance <= 0:
            raise ValueError(f"a fixed distance needs two leaps and must be positive, got {leaps} and {distance}")
        return pick_at_distance(levels, in_range, distance, generator)
    if by_level:
        # Shifted schedules crowd their steps at high noise, where a uniform draw of steps puts most leaps.
        lengths = (sigmas[:-1] - sigmas[1:]).double().cpu()
        indices = torch.multinomial(lengths[in_range], leaps, generator=generator)
    else:
        indices = torch.randperm(len(in_range), generator=generator)[:leaps]
    picks = [in_range[i] for i in indices]
    return tuple(sorted(picks))


def pick_at_distance(
    levels: Sequence[float], in_range: Sequence[int], distance: float, generator: torch.Generator
) -> tuple[int, int]:
    """Two steps: k uniform among the levels in range that leave room for the distance, j nearest to k - distance."""
    highest, lowest = levels[in_range[0]], levels[in_range[-1]]
    starts = [i for i in in_range[:-1] if levels[i] - distance >= lowest - EPS]
    if not starts:
        raise ValueError(f"no two steps with levels from {lowest:.3g} to {highest:.3g} are {distance} apart")
    start = starts[torch.randint(len(starts), (), generator=generator)]
    target = levels[start] - distance  # at least the lowest level in range, so the nearest level is in range too

    def gap(step: int) -> float:
        # Rounded, so that fp32 does not decide between two levels that are equally near.
        return round(abs(levels[step] - target), 6)

    later_steps = range(start + 1, len(levels))
    return start, min(later_steps, key=gap)  # of two equally near, the first and noisier


def spans(ro: Rollout, picks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, end) of each leap as indices of states; the last one ends at T, which is x_0."""
    return list(zip(picks, (*picks[1:], len(ro.v))))


# ------------------------------------------------------------------------------------- the gradient


def connect(x: Tensor, xhat: Tensor) -> Tensor:
    """Eq. 6, 7: the value of x with the gradient of xhat.

    The paper writes xhat + sg(x - xhat), which rounds.  In this order the bracket is exactly 0: bitwise x.
    """
    return x.detach() + (xhat - xhat.detach())


def discount(x: Tensor, alpha: float) -> Tensor:
    """Eq. 9, the network's input: alpha x + (1 - alpha) sg(x). It is x, bitwise, with alpha times the gradient."""
    return x.detach() + alpha * (x - x.detach())


def leap(velocity: Velocity, ro: Rollout, picks: tuple[int, ...], alpha: float, nested_only: bool = False) -> Tensor:
    """x_0 (b, n, c) with the value of the rollout and the gradient of the leaps, as the paper states it.

    Holds the activations of all leaps until differentiated.  `nested_only` is Eq. 14, a diagnostic: earlier
    leaps count only through the input of the last network, so of two leaps the single-step term at k is gone.
    """
    x = ro.x[picks[0]]
    for start, end in spans(ro, picks):
        k, j = ro.sigmas[start], ro.sigmas[end]
        v = velocity(discount(x, alpha), k).to(x.dtype)
        if nested_only and end == len(ro.v):
            x = x.detach()  # Eq. 14
        xhat = one_step(x, v, k, j)  # Eq. 4, and Eq. 9 in place of Eq. 5
        x = connect(ro.x[end], xhat)  # Eq. 6, 7
    return x


class Term(NamedTuple):
    """How a surrogate's x_0 depends on one velocity of the rollout."""

    step: int
    weight: Tensor  # dx_0/dv, a number: -(k - j) of a leap from k to j (Eq. 3), sigma_{i+1} - sigma_i of an Euler step
    nested: float = 0.0  # how much of dv/dx is kept: alpha of Eq. 9


def leap_terms(ro: Rollout, picks: tuple[int, ...], alpha: float) -> list[Term]:
    """The terms of leaps from `picks`: x_0 moves by -(k - j) dv; no gradient goes back beyond the first leap."""
    terms = []
    for start, end in spans(ro, picks):
        nested = alpha if start != picks[0] else 0.0
        terms.append(Term(start, ro.sigmas[end] - ro.sigmas[start], nested))
    return terms


def sweep(vjp: VJP, ro: Rollout, terms: Sequence[Term], grad: Tensor) -> None:
    """Add (dx_0/dtheta)^T grad to the weights' `.grad`, last term first, the activations of one call at a time.

    grad (b, n, c) is dL/dx_0.  For the terms of two leaps this is Eq. 10,

    dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv(x_j)/dx_j dv(x_k)/dtheta

    transposed and applied to grad: the first pass of the loop adds the first term, the second the other two.
    """
    a = grad  # dL/dx at the end of the leap
    for step, weight, nested in reversed(terms):
        through_network = vjp(ro.x[step], ro.sigmas[step], weight * a, wrt_x=nested != 0)
        if nested:
            a = a + nested * through_network  # Eq. 9: outside of the network the gradient is whole, inside discounted


def sweep_nested_only(vjp: VJP, ro: Rollout, terms: Sequence[Term], grad: Tensor) -> None:
    """Eq. 14, a diagnostic: the terms before the last count only through the input of its network."""
    *earlier_terms, (step, weight, nested) = terms
    through_network = vjp(ro.x[step], ro.sigmas[step], weight * grad, wrt_x=True)
    sweep(vjp, ro, earlier_terms, nested * through_network)


def vjp_of(velocity: Velocity) -> VJP:
    """(dv/dtheta)^T u, added to the weights' `.grad`, and (dv/dx)^T u, returned if asked for; by autograd."""

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        x = x.detach().requires_grad_(wrt_x)
        velocity(x, sigma).to(x.dtype).backward(u)
        return x.grad

    return vjp


# ------------------------------------------------------------------------------------ the objective


@torch.no_grad()  # Eq. 13 has sg(w)
def similarity_weight(
    ro: Rollout, picks: tuple[int, ...], tau: float, use: Literal["both", "d_j", "d_0", "none"] = "both"
) -> tuple[Tensor, Tensor]:
    """Eq. 12: the weight of each sample, (b,), and the distances it comes from, (leaps, b).

        w = 1 / (max(d_j, tau) + max(d_0, tau))

    d is the mean absolute difference, over all entries of a latent, between where the rollout is at the end
    of a leap and where the leap lands; each further leap adds a term.  w is at most 1 / (tau times the
    number of terms).
    `use` is an ablation of the paper: d_0 is the last leap's term alone, d_j those of the leaps before it,
    and none means w = 1.  Raises ValueError for the d_j of a single leap.
    """
    x, v, sigmas = ro
    gaps = []
    for start, end in spans(ro, picks):
        landing = one_step(x[start], v[start], sigmas[start], sigmas[end])
        gap = (x[end] - landing).abs()  # (b, n, c)
        gaps.append(gap.flatten(1).mean(1))
    d = torch.stack(gaps)  # (leaps, b)
    if use == "none":
        return torch.ones_like(d[0]), d
    if use == "d_j" and len(picks) == 1:
        raise ValueError("a weight from d_j needs two leaps or more: a single leap has d_0 only")
    distances = {"both": d, "d_j": d[:-1], "d_0": d[-1:]}[use]
    return 1 / distances.clamp(min=tau).sum(0), d


def hinge(reward: Tensor, lam: float | None) -> Tensor:
    """Eq. 11: max(0, lam - r), (b,): a reward of lam or more has no gradient, as raising it further invites hacking.

    lam is in the units of the reward; None means no hinge: the result is -r.
    """
    return -reward if lam is None else torch.relu(lam - reward)


# --------------------------------------------------------------------------------------- the method


class Samples(NamedTuple):
    """All that a method may know of its samples, which may be a part of a batch."""

    noise: Callable[[int], Tensor]  # the i-th Gaussian of each sample, (b, n, c); noise(0) is x_1
    sigmas: Tensor  # (T + 1,), from 1 down to 0
    generator: torch.Generator  # on the CPU, alike for all parts of a batch: for what samples share, such as steps
    velocity: Velocity  # without gradient
    base: Velocity | None  # the untuned network's velocity, without gradient; None for a method that never asks for it
    vjp: VJP  # x, sigma, u: adds (dv/dtheta)^T u to the weights' .grad; with wrt_x=True returns (dv/dx)^T u
    reward: Callable[..., Tensor]  # x_0, weight (b,) = 1 -> dL/dx_0, L the batch's mean of weight x hinge (Eq. 11, 13)
    score: Callable[[Tensor], Tensor]  # x_0 -> (b,), the weighted sum of the rewards, which need no gradient
    total: int  # how many samples this rank has in the update, these and perhaps others: a loss is divided by it
    update: int  # number of the update, from 0: for methods whose settings change while they train


def leapalign(
    s: Samples,
    *,
    alpha: float = 0.3,
    tau: float = 0.1,
    leaps: int = 2,
    weight: Literal["both", "d_j", "d_0", "none"] = "both",
    reward_input: Literal["x_0", "xhat_0"] = "x_0",
    low: float = 0.0,
    high: float = 1.0,
    distance: float | None = None,
    by_level: bool = False,
    nested_only: bool = False,
) -> dict[str, Tensor]:
    """LeapAlign (arXiv 2604.15311), Eq. 3-13, with the paper's defaults for HPSv2.1; other values are its ablations.

    Each keyword is a flag, which config.py describes.  Returns k and j, (), and d_j, d_0 and w, (b,), to log.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    picks = pick_leaps(ro.sigmas, s.generator, leaps, low, high, distance, by_level)
    w, d = similarity_weight(ro, picks, tau, weight)  # Eq. 12, from cached velocities: no network call
    x0 = ro.x[-1] if reward_input == "x_0" else prediction(ro, picks[-1])
    grad = s.reward(x0, w)  # Eq. 11, 13: dL/dx_0, through reward and VAE
    backward = sweep_nested_only if nested_only else sweep
    backward(s.vjp, ro, leap_terms(ro, picks, alpha), grad)  # Eq. 10, leap by leap
    d_j = d[:-1].mean(0) if leaps > 1 else torch.zeros_like(w)
    return dict(k=ro.sigmas[picks[0]], j=ro.sigmas[picks[-1]], d_j=d_j, d_0=d[-1], w=w)
