"""Gradients of a reward that is differentiated: one function per method.

    refl  draft_lv  drtune  full                      the baselines of LeapAlign's paper
    direct_align  vgg_flow                            a step from a noised x_0; a velocity that matches the gradient
    flowbp_sparse  flowbp_bridge  flowbp_lagrange     FlowBP, which builds on LeapAlign

A method adds its gradient to the weights through `Samples.vjp` and returns what to log, as `leapalign` does.  Methods
that take scores as they are, without a gradient, are in policy.py.

Most methods (1) roll out without gradient, (2) select the velocities that carry gradient and state how x_0 depends on
each of them, a `Term`, and (3) sweep back over the terms from dL/dx_0, one network call at a time.

Legend as in leaps.py: b samples, n tokens, c channels, T steps.  k > j are noise levels, and `first` and `second`
are the indices of the steps that start at k and j.  sg( ) is stop-gradient.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from leaps import Rollout, Samples, Term, one_step, pick_leaps, prediction, rollout, sweep

Log = dict[str, Tensor]


# ------------------------------------------------------------------------- the baselines of LeapAlign's paper


def refl(
    s: Samples,
    *,
    last: int | None = None,
    reward_input: Literal["x_0", "xhat_0"] | None = None,
) -> Log:
    """ReFL: the gradient of one late velocity, for the reward of the image that it predicts.

    ReFL (arXiv 2304.05977), Algorithm 1.  The step is drawn from the last `last` steps; the default, 11 of 25, is
    LeapAlign's setting of this baseline.  ReFL's pre-training loss is left out, as in LeapAlign's paper.  With
    `reward_input` x_0, the end of the rollout is rewarded instead of the prediction xhat_0, the default; FlowBP
    (arXiv 2606.11075) reports that this helps.
    """
    # 1. Roll out up to the end of a late step.
    step = late_step(s, last)
    ro, rewarded = late_rollout(s, step, reward_input)

    # 2. xhat_0 = sg(x) - sigma v.
    sigma = s.sigmas[step]
    term = Term(step, -sigma)

    # 3. Sweep back over this one term.
    grad = s.reward(rewarded)
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


def drtune(
    s: Samples,
    *,
    active: int = 2,
    reward_input: Literal["x_0", "xhat_0"] | None = None,
) -> Log:
    """DRTune: the gradient of equally spaced velocities with detached inputs, for the reward of a late prediction.

    DRTune (arXiv 2405.00760), Algorithm 1.  The default is K = 2 of the paper.  The rollout stops at a late step,
    drawn as ReFL's.  The K steps are spread over all T with a random offset; steps after the stop carry no gradient,
    and the stop itself does only if it is one of the K.  `reward_input` as in ReFL.
    """
    # 1. Draw the stop and the offset.  A larger offset would leave no step with gradient.
    steps = len(s.sigmas) - 1
    stop = late_step(s)
    active = min(active, steps)
    spacing = steps // active
    offset_count = steps - (active - 1) * spacing
    offset_count = min(offset_count, stop + 1)
    offset = draw_index(offset_count, s.generator)
    active_steps = range(offset, stop + 1, spacing)[:active]

    # 2. Euler steps up to the stop, then the prediction: xhat_0 = x_1 + sum of dsigma v.
    ro, rewarded = late_rollout(s, stop, reward_input)
    dsigma = s.sigmas.diff()
    dsigma[stop] = -s.sigmas[stop]  # the prediction goes down to noise level 0
    terms = [Term(i, dsigma[i]) for i in active_steps]

    # 3. Sweep back; no term passes gradient through its input.
    grad = s.reward(rewarded)
    sweep(s.vjp, ro, terms, grad)
    return dict(k=s.sigmas[stop])


def full(s: Samples, *, last: int | Literal["random"] | None = None) -> Log:
    """Full backpropagation: the true gradient, through all T steps.

    With `last`, through the last K steps only: DRaFT-K (arXiv 2309.17400), Algorithm 1.  K is uniform on 1 to T, drawn
    anew at each update, if `last` is random: AlignProp (arXiv 2310.03739), whose code also draws K = 0, no gradient.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    steps = len(ro.v)
    if last == "random":
        last = 1 + draw_index(steps, s.generator)
    first = 0 if last is None else max(0, steps - last)  # the first step that is differentiated

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
    if not isinstance(last, int):
        raise ValueError(f"--last {last} is for full: refl takes a number, and draws one of that many last steps")
    window = min(last, steps)
    return steps - 1 - draw_index(window, s.generator)


