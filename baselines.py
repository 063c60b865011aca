"""What LeapAlign is compared with: every other gradient, a function each.

    refl  draft_lv  drtune  full                      the paper's baselines: the reward's gradient through some steps
    flowbp_sparse  flowbp_bridge  flowbp_lagrange     its successor (FlowBP, arXiv 2606.11075)
    flow_grpo  dance_grpo  mix_grpo                   policy gradients: the reward needs no gradient of its own

Each adds its gradient to the weights through `Samples.vjp` and returns what to log, as leapalign does.  A direct
gradient is a rollout, a choice among its velocities (`Term`), and a sweep over them; a policy gradient is a random
walk, and the gradient of the log-probability of its random steps.

Legend as in leaps.py: b samples, T steps, sigma noise levels, k > j two of them; the steps that start at k and j are
`first` and `second`.
"""

import itertools
from collections.abc import Container, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from leaps import Samples, Term, one_step, pick_leaps, prediction, rollout, sweep

Log = dict[str, Tensor]


# ------------------------------------------------------------------------- the paper's baselines, its Algorithm 1


def refl(s: Samples, *, last: int | None = None) -> Log:
    """ReFL (arXiv 2304.05977): one velocity, that of a late step, and the reward of where it points.

    The step is one of the last 11 of 25, as in LeapAlign's comparison, or of the `last` K; steps after it are never
    computed.
    """
    i = late_step(s, last)
    ro = rollout(s.velocity, s.noise(0), s.sigmas[: i + 2])
    sweep(s.vjp, ro, [Term(i, -s.sigmas[i])], s.reward(prediction(ro, i)))
    return dict(k=s.sigmas[i])


def draft_lv(s: Samples, *, copies: int = 2) -> Log:
    """DRaFT-LV (arXiv 2309.17400): the last step, and again from `copies` of x_0 with fresh noise; n = 2 in the paper.

    The gradients are summed; what is logged of the reward is a mean over the images.
    """
    ro, k = rollout(s.velocity, s.noise(0), s.sigmas), s.sigmas[-2]
    s.vjp(ro.x[-2], k, -k * s.reward(ro.x[-1]))
    for n in range(1, copies + 1):
        x = (1 - k) * ro.x[-1] + k * s.noise(n)
        s.vjp(x, k, -k * s.reward(one_step(x, s.velocity(x, k), k, s.sigmas[-1])))
    return {}


def drtune(s: Samples, *, active: int = 2) -> Log:
    """DRTune (arXiv 2405.00760): the velocities of equally spaced steps, with detached inputs.

    A late step, drawn as ReFL's, ends the rollout, and its prediction is rewarded.  `active` steps of all T, K = 2 in
    the paper, the first of them random, carry gradient, those that lie after the late one none, and the late one itself
    only if it is among them.
    """
    stop, steps = late_step(s), len(s.sigmas) - 1
    active = min(active, steps)
    apart = steps // active
    firsts = min(steps - (active - 1) * apart, stop + 1)  # so that one step at least has a gradient
    first = int(torch.randint(firsts, (), generator=s.generator))
    ro = rollout(s.velocity, s.noise(0), s.sigmas[: stop + 2])
    chosen = range(first, stop + 1, apart)[:active]
    terms = [Term(i, -s.sigmas[i] if i == stop else s.sigmas[i + 1] - s.sigmas[i]) for i in chosen]
    sweep(s.vjp, ro, terms, s.reward(prediction(ro, stop)))
    return dict(k=s.sigmas[stop])


def full(s: Samples, *, last: int | None = None) -> Log:
    """The true gradient, through all T steps; through the `last` K of them it is DRaFT-K (arXiv 2309.17400)."""
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    first = 0 if last is None else max(0, len(ro.v) - last)
    sweep(s.vjp, ro, euler_terms(ro.sigmas, range(first, len(ro.v)), nested=1.0), s.reward(ro.x[-1]))
    return {}


def late_step(s: Samples, last: int | None = None) -> int:
    """A random one of the last 11 of 25 steps, of other T in proportion; or of the `last` K."""
    steps = len(s.sigmas) - 1
    window = max(1, round(steps * 11 / 25)) if last is None else min(last, steps)
    return steps - 1 - int(torch.randint(window, (), generator=s.generator))


