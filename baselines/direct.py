"""The gradients that LeapAlign is compared with: one function per method.

    refl  draft_lv  drtune  full                      direct gradients: the baselines of LeapAlign's paper
    flowbp_sparse  flowbp_bridge  flowbp_lagrange     direct gradients: FlowBP, which builds on LeapAlign
    flow_grpo  dance_grpo  mix_grpo                   policy gradients: the reward needs no gradient

A method adds its gradient to the weights through `Samples.vjp` and returns what to log, as `leapalign` does.

A direct gradient (1) rolls out without gradient, (2) selects the velocities that carry gradient and states how
x_0 depends on each of them, a `Term`, and (3) sweeps back over the terms from dL/dx_0, one network call at a time.

A policy gradient (1) walks from noise to x_0 with some random steps, (2) compares the scores of the samples of
one prompt, and (3) raises the log-probability of the random steps that led to the better samples.

Legend as in leaps.py: b samples, n tokens, c channels, T steps.  k > j are noise levels, and `first` and `second`
are the indices of the steps that start at k and j.  sg( ) is stop-gradient.
"""

import itertools
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leaps import Samples, Term, one_step, pick_leaps, prediction, rollout, sweep

Log = dict[str, Tensor]


# ------------------------------------------------------- direct gradients: the baselines of LeapAlign's paper


def refl(s: Samples, *, last: int | None = None) -> Log:
    """ReFL: the gradient of one late velocity, for the reward of the image that it predicts.

    ReFL (arXiv 2304.05977), Algorithm 1.  The step is drawn from the last `last` steps; the default, 11 of 25, is
    LeapAlign's setting of this baseline.  ReFL's pre-training loss is left out there, and here.
    """
    # 1. Roll out up to the end of a late step.  The steps after it are never computed.
    step = late_step(s, last)
    sigmas = s.sigmas[: step + 2]
    ro = rollout(s.velocity, s.noise(0), sigmas)

    # 2. The reward sees xhat_0 = sg(x) - sigma v.
    sigma = sigmas[step]
    term = Term(step, -sigma)

    # 3. Sweep back over this one term.
    xhat_0 = prediction(ro, step)
    grad = s.reward(xhat_0)
    sweep(s.vjp, ro, [term], grad)
    return dict(k=sigma)


def draft_lv(s: Samples, *, copies: int = 2) -> Log:
    """DRaFT-LV: the gradient of the last step, from the rollout and from `copies` of x_0 with fresh noise.

    DRaFT (arXiv 2309.17400), Algorithm 1.  The default is n = 2 of the paper.  The gradients are summed, not
    averaged; the logged reward is a mean over all images.
    """
    # 1. Roll out; sigma is the noise level that the last step starts from.
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    x, x_0 = ro.x[-2:]
    sigma, zero = s.sigmas[-2:]

    # 2. The last step is x_0 = sg(x) - sigma v, so dL/dv = -sigma dL/dx_0.
    grad = s.reward(x_0)
    s.vjp(x, sigma, -sigma * grad)

    # 3. Low variance: add fresh noise to x_0, and differentiate the last step from there, too.
    for i in range(1, copies + 1):
        noise = s.noise(i)
        x = (1 - sigma) * x_0 + sigma * noise
        v = s.velocity(x, sigma)
        xhat_0 = one_step(x, v, sigma, zero)
        grad = s.reward(xhat_0)
        s.vjp(x, sigma, -sigma * grad)
    return {}


def drtune(s: Samples, *, active: int = 2) -> Log:
    """DRTune: the gradient of equally spaced velocities with detached inputs, for the reward of a late prediction.

    DRTune (arXiv 2405.00760), Algorithm 1.  The default is K = 2 of the paper.  The rollout stops at a late step,
    drawn as ReFL's.  The K steps are spread over all T with a random offset; steps after the stop carry no gradient,
    and the stop itself does only if it is one of the K.
    """
    # 1. Draw the stop and the offset.  A larger offset would leave no step with gradient.
    steps = len(s.sigmas) - 1
    stop = late_step(s)
    active = min(active, steps)
    spacing = steps // active
    offsets = steps - (active - 1) * spacing
    offsets = min(offsets, stop + 1)
    offset = draw_index(offsets, s.generator)
    active_steps = range(offset, stop + 1, spacing)[:active]

    # 2. Euler steps up to the stop, then the prediction: xhat_0 = x_1 + sum of dsigma v.
    sigmas = s.sigmas[: stop + 2]
    ro = rollout(s.velocity, s.noise(0), sigmas)
    dsigma = sigmas.diff()
    dsigma[stop] = -sigmas[stop]  # the prediction goes down to noise level 0
    terms = [Term(i, dsigma[i]) for i in active_steps]

    # 3. Sweep back; no term passes gradient through its input.
    xhat_0 = prediction(ro, stop)
    grad = s.reward(xhat_0)
    sweep(s.vjp, ro, terms, grad)
    return dict(k=s.sigmas[stop])


