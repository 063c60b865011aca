"""Gradients from scores alone, which need not be differentiable: one function per method.

    flow_grpo  dance_grpo  mix_grpo   policy gradients: random steps that led to better samples become more likely
    awm  nft  dpo                     the forward process: flow matching to the network's own samples, by their scores
    fdfo                              finite differences: two samples give the slope of the score between them

A method adds its gradient to the weights through `Samples.vjp` and returns what to log, as `leapalign` does.  All
compare the scores of the samples of one prompt, a group, and make one update per rollout: they are on policy.

Legend as in leaps.py: b samples, n tokens, c channels, T steps.
"""

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from baselines.direct import Log, draw_index, draw_steps
from leaps import Samples, one_step, rollout

# ------------------------------------------------------------------------------------- policy gradients


def flow_grpo(
    s: Samples,
    *,
    group: int = 8,
    noise: float = 0.7,
    window: int | None = None,
    cps: bool = False,
    ranks: bool = False,
) -> Log:
    """Flow-GRPO: a policy gradient on walks whose noise follows the noise level: eta = a sqrt(sigma / (1 - sigma)).

    Flow-GRPO (arXiv 2505.05470), on policy.  The default a = 0.7 is the paper's; the paper's group is 24 samples of
    a prompt.  With one update per rollout the ratio of probabilities is 1, so clipping it would do nothing.  There is
    no KL term.

    With `window`, Flow-GRPO-Fast: that many steps in a row are random, drawn anew at each update from the first half
    (2 or 3 in the authors' code).  `cps` is coefficient-preserving noise, see `cps_transition`; `ranks` is Pref-GRPO,
    see `advantages`.
    """
    sigmas = s.sigmas
    if cps:
        eta = torch.full_like(sigmas, noise)
    else:
        # At pure noise eta would be infinite: sigma_1 replaces sigma_0 = 1 in the denominator, as in the authors' code.
        below_one = sigmas.where(sigmas < 1, sigmas[1])
        eta = noise * (sigmas / (1 - below_one)).sqrt()  # (T + 1,)

    # The last step is not random: its noise would stay in the image.
    random_steps = range(len(sigmas) - 2)
    if window is not None:
        random_steps = draw_window(s, window)
    x_1 = s.noise(0)
    x_0, moves = random_walk(s, x_1, eta, random_steps, cps)
    return policy_gradient(s, x_0, moves, group, ranks)


def dance_grpo(
    s: Samples,
    *,
    group: int = 8,
    noise: float = 0.3,
    ranks: bool = False,
) -> Log:
    """DanceGRPO: a policy gradient on walks with constant noise eta, which start from one x_1 per group.

    DanceGRPO (arXiv 2505.07818), on policy.  The default eta = 0.3 is the paper's; the paper's group is 12 samples
    of a prompt.
    """
    eta = torch.full_like(s.sigmas, noise)
    random_steps = range(len(s.sigmas) - 2)  # the last step is not random
    x_1 = shared_noise(s, group)
    x_0, moves = random_walk(s, x_1, eta, random_steps)
    return policy_gradient(s, x_0, moves, group, ranks)