def euler_terms(sigmas: Tensor, steps: Sequence[int], nested: float = 0.0) -> list[Term]:
    """How x_0 depends on the velocities of `steps` of the rollout; no gradient goes back beyond the first."""
    return [Term(i, sigmas[i + 1] - sigmas[i], nested if i != steps[0] else 0.0) for i in steps]


# --------------------------------------------------------------------------------- FlowBP, arXiv 2606.11075


def flowbp_sparse(s: Samples, *, active: int = 3, bias: float = 2.0, rho: float = 1.0) -> Log:
    """FlowBP Sparse: x_0 = x_1 + sum of dsigma v over the rollout, the velocities of `active` steps with gradient.

    Steps are drawn with odds (i + 1)^bias, late ones first; inputs are detached.  Defaults: its FLUX.1-dev settings.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    steps = draw_steps(range(len(ro.v)), active, bias, s.generator)
    sweep(s.vjp, ro, rescaled(euler_terms(ro.sigmas, steps), ro.sigmas[0], rho), s.reward(ro.x[-1]))
    return {}


def flowbp_bridge(s: Samples, *, active: int = 5, alpha: float = 0.1, bias: float = 2.0, rho: float = 1.0) -> Log:
    """FlowBP Bridge: as Sparse, but the input of the step at j, drawn as LeapAlign's, keeps its gradient, times alpha.

    The active steps are shared out to both sides of it by their numbers of steps; it is always one of them.
    """
    ro, steps = rollout(s.velocity, s.noise(0), s.sigmas), len(s.sigmas) - 1
    if min(steps, active) < 2:
        raise ValueError(f"flowbp_bridge needs two steps and two of them active, got {steps} and {active}")
    _, second = pick_leaps(s.sigmas, s.generator)
    before = min(max(round(active * second / steps), 1), active - 1)
    chosen = draw_steps(range(second), before, bias, s.generator)
    chosen += [second, *draw_steps(range(second + 1, steps), active - before - 1, bias, s.generator)]
    terms = [t._replace(nested=alpha) if t.step == second else t for t in euler_terms(ro.sigmas, chosen)]
    sweep(s.vjp, ro, rescaled(terms, ro.sigmas[0], rho), s.reward(ro.x[-1]))
    return dict(j=ro.sigmas[second])


def flowbp_lagrange(
    s: Samples,
    *,
    draw: Literal["uniform", "midpoint", "midpoint_j", "dirichlet"] = "dirichlet",
    nodes: int = 3,
    alpha: float = 0.1,
    tau: float = 0.2,
    rho: float = 0.5,
) -> Log:
    """FlowBP Lagrange: LeapAlign's two leaps, each along the polynomial through `nodes` of the rollout's velocities.

    The leaps land nearer to the rollout.  A leap's first two velocities carry gradient, the second a quarter of it.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    first, second = draw_pair(ro.sigmas, s.generator, draw)
    terms, d = [], []
    for start, end in ((first, second), (second, len(ro.v))):
        spread = torch.linspace(start, end - 1, min(nodes, end - start)).round().int().tolist()
        weights = lagrange_weights(ro.sigmas[spread], ro.sigmas[start], ro.sigmas[end])
        landed = ro.x[start] + torch.einsum("m, m b n c -> b n c", weights, ro.v[spread])
        d.append((ro.x[end] - landed).abs().flatten(1).mean(1))  # as in Eq. 12
        two = [Term(i, weight) for i, weight in zip(spread[:2], weights)]
        two = rescaled(two, weights.abs().sum(), rho)
        terms += [t if t.step == start else t._replace(weight=t.weight / 4) for t in two]
    terms = [t._replace(nested=alpha) if t.step == second else t for t in terms]
    w = 1 / torch.stack(d).clamp(min=tau).sum(0)
    sweep(s.vjp, ro, terms, s.reward(ro.x[-1], w))
    return dict(k=ro.sigmas[first], j=ro.sigmas[second], d_j=d[0], d_0=d[1], w=w)