def full(s: Samples, *, last: int | None = None) -> Log:
    """Full backpropagation: the true gradient, through all T steps.

    With `last`, through the last K steps only: DRaFT-K (arXiv 2309.17400), Algorithm 1.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    steps = len(ro.v)
    first = 0 if last is None else max(0, steps - last)

    # With all of dv/dx kept, the sweep over the Euler steps is backpropagation.
    dsigma = ro.sigmas.diff()
    terms = []
    for i in range(first, steps):
        nested = 1.0 if i > first else 0.0  # no gradient goes back beyond the first step
        terms.append(Term(i, dsigma[i], nested))

    grad = s.reward(ro.x[-1])
    sweep(s.vjp, ro, terms, grad)
    return {}


def late_step(s: Samples, last: int | None = None) -> int:
    """A random step of the last `last` steps; by default of the last 11 of 25, in proportion for other T."""
    steps = len(s.sigmas) - 1
    if last is None:
        last = max(1, round(steps * 11 / 25))
    window = min(last, steps)
    return steps - 1 - draw_index(window, s.generator)


def draw_index(count: int, generator: torch.Generator) -> int:
    """A uniform index below `count`, alike on all ranks."""
    return int(torch.randint(count, (), generator=generator))


# ------------------------------------------------------------- direct gradients: FlowBP (arXiv 2606.11075)


def flowbp_sparse(
    s: Samples,
    *,
    active: int = 3,
    bias: float = 2.0,
    rho: float = 1.0,
) -> Log:
    """FlowBP-Sparse: the gradient of a few velocities of the Euler sum, with detached inputs.

    FlowBP (arXiv 2606.11075), Sparse.  `active` steps are drawn with odds (i + 1)^bias, so late steps are likely;
    `rho` scales their weights up to the whole trajectory.  The defaults are those of the paper's FLUX.1-dev config.
    """
    # 1. Roll out, and draw the active steps.
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    all_steps = range(len(ro.v))
    steps = draw_steps(all_steps, active, bias, s.generator)

    # 2. x_0 = x_1 + sum of dsigma v, where v has a gradient at the active steps.
    dsigma = ro.sigmas.diff()
    terms = [Term(i, dsigma[i]) for i in steps]
    total = ro.sigmas[0]  # of |dsigma| over all T steps, which go down to 0
    terms = rescaled(terms, total, rho)

    # 3. Sweep back from the real x_0.
    grad = s.reward(ro.x[-1])
    sweep(s.vjp, ro, terms, grad)
    return {}


def flowbp_bridge(
    s: Samples,
    *,
    active: int = 5,
    alpha: float = 0.1,
    bias: float = 2.0,
    rho: float = 1.0,
) -> Log:
    """FlowBP-Bridge: as Sparse, but one active step, the bridge, also passes gradient through its input.

    FlowBP (arXiv 2606.11075), Bridge.  The bridge starts at j, drawn as in LeapAlign, and its input's gradient is
    scaled by alpha.  The defaults are those of the paper's FLUX.1-dev config.  Raises ValueError for fewer than two
    steps or two active steps.
    """
    steps = len(s.sigmas) - 1
    if min(steps, active) < 2:
        raise ValueError(f"flowbp_bridge needs two steps and two of them active, got {steps} and {active}")

    # 1. Roll out, and draw the bridge.
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    _, bridge = pick_leaps(s.sigmas, s.generator)

    # 2. The active steps are divided in proportion to the lengths of the two sides. The noisy side gets at least one,
    # and the bridge itself counts on the clean side.
    noisy_count = max(1, round(active * bridge / steps))
    noisy_count = min(noisy_count, active - 1)  # the bridge itself is active
    clean_count = active - noisy_count - 1
    noisy_side, clean_side = range(bridge), range(bridge + 1, steps)
    noisy_steps = draw_steps(noisy_side, noisy_count, bias, s.generator)
    clean_steps = draw_steps(clean_side, clean_count, bias, s.generator)

    # 3. The Euler sum as in Sparse; the bridge's input is alpha x + (1 - alpha) sg(x), Eq. 9 of LeapAlign.
    dsigma = ro.sigmas.diff()
    terms = [Term(i, dsigma[i]) for i in noisy_steps]
    terms += [Term(bridge, dsigma[bridge], alpha)]
    terms += [Term(i, dsigma[i]) for i in clean_steps]
    total = ro.sigmas[0]
    terms = rescaled(terms, total, rho)

    # 4. Sweep back from the real x_0.
    grad = s.reward(ro.x[-1])
    sweep(s.vjp, ro, terms, grad)
    return dict(j=ro.sigmas[bridge])


def flowbp_lagrange(
    s: Samples,
    *,
    draw: Literal["uniform", "midpoint", "midpoint_j", "dirichlet"] = "dirichlet",
    nodes: int = 3,
    alpha: float = 0.1,
    tau: float = 0.2,
    rho: float = 0.5,
) -> Log:
    """FlowBP-Lagrange: LeapAlign's two leaps, each along a polynomial through `nodes` of the rollout's velocities.

    FlowBP (arXiv 2606.11075), Lagrange.  Such a leap lands closer to the rollout than one along a single velocity.
    The defaults are those of the paper's FLUX.1-dev config.
    """
    # 1. Roll out, and draw the two steps that the leaps start from.
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    sigmas, steps = ro.sigmas, len(ro.v)
    first, second = draw_pair(sigmas, s.generator, draw)

    terms, distances = [], []
    for start, end in ((first, second), (second, steps)):
        # 2. The leap integrates the polynomial through nodes that are spread over its steps, from its start on.
        count = min(nodes, end - start)
        spread = torch.linspace(start, end - 1, count)
        node_steps = spread.round().int().tolist()
        node_sigmas = sigmas[node_steps]
        weights = lagrange_weights(node_sigmas, sigmas[start], sigmas[end])
        integral = torch.einsum("m, m b n c -> b n c", weights, ro.v[node_steps])
        xhat = ro.x[start] + integral
        gap = (ro.x[end] - xhat).abs()
        distances.append(gap.flatten(1).mean(1))  # (b,), Eq. 12 of LeapAlign

        # 3. The first two velocities carry gradient.  The second leap passes alpha of it to its input.
        nested = alpha if start == second else 0.0
        active = [Term(start, weights[0], nested)]
        if count > 1:
            active.append(Term(node_steps[1], weights[1]))
        total = weights.abs().sum()
        active = rescaled(active, total, rho)
        terms.append(active[0])
        for term in active[1:]:
            quarter = term.weight / 4  # as in FlowBP's config
            terms.append(term._replace(weight=quarter))

    # 4. Weight each sample by how closely its leaps follow the rollout, Eq. 12 of LeapAlign, and sweep back.
    w = 1 / torch.stack(distances).clamp(min=tau).sum(0)
    grad = s.reward(ro.x[-1], w)
    sweep(s.vjp, ro, terms, grad)
    d_j, d_0 = distances
    return dict(k=sigmas[first], j=sigmas[second], d_j=d_j, d_0=d_0, w=w)


def draw_steps(steps: range, count: int, bias: float, generator: torch.Generator) -> list[int]:
    """Up to `count` of the steps, increasing, without replacement; the i-th of them has odds (i + 1)^bias."""
    count = min(count, len(steps))
    if count < 1:
        return []
    numbers = torch.arange(1, len(steps) + 1, dtype=torch.float64)
    odds = numbers**bias
    indices = torch.multinomial(odds, count, generator=generator)
    return sorted(steps[i] for i in indices.tolist())


def rescaled(terms: list[Term], total: Tensor, rho: float) -> list[Term]:
    """Terms with weights times 1 + rho (total / sum |weight| - 1).

    `total` is the sum of |weight| over all velocities that the terms stand for, of a rollout or of a leap.  At rho = 1
    the |weight| of the terms sums to `total`.  At rho = 0 the terms stay as they are.
    """
    active_total = sum(term.weight.abs() for term in terms)
    factor = 1 + rho * (total / active_total - 1)
    return [term._replace(weight=factor * term.weight) for term in terms]


def lagrange_weights(nodes: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Weights (m,) of the velocities at noise levels `nodes` (m,) in a leap from level `start` to level `end`.

    The weighted sum is the integral of the polynomial through the velocities.  It is exact for the polynomials
    1, sigma, ..., sigma^(m - 1), and the weights are the solution of these m equations.
    """
    # In float64 on the CPU: some devices have no float64, and m is at most a handful.
    offsets = (nodes - start).cpu().double()
    length = (end - start).cpu().double()
    powers = torch.arange(len(nodes), dtype=torch.float64)
    values = offsets[None] ** powers[:, None]  # (m, m), a polynomial per row, a node per column
    integrals = length ** (powers + 1) / (powers + 1)  # (m,)
    return torch.linalg.solve(values, integrals).to(nodes)