def mix_grpo(
    s: Samples,
    *,
    group: int = 8,
    noise: float = 0.3,
    window: int = 4,
    shift_every: int | Literal["random"] = 25,
    cps: bool = False,
    ranks: bool = False,
) -> Log:
    """MixGRPO: as DanceGRPO, but only the steps of a window are random and trained; all others are the ODE's.

    MixGRPO (arXiv 2507.21802), on policy.  The window begins at the noisy end and moves on by a step every
    `shift_every` updates.  The defaults are the paper's 4 of 25 steps, and 25 of 300 updates.  If `shift_every` is
    random, the window is drawn as Flow-GRPO-Fast's.  `cps` and `ranks` as in `flow_grpo`.
    """
    end = len(s.sigmas) - 2  # the last step is not random
    if shift_every == "random":
        random_steps = draw_window(s, window)
    else:
        final_start = max(0, end - window)  # where the window stays
        start = min(s.update // shift_every, final_start)
        random_steps = range(start, min(start + window, end))

    eta = torch.full_like(s.sigmas, noise)
    x_1 = shared_noise(s, group)
    x_0, moves = random_walk(s, x_1, eta, random_steps, cps)
    return policy_gradient(s, x_0, moves, group, ranks)


def draw_window(s: Samples, window: int) -> range:
    """`window` steps in a row, at random from the first half of the rollout; fewer if the rollout has fewer."""
    half = (len(s.sigmas) - 1) // 2
    starts = max(1, half - window + 1)
    start = draw_index(starts, s.generator)
    end = len(s.sigmas) - 2  # the last step is not random
    return range(start, min(start + window, end))


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
    cps: bool = False,
) -> tuple[Tensor, list[Move]]:
    """Walk from x_1 to x_0 by Euler steps of the ODE, and by random steps of the SDE, or of CPS, at `random_steps`.

    eta (T + 1,) is the noise at each noise level.  Returns x_0 and the random steps.
    """
    x, moves = x_1, []
    levels = itertools.pairwise(s.sigmas)
    for i, (sigma, next_sigma) in enumerate(levels):
        v = s.velocity(x, sigma)
        if i not in random_steps:
            x = one_step(x, v, sigma, next_sigma)
            continue
        noise = s.noise(i + 1)
        if cps:
            mean, std, dmean_dv = cps_transition(x, v, sigma, next_sigma, eta[i])
            # The authors leave out 1 / (2 std^2), which grows without bound towards x_0: log p = -(x' - mean)^2.
            dlogp_dv = dmean_dv * 2 * std * noise
        else:
            dsigma = next_sigma - sigma
            mean, std, dmean_dv = transition(x, v, sigma, dsigma, eta[i])
            # log p = -(x' - mean)^2 / (2 std^2) + ..., and x' - mean = std noise.
            dlogp_dv = dmean_dv * noise / std
        dlogp_dv = dlogp_dv / noise[0].numel()  # log p is the mean over entries
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
    are this SDE, each with its eta.  x, v and the mean are (b, n, c), all else is a number.
    """
    score = -(x + (1 - sigma) * v) / sigma
    mean = x + dsigma * (v - eta**2 / 2 * score)
    std = eta * (-dsigma).sqrt()
    dmean_dv = dsigma * (1 + eta**2 / 2 * (1 - sigma) / sigma)
    return mean, std, dmean_dv


def cps_transition(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    eta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and dmean/dv of a step with coefficient-preserving noise, eta in (0, 1).

    Flow-CPS (arXiv 2509.05952): the predictions of x_0 and x_1 are mixed anew, and a part of x_1 is fresh noise.  The
    coefficient of x_0 and the variance of all noise are those of the next level, so the image is not too noisy.
    """
    xhat_0 = x - sigma * v
    xhat_1 = x + (1 - sigma) * v
    std = next_sigma * (eta * torch.pi / 2).sin()
    old_noise = (next_sigma**2 - std**2).sqrt()
    mean = (1 - next_sigma) * xhat_0 + old_noise * xhat_1
    dmean_dv = old_noise * (1 - sigma) - (1 - next_sigma) * sigma
    return mean, std, dmean_dv


def policy_gradient(s: Samples, x_0: Tensor, moves: list[Move], group: int, ranks: bool) -> Log:
    """Add the gradient of -advantage log p, a mean over the batch and over the random steps."""
    scores = s.score(x_0)
    advantage = advantages(scores, group, ranks)  # (b,)
    weight = -advantage[:, None, None]  # (b, 1, 1)
    for step, x, dlogp_dv in moves:
        # s.total, not b: these samples may be a part of the batch.
        dloss_dv = weight * dlogp_dv / len(moves) / s.total
        s.vjp(x, s.sigmas[step], dloss_dv)
    return dict(advantage=advantage.abs())


def advantages(scores: Tensor, group: int, ranks: bool = False, largest: float = 5.0) -> Tensor:
    """Scores (b,) less their group's mean, in units of its standard deviation: (b,), within +-`largest`.

    A group is `group` samples in a row, of one prompt.  The bound of 5 is that of Flow-GRPO's code.  With `ranks`, a
    score is replaced by how many scores of its group it beats, and a tie counts half: Pref-GRPO (arXiv 2508.20751),
    whose judge compares pairs.  Scores of a network rarely tie, so all groups then have the same set of advantages.
    Raises ValueError if the samples do not divide into groups of at least 2.
    """
    if group < 2 or len(scores) % group:
        raise ValueError(f"{len(scores)} samples do not divide into groups of {group}, which must be at least 2")
    group_scores = scores.view(-1, group)
    if ranks:
        differences = group_scores[:, :, None] - group_scores[:, None, :]
        group_scores = differences.sign().sum(2) / 2  # wins less losses: the group's mean is subtracted anyway
    centred = group_scores - group_scores.mean(1, keepdim=True)
    deviation = group_scores.std(1, keepdim=True)
    normalised = centred / (deviation + 1e-6)  # 0, not NaN, where all scores are equal
    return normalised.clamp(-largest, largest).flatten()