def late_rollout(
    s: Samples,
    step: int,
    reward_input: Literal["x_0", "xhat_0"] | None,
) -> tuple[Rollout, Tensor]:
    """The rollout, and the latent that is rewarded: x_0, or the prediction at a step, which needs no later steps."""
    if reward_input == "x_0":
        ro = rollout(s.velocity, s.noise(0), s.sigmas)
        return ro, ro.x[-1]
    ro = rollout(s.velocity, s.noise(0), s.sigmas[: step + 2])
    return ro, prediction(ro, step)


def draw_index(count: int, generator: torch.Generator) -> int:
    """A uniform index below `count`, alike on all ranks."""
    return int(torch.randint(count, (), generator=generator))


# ------------------------------------------------------------------------------------- Direct-Align and VGG-Flow


def direct_align(
    s: Samples,
    *,
    low: float = 0.75,
    high: float = 0.97,
    ahead: int = 1,
) -> Log:
    """Direct-Align: x_0 is noised with known noise, which is taken out again after one step of the network.

    SRPO (arXiv 2509.06942).  The noise is the rollout's own x_1, as in the authors' code.  The step starts at a random
    noise level in [low, high] and ends `ahead` levels below; on FLUX.1-dev the authors' levels go from 0.96 down to
    0.75 and their steps are about 0.02 long.  Left out: a factor of the loss that falls with the noise level, and the
    branch that adds noise.  SRPO's relative reward is a form of any reward, see rewards.py.
    """
    # 1. Roll out, draw the step, and put the noise back into x_0.
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    x_1, x_0 = ro.x[0], ro.x[-1]
    (step,) = pick_leaps(ro.sigmas, s.generator, 1, low, high)
    end = min(step + ahead, len(ro.v))
    k, j = ro.sigmas[step], ro.sigmas[end]
    x_k = (1 - k) * x_0 + k * x_1

    # 2. One step down to j.  There the noise is j x_1 as before: what remains is 1 - j of an image.
    v = s.velocity(x_k, k)
    x_j = one_step(x_k, v, k, j)
    xhat_0 = (x_j - j * x_1) / (1 - j)

    # 3. dxhat_0/dv = (j - k) / (1 - j).
    grad = s.reward(xhat_0)
    s.vjp(x_k, k, (j - k) / (1 - j) * grad)
    return dict(k=k, j=j)


def vgg_flow(s: Samples, *, active: int = 3, scale: float = 1000.0) -> Log:
    """VGG-Flow: the velocity is pulled to the untuned one, shifted along the reward's gradient at the prediction.

    VGG-Flow (arXiv 2512.05116), without the network that learns the rest of the value's gradient.  The target is
    v_base - scale (1 - sigma)^2 grad r(xhat_0); `scale` is the inverse of the temperature, so a low scale stays near
    the base.  From the authors' code: scale 1000, the square, a quarter of the steps, never the first step.  Left out:
    a clip of the largest gradients.
    """
    ro = rollout(s.velocity, s.noise(0), s.sigmas)
    later_steps = range(1, len(ro.v))
    steps = draw_steps(later_steps, active, 0.0, s.generator)
    for step in steps:
        x, v, sigma = ro.x[step], ro.v[step], ro.sigmas[step]
        xhat_0 = prediction(ro, step)
        # dL/dxhat_0 of each sample's own loss: `reward` divides by the total.
        descent = s.total * s.reward(xhat_0)
        target = s.base(x, sigma) + scale * (1 - sigma) ** 2 * descent
        error = v - target  # (b, n, c)
        # The loss is a mean of the squared error over entries, steps and samples.
        s.vjp(x, sigma, 2 * error / error[0].numel() / len(steps) / s.total)
    return {}


# ------------------------------------------------------------------------------- FlowBP (arXiv 2606.11075)


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

    The three lengths count steps: those up to and with the first, those from there up to and with the second, and
    those after the second.  Each is at least one.
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