def draw_pair(sigmas: Tensor, generator: torch.Generator, draw: str) -> tuple[int, int]:
    """FlowBP's four ways to draw the two steps that leaps start from, the noisier one first.

    uniform: as in LeapAlign.
    midpoint: the first is uniform, the second halfway from there to the end.
    midpoint_j: the second is uniform, the first halfway from the start to there.
    dirichlet: see `dirichlet_pair`.

    Raises ValueError if there are too few steps.
    """
    steps = len(sigmas) - 1
    minimum = 3 if draw == "dirichlet" else 2
    if steps < minimum:
        raise ValueError(f"--draw {draw} needs {minimum} steps, and a rollout has {steps}")

    if draw == "uniform":
        return pick_leaps(sigmas, generator)
    if draw == "midpoint":
        first = draw_index(steps - 1, generator)
        return first, first + (steps - first) // 2
    if draw == "midpoint_j":
        second = 1 + draw_index(steps - 1, generator)
        return second // 2, second
    return dirichlet_pair(steps, generator)


def dirichlet_pair(steps: int, generator: torch.Generator) -> tuple[int, int]:
    """Two steps that divide all `steps`, at least 3, in the proportions of a Dirichlet(2, 6, 2.5), FlowBP's config.

    The three lengths count the steps up to the first, it included, from there to the second, it included, and
    after the second.  Each is at least one.
    """
    # torch has no Dirichlet that takes a generator.
    seed = draw_index(2**31, generator)
    random = np.random.default_rng(seed)
    noisy_share, _, clean_share = random.dirichlet((2, 6, 2.5))

    # The outer lengths are rounded; the middle length, mostly the longest, is what remains.
    noisy_length = max(1, round(steps * noisy_share))
    noisy_length = min(noisy_length, steps - 2)
    clean_length = max(1, round(steps * clean_share))
    clean_length = min(clean_length, steps - noisy_length - 1)
    return noisy_length - 1, steps - clean_length - 1