def draw_steps(steps: range, count: int, bias: float, generator: torch.Generator) -> list[int]:
    """Up to `count` of the steps, in order, without replacement; the odds of the i-th of them are (i + 1)^bias."""
    count = min(count, len(steps))
    if count < 1:
        return []
    odds = torch.arange(1, len(steps) + 1, dtype=torch.float64) ** bias
    chosen = torch.multinomial(odds, count, replacement=False, generator=generator)
    return sorted(steps[i] for i in chosen.tolist())


def rescaled(terms: list[Term], total: Tensor, rho: float) -> list[Term]:
    """Terms times 1 + rho (total / sum |weight| - 1): rho = 1 makes their sizes sum to `total`, 0 leaves them.

    The total is that of all steps, with gradient or without: sigma_0 of a rollout's Euler steps, which go down to 0.
    """
    factor = 1 + rho * (total / sum(t.weight.abs() for t in terms) - 1)
    return [t._replace(weight=factor * t.weight) for t in terms]


def lagrange_weights(nodes: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Weights of the velocities at levels `nodes` (m,): the integral from start to end of the polynomial through them.

    They are exact for 1, sigma, ..., sigma^(m - 1), which is what is solved for.
    """
    at, to = (nodes - start).cpu().double(), (end - start).cpu().double()  # a few numbers; not all devices have float64
    powers = torch.arange(len(nodes), dtype=torch.float64)
    moments = to ** (powers + 1) / (powers + 1)
    return torch.linalg.solve(at[None] ** powers[:, None], moments).to(nodes)


def draw_pair(sigmas: Tensor, generator: torch.Generator, draw: str) -> tuple[int, int]:
    """FlowBP's ways of drawing the two steps that leaps start from, the earlier one first.

    uniform: as LeapAlign.  midpoint: the first is uniform, the second halfway from it to the end.  midpoint_j: the
    second is uniform, the first halfway from the start to it.  dirichlet: the numbers of steps up to the first and with
    it, from there to the second, and after, in the proportions of a Dirichlet(2, 6, 2.5), rounded, each at least one.
    Raises ValueError if there are too few steps.
    """
    steps = len(sigmas) - 1
    if steps < (least := 3 if draw == "dirichlet" else 2):
        raise ValueError(f"--draw {draw} needs {least} steps, and a rollout has {steps}")
    if draw == "uniform":
        return pick_leaps(sigmas, generator)
    if draw == "midpoint":
        first = int(torch.randint(steps - 1, (), generator=generator))
        return first, first + (steps - first) // 2
    if draw == "midpoint_j":
        second = int(torch.randint(1, steps, (), generator=generator))
        return second // 2, second
    # A Gamma(n / 2) is half the sum of n squared Gaussians, and Gammas in proportion are a Dirichlet.
    shares = torch.stack([torch.randn(n, generator=generator).square().sum() for n in (4, 12, 5)])
    lengths = (steps * shares / shares.sum()).round().long()
    lengths[shares.argmax()] += steps - lengths.sum()  # what rounding took or gave
    lengths = lengths.clamp(min=1)
    lengths[lengths.argmax()] += steps - lengths.sum()  # what others lacked
    up_to_first, to_second, _ = lengths.tolist()
    return up_to_first - 1, up_to_first - 1 + to_second


# ------------------------------------------------------------------------------------ policy gradients


def flow_grpo(s: Samples, *, group: int = 8, noise: float = 0.7) -> Log:
    """Flow-GRPO (arXiv 2505.05470), on policy: noise of eta = a sqrt(sigma / (1 - sigma)), a = 0.7.

    The last step has no noise.  The paper's group has 24 samples of a prompt.  With one update a rollout the ratio of
    probabilities is one, so its clipping would do nothing; nor is there a KL term.
    """
    below = s.sigmas.where(s.sigmas < 1, s.sigmas[1])  # at pure noise eta would be infinite
    eta = noise * (s.sigmas / (1 - below)).sqrt()
    x0, moves = random_walk(s, s.noise(0), eta, range(len(s.sigmas) - 2))
    return policy_gradient(s, x0, moves, group)


def dance_grpo(s: Samples, *, group: int = 8, noise: float = 0.3) -> Log:
    """DanceGRPO (arXiv 2505.07818), on policy: noise of eta = 0.3, one x_1 for all of a group.

    The last step has no noise.  The paper's group has 12 samples of a prompt.
    """
    x0, moves = random_walk(s, shared_noise(s, group), s.sigmas.new_full((), noise), range(len(s.sigmas) - 2))
    return policy_gradient(s, x0, moves, group)


def mix_grpo(s: Samples, *, group: int = 8, noise: float = 0.3, window: int = 4, every: int = 25) -> Log:
    """MixGRPO (arXiv 2507.21802), on policy: as DanceGRPO, but random and trained in a window of steps only.

    The window is at the noisy end at first and moves on by a step each `every` updates, 25 of 300 in the paper.
    """
    last = len(s.sigmas) - 2  # the last step is never random
    first = min(s.update // every, max(0, last - window))
    steps = range(first, min(first + window, last))
    x0, moves = random_walk(s, shared_noise(s, group), s.sigmas.new_full((), noise), steps)
    return policy_gradient(s, x0, moves, group)


class Move(NamedTuple):
    """A random step of a walk."""

    step: int
    x: Tensor  # where it began, (b, n, c)
    dlogp: Tensor  # the gradient of its log-probability, a mean over n and c, in the velocity: (b, n, c)


def transition(x: Tensor, v: Tensor, sigma: Tensor, delta: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and dmean/dv of a step of the SDE with noise eta that has the ODE's marginals.

    dx = (v - eta^2 / 2 score) dsigma + eta dw, where score = -(x + (1 - sigma) v) / sigma; delta < 0 is the step.
    Flow-GRPO and DanceGRPO write their means in other ways; both are this one, with an eta of their own.
    """
    score = -(x + (1 - sigma) * v) / sigma
    mean = x + delta * (v - eta**2 / 2 * score)
    return mean, eta * (-delta).sqrt(), delta * (1 + eta**2 / 2 * (1 - sigma) / sigma)


def random_walk(s: Samples, x: Tensor, eta: Tensor, random: Container[int]) -> tuple[Tensor, list[Move]]:
    """x_0 of a rollout whose steps in `random` are the SDE's, with noise `eta` (or one a step), and those steps.

    The last step should not be one: its noise would stay in the image.
    """
    moves, eta = [], eta.expand(len(s.sigmas))
    for i, (now, after) in enumerate(itertools.pairwise(s.sigmas)):
        v = s.velocity(x, now)
        if i in random:
            mean, std, by_v = transition(x, v, now, after - now, eta[i])
            noise = s.noise(i + 1)
            # log p = -(x' - mean)^2 / (2 std^2) + ..., and x' - mean = std noise
            moves.append(Move(i, x, by_v * noise / std / noise[0].numel()))
            x = mean + std * noise
        else:
            x = one_step(x, v, now, after)
    return x, moves


def policy_gradient(s: Samples, x0: Tensor, moves: list[Move], group: int) -> Log:
    """Raise the log-probability of the moves of samples that are better than their group."""
    scores = s.score(x0)
    advantage = advantages(scores, group)
    for step, x, dlogp in moves:
        s.vjp(x, s.sigmas[step], -advantage[:, None, None] * dlogp / len(moves) / s.total)
    return dict(advantage=advantage.abs())


def advantages(scores: Tensor, group: int, largest: float = 5.0) -> Tensor:
    """Scores (b,) of groups of neighbours, normalised to mean zero and deviation one within each, clipped: (b,)."""
    if group < 2 or len(scores) % group:
        raise ValueError(f"{len(scores)} samples do not divide into groups of {group}, which must be at least 2")
    of_group = scores.view(-1, group)
    centred = of_group - of_group.mean(1, keepdim=True)
    return (centred / (of_group.std(1, keepdim=True) + 1e-6)).clamp(-largest, largest).flatten()


def shared_noise(s: Samples, group: int) -> Tensor:
    """The x_1 of each group's first sample for all of the group: then only the walk's noise tells them apart."""
    return s.noise(0)[::group].repeat_interleave(group, 0)