def shared_noise(s: Samples, group: int) -> Tensor:
    """The first sample's x_1 for all samples of its group, which then differ by the noise of random steps alone."""
    x_1 = s.noise(0)
    first_of_group = x_1[::group]
    return first_of_group.repeat_interleave(group, 0)


# --------------------------------------------------------------------------------------- the forward process


def awm(
    s: Samples,
    *,
    group: int = 8,
    active: int = 6,
    ranks: bool = False,
) -> Log:
    """AWM: flow matching to the network's own samples, each weighted by its advantage, which may be negative.

    Advantage-Weighted Matching (arXiv 2509.25050), on policy, where its ratio of likelihoods is 1.  The weight of all
    noise levels is one, as the paper recommends.  The authors' code has 6 noise levels of a rollout of 14, and the
    paper's group is 24.  Left out: penalties that hold the network near older ones.
    """
    # 1. Samples of the network as it is, and which of them are the better ones.
    x_0 = rollout(s.velocity, s.noise(0), s.sigmas).x[-1]
    advantage = advantages(s.score(x_0), group, ranks)

    # 2. Noise them anew, and match the velocity that leads back.  The ODE's samples do: no random steps are needed.
    for sigma, x, target in noisy_samples(s, x_0, active):
        error = s.velocity(x, sigma) - target
        add_matching(s, x, sigma, error, advantage, active)
    return dict(advantage=advantage.abs())


def nft(
    s: Samples,
    *,
    group: int = 8,
    active: int = 6,
    ranks: bool = False,
) -> Log:
    """DiffusionNFT: AWM with another weight for each sample, sigma / mean |v - target|.

    DiffusionNFT (arXiv 2509.16117), on policy.  The published loss is r |v+ - target|^2 + (1 - r) |v- - target|^2 with
    v+- = v_old +- beta (v - v_old) and r = 1/2 + advantage / 10.  On policy v_old is v: both errors are equal, their
    gradients cancel but for a factor 2 r - 1, without beta, and AWM is left.  The weight is the published one: the loss
    in x_0, divided by its own mean absolute error.  `active` is AWM's; the authors' code has 9 noise levels of 10.
    """
    # 1. As in AWM.
    x_0 = rollout(s.velocity, s.noise(0), s.sigmas).x[-1]
    advantage = advantages(s.score(x_0), group, ranks)

    # 2. xhat_0 - x_0 is -sigma error, so the loss in x_0 is sigma^2 error^2.
    for sigma, x, target in noisy_samples(s, x_0, active):
        error = s.velocity(x, sigma) - target
        x_0_error = sigma * error.abs().flatten(1).mean(1)  # (b,)
        weight = sigma**2 / x_0_error.clamp(min=1e-5)  # the bound is the authors'
        add_matching(s, x, sigma, error, weight * advantage, active)
    return dict(advantage=advantage.abs())


def dpo(
    s: Samples,
    *,
    group: int = 8,
    active: int = 6,
    beta: float = 2000.0,
) -> Log:
    """Online DPO: the network should match the best sample of a group better than the base does, the worst less well.

    The loss of Diffusion-DPO (arXiv 2311.12908), Eq. 14, in velocities and with a weight of one at all noise levels;
    beta = 2000 is the paper's for Stable Diffusion 1.5, for errors that are means over entries.  All rows of a group
    are used: each pair of rows holds the best and the worst, under one noise.  Raises ValueError for an odd group.
    """
    # 1. The best and the worst in turns: even rows are to be matched better, odd rows worse.
    x_0 = rollout(s.velocity, s.noise(0), s.sigmas).x[-1]
    x_0 = best_and_worst(x_0, s.score(x_0), group)

    # 2. Both are compared with the untuned network, under the same noise.
    for sigma, x, target in noisy_samples(s, x_0, active, shared=2):
        error = s.velocity(x, sigma) - target
        base_error = s.base(x, sigma) - target
        gain = (base_error.square() - error.square()).flatten(1).mean(1)  # (b,)
        margin = beta / 2 * (gain[::2] - gain[1::2])  # (b / 2,)
        # The loss is -log sigmoid(margin), a mean over pairs.
        push = beta * (-margin).sigmoid()  # fades once the best is preferred enough
        weight = torch.stack([push, -push], 1).flatten()  # (b,): to the best, from the worst
        add_matching(s, x, sigma, error, weight, active)
    return {}