# ------------------------------------------------------------------------------------- policy gradients


def flow_grpo(s: Samples, *, group: int = 8, noise: float = 0.7) -> Log:
    """Flow-GRPO: a policy gradient on walks whose noise follows the noise level: eta = a sqrt(sigma / (1 - sigma)).

    Flow-GRPO (arXiv 2505.05470), on policy.  The default a = 0.7 is the paper's; the paper's group is 24 samples of
    a prompt.  With one update per rollout the ratio of probabilities is 1, so clipping it would do nothing.  There is
    no KL term.
    """
    # At pure noise eta would be infinite: sigma_1 replaces sigma_0 = 1 in the denominator, as in the authors' code.
    sigmas = s.sigmas
    below_one = sigmas.where(sigmas < 1, sigmas[1])
    eta = noise * (sigmas / (1 - below_one)).sqrt()  # (T + 1,)

    # The last step is not random: its noise would stay in the image.
    random_steps = range(len(sigmas) - 2)
    x_1 = s.noise(0)
    x_0, moves = random_walk(s, x_1, eta, random_steps)
    return policy_gradient(s, x_0, moves, group)


def dance_grpo(s: Samples, *, group: int = 8, noise: float = 0.3) -> Log:
    """DanceGRPO: a policy gradient on walks with constant noise eta, which start from one x_1 per group.

    DanceGRPO (arXiv 2505.07818), on policy.  The default eta = 0.3 is the paper's; the paper's group is 12 samples
    of a prompt.
    """
    eta = torch.full_like(s.sigmas, noise)
    random_steps = range(len(s.sigmas) - 2)  # the last step is not random
    x_1 = shared_noise(s, group)
    x_0, moves = random_walk(s, x_1, eta, random_steps)
    return policy_gradient(s, x_0, moves, group)


def mix_grpo(
    s: Samples,
    *,
    group: int = 8,
    noise: float = 0.3,
    window: int = 4,
    shift_every: int = 25,
) -> Log:
    """MixGRPO: as DanceGRPO, but only the steps of a window are random and trained; all others are the ODE's.

    MixGRPO (arXiv 2507.21802), on policy.  The window begins at the noisy end and moves by a step after
    `shift_every` updates.  The defaults are the paper's 4 of 25 steps, and 25 of 300 updates.
    """
    end = len(s.sigmas) - 2  # the last step is not random
    final_start = max(0, end - window)  # where the window stays
    start = min(s.update // shift_every, final_start)
    random_steps = range(start, min(start + window, end))

    eta = torch.full_like(s.sigmas, noise)
    x_1 = shared_noise(s, group)
    x_0, moves = random_walk(s, x_1, eta, random_steps)
    return policy_gradient(s, x_0, moves, group)


class Move(NamedTuple):
    """A random step of a walk."""

    step: int
    x: Tensor  # (b, n, c), where the step starts
    dlogp_dv: Tensor  # (b, n, c), d log p / dv of the step; log p is the mean over n and c


def random_walk(
    s: Samples,
    x_1: Tensor,
    eta: Tensor,
    random_steps: range,
) -> tuple[Tensor, list[Move]]:
    """Walk from x_1 to x_0 by Euler steps of the ODE, and by random steps of the SDE at `random_steps`.

    eta (T + 1,) is the noise of the SDE at each noise level.  Returns x_0 and the random steps.
    """
    x, moves = x_1, []
    levels = itertools.pairwise(s.sigmas)
    for i, (sigma, next_sigma) in enumerate(levels):
        v = s.velocity(x, sigma)
        if i not in random_steps:
            x = one_step(x, v, sigma, next_sigma)
            continue
        dsigma = next_sigma - sigma
        mean, std, dmean_dv = transition(x, v, sigma, dsigma, eta[i])
        noise = s.noise(i + 1)
        # log p = -(x' - mean)^2 / (2 std^2) + ..., and x' - mean = std noise, so d log p / dmean = noise / std.
        dlogp_dv = dmean_dv * noise / std / noise[0].numel()
        moves.append(Move(i, x, dlogp_dv))
        x = mean + std * noise
    return x, moves


def transition(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    eta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and dmean/dv of an Euler-Maruyama step dsigma < 0 of the SDE

        dx = (v - eta^2 / 2 score) dsigma + eta dw,    score = -(x + (1 - sigma) v) / sigma

    which has the marginals of the ODE for every eta.  Flow-GRPO and DanceGRPO write their means in other forms; both
    are this SDE, each with its eta.
    """
    score = -(x + (1 - sigma) * v) / sigma
    mean = x + dsigma * (v - eta**2 / 2 * score)
    std = eta * (-dsigma).sqrt()
    dmean_dv = dsigma * (1 + eta**2 / 2 * (1 - sigma) / sigma)
    return mean, std, dmean_dv


def policy_gradient(s: Samples, x_0: Tensor, moves: list[Move], group: int) -> Log:
    """Add the gradient of -advantage log p, a mean over the batch and over the random steps."""
    scores = s.score(x_0)
    advantage = advantages(scores, group)  # (b,)
    weight = -advantage[:, None, None]  # (b, 1, 1)
    for step, x, dlogp_dv in moves:
        # s.total, not b: these samples may be a part of the batch.
        dloss_dv = weight * dlogp_dv / len(moves) / s.total
        s.vjp(x, s.sigmas[step], dloss_dv)
    return dict(advantage=advantage.abs())


def advantages(scores: Tensor, group: int, largest: float = 5.0) -> Tensor:
    """Scores (b,) in units of their group's standard deviation, from the group's mean: (b,), within +-`largest`.

    A group is `group` samples in a row, of one prompt.  The bound of 5 is that of Flow-GRPO's code.  Raises
    ValueError if the samples do not divide into groups of at least 2.
    """
    if group < 2 or len(scores) % group:
        raise ValueError(f"{len(scores)} samples do not divide into groups of {group}, which must be at least 2")
    group_scores = scores.view(-1, group)
    centred = group_scores - group_scores.mean(1, keepdim=True)
    deviation = group_scores.std(1, keepdim=True)
    normalised = centred / (deviation + 1e-6)  # 0, not NaN, where all scores are equal
    return normalised.clamp(-largest, largest).flatten()


def shared_noise(s: Samples, group: int) -> Tensor:
    """The first sample's x_1 for all samples of its group: they differ by the noise of the random steps alone."""
    x_1 = s.noise(0)
    first_of_group = x_1[::group]
    return first_of_group.repeat_interleave(group, 0)