def noisy_samples(s: Samples, x_0: Tensor, active: int, shared: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """At `active` random levels of the rollout: sigma, x_0 with fresh noise, and the velocity noise - x_0.

    `shared` samples in a row have one noise.
    """
    all_steps = range(len(s.sigmas) - 1)
    steps = draw_steps(all_steps, active, 0.0, s.generator)
    for step in steps:
        sigma = s.sigmas[step]
        # Not noise(0): that is the x_1 that x_0 was made from.
        noise = s.noise(step + 1)[::shared].repeat_interleave(shared, 0)
        yield sigma, (1 - sigma) * x_0 + sigma * noise, noise - x_0


def add_matching(s: Samples, x: Tensor, sigma: Tensor, error: Tensor, weight: Tensor, active: int) -> None:
    """Add the gradient of weight (b,) x mean error^2, of the mean over entries, samples and `active` noise levels."""
    active = min(active, len(s.sigmas) - 1)
    dloss_dv = 2 * weight[:, None, None] * error / error[0].numel() / active / s.total
    s.vjp(x, sigma, dloss_dv)


def best_and_worst(x_0: Tensor, scores: Tensor, group: int) -> Tensor:
    """Each group's best and worst sample in turns, in place of its samples: (b, n, c).  ValueError for odd groups."""
    if group % 2 or len(scores) % group:
        raise ValueError(f"{len(scores)} samples do not divide into groups of {group}, which must be even")
    group_scores = scores.view(-1, group)
    extremes = torch.stack([group_scores.argmax(1), group_scores.argmin(1)], 1)  # (groups, 2), within a group
    first_rows = torch.arange(0, len(scores), group, device=extremes.device)
    pairs = (extremes + first_rows[:, None]).repeat(1, group // 2)  # (groups, group)
    return x_0[pairs.flatten()]


# ---------------------------------------------------------------------------------------- finite differences


def fdfo(
    s: Samples,
    *,
    group: int = 2,
    churn: float = 0.1,
    dsigma: bool = False,
) -> Log:
    """FDFO: two samples start from nearly the same noise, and all velocities of both move towards the better image.

    Finite Difference Flow Optimization (arXiv 2603.12893), on policy.  The noise of a pair differs by a share that
    `churn` states: x_1 is divided by 1 + churn and filled up with fresh noise.  0.1 is the authors' value where they
    add noise at the start only; their experiments add a little, 0.0025, at every step.  All steps count alike, as
    published; with `dsigma` they count by their length, and the gradient is that of the score along the difference of
    the pair (twice that, from the square of the published loss).  Raises ValueError for an odd group.
    """
    if group % 2:
        raise ValueError(f"fdfo compares pairs of one prompt: --group must be even, got {group}")

    # 1. Pairs of rollouts.
    shared = 1 / (1 + churn)
    x_1 = shared * shared_noise(s, 2) + (1 - shared**2) ** 0.5 * s.noise(1)
    ro = rollout(s.velocity, x_1, s.sigmas)
    x_0 = ro.x[-1]
    scores = s.score(x_0)

    # 2. The slope of the score between the samples of a pair, per entry.
    half = (x_0[::2] - x_0[1::2]) / 2  # (b / 2, n, c)
    rise = (scores[::2] - scores[1::2]) / 2
    slope = rise / (half.square().flatten(1).mean(1) + 1e-6)  # 1e-6 as published: two images may be equal
    ascent = 2 / half[0].numel() * slope[:, None, None] * half
    ascent = ascent.repeat_interleave(2, 0)  # up is the same way for both

    # 3. dx_0/dv = -length of the step, and a descent along the score's slope: two signs, which cancel.
    lengths = -ro.sigmas.diff() if dsigma else torch.full_like(ro.sigmas[1:], 1 / len(ro.v))
    for x, sigma, length in zip(ro.x, ro.sigmas, lengths):
        s.vjp(x, sigma, length * ascent / s.total)
    return dict(slope=slope.abs().repeat_interleave(2, 0))
