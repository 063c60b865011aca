"""baselines/policy.py in float64: each gradient against autograd through its loss, written out as its paper states it.

The small network, its samples and their scores are those of test_baselines.
"""

import itertools
import math
from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from baselines import policy
from baselines.direct import draw_steps
from baselines.policy import advantages, cps_transition, draw_window, transition
from leaps import rollout
from tests.test_baselines import DSIGMA, B, C, N, autograd_of, base_field, close, gradient_of, noise, samples, score
from tests.test_leaps import SIGMAS, Field, T, flat_grad, gaussian, generator

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


class CPS(NamedTuple):
    """A step of Flow-CPS as its authors' code has it, with their log p, which leaves out all constants."""

    mean: Tensor
    stddev: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        return -((x - self.mean) ** 2)


def cps_density(level: float, x: Tensor, v: Tensor, i: int) -> CPS:
    sigma, next_sigma = SIGMAS[i], SIGMAS[i + 1]
    std = next_sigma * math.sin(level * math.pi / 2)
    x_0, x_1 = x - sigma * v, x + v * (1 - sigma)
    return CPS(x_0 * (1 - next_sigma) + x_1 * torch.sqrt(next_sigma**2 - std**2), std)


def log_probabilities(
    field: Field,
    x: Tensor,
    density: Callable[..., torch.distributions.Normal | CPS],
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


DRAWN = draw_window(samples(Field(), 0), 1)


@pytest.mark.parametrize(
    "method, density, random_steps, shared, update, options",
    [
        (policy.flow_grpo, flow_density, range(T - 1), False, 0, {}),
        (policy.flow_grpo, flow_density, DRAWN, False, 0, dict(window=1)),
        (policy.flow_grpo, partial(cps_density, 0.7), range(T - 1), False, 0, dict(cps=True)),
        (policy.dance_grpo, dance_density, range(T - 1), True, 0, {}),
        (policy.mix_grpo, dance_density, range(2), True, 24, dict(window=2)),
        (policy.mix_grpo, dance_density, range(1, 3), True, 25, dict(window=2)),
        (policy.mix_grpo, dance_density, range(2, 4), True, 1000, dict(window=2)),
        (policy.mix_grpo, dance_density, DRAWN, True, 0, dict(window=1, shift_every="random")),
        (policy.mix_grpo, partial(cps_density, 0.3), range(2), True, 0, dict(window=2, cps=True)),
    ],
)
def test_a_policy_gradient_is_that_of_the_clipped_ratio_times_the_advantage(
    method, density, random_steps, shared, update, options
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


@pytest.mark.parametrize("level", [0.1, 0.7, 0.99])
def test_cps_keeps_the_coefficient_of_the_image_and_the_variance_of_the_noise(level):
    sigma, next_sigma, eta = SIGMAS[1], SIGMAS[2], torch.tensor(level).double()
    x_0, x_1 = noise(1), noise(2)
    x, v = (1 - sigma) * x_0 + sigma * x_1, x_1 - x_0
    mean, std, dmean_dv = cps_transition(x, v, sigma, next_sigma, eta)
    old_noise = (mean - (1 - next_sigma) * x_0) / x_1
    torch.testing.assert_close(old_noise, old_noise[0, 0, 0].expand_as(old_noise))
    torch.testing.assert_close(old_noise[0, 0, 0] ** 2 + std**2, next_sigma**2)
    moved_mean, _, _ = cps_transition(x, v + 1, sigma, next_sigma, eta)
    torch.testing.assert_close(moved_mean - mean, dmean_dv.expand_as(mean))


def test_cps_without_noise_is_the_euler_step():
    x, v, zero = noise(0), noise(1), torch.zeros(()).double()
    mean, std, dmean_dv = cps_transition(x, v, SIGMAS[1], SIGMAS[2], zero)
    assert std == 0
    torch.testing.assert_close(dmean_dv, SIGMAS[2] - SIGMAS[1])
    torch.testing.assert_close(mean, x + (SIGMAS[2] - SIGMAS[1]) * v)


def test_a_drawn_window_lies_anywhere_in_the_first_half():
    s = samples(Field(), 0, sigmas=torch.linspace(1, 0, 13))
    assert {draw_window(s, 2) for _ in range(200)} == {range(i, i + 2) for i in range(5)}
    assert draw_window(s, 6) == range(6)
    assert draw_window(s, 99) == range(11)  # all steps but the last


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


def test_ranks_are_the_shares_of_the_group_that_a_score_beats_whatever_the_distances():
    scores = torch.tensor([0.3, 9.0, -1.0, 0.3, 1.0, 2.0, 3.0, 4.0])
    wins = torch.tensor([[1.5, 3.0, 0.0, 1.5], [0.0, 1.0, 2.0, 3.0]]) / 3  # a tie is half a win
    expected = (wins - wins.mean(1, keepdim=True)) / wins.std(1, keepdim=True)
    torch.testing.assert_close(advantages(scores, 4, ranks=True).view(2, 4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_samples_must_divide_into_groups_of_two_or_more(group):
    with pytest.raises(ValueError, match=f"groups of {group}"):
        advantages(torch.zeros(16), group)


# --------------------------------------------------------------------------------------- the forward process


def noised_levels(active: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The noise levels that a method draws, and the noise there."""
    steps = draw_steps(range(T), active, 0.0, generator(seed))
    return [(SIGMAS[i], noise(i + 1)) for i in steps]


def own_samples(field: Field, group: int) -> tuple[Tensor, Tensor]:
    """x_0 and the advantages."""
    x_0 = rollout(field, noise(0), SIGMAS).x[-1]
    return x_0, advantages(score(x_0), group)


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


@pytest.mark.parametrize("seed, active, group", [(0, 3, 2), (1, 1, 4), (2, 9, 2)])
def test_awm_is_autograd_of_the_ratio_of_likelihoods_times_the_advantage(seed, active, group):
    field = Field()
    x_0, advantage = own_samples(field, group)
    losses = []
    for t, eps in noised_levels(active, seed):
        x = (1 - t) * x_0 + t * eps
        log_p = -mean_square(field(x, t) - (eps - x_0))
        ratio = (log_p - log_p.detach()).exp()
        losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.5, 1.5)).mean())
    expected = autograd_of(torch.stack(losses).mean(), field)
    assert close(gradient_of(policy.awm, seed, active=active, group=group), expected)


@pytest.mark.parametrize("seed, beta", [(0, 1.0), (1, 0.1), (2, 3.0)])
def test_nft_is_autograd_of_the_published_loss_for_every_beta(seed, beta):
    field = Field()
    x_0, advantage = own_samples(field, 2)
    r = (advantage / 5 / 2 + 0.5).clamp(0, 1)
    losses = []
    for t, eps in noised_levels(3, seed):
        x = (1 - t) * x_0 + t * eps
        v = field(x, t)
        v_old = v.detach()
        loss = 0.0
        for share, v_side in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
            difference = x - t * v_side - x_0
            weight = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            loss = loss + share * mean_square(difference) / weight / beta
        losses.append(5 * loss.mean())
    expected = autograd_of(torch.stack(losses).mean(), field)
    assert close(gradient_of(policy.nft, seed, active=3, group=2), expected)


def test_on_policy_nft_is_awm_up_to_the_weight_of_a_sample():
    pushes = {}
    for name in ("awm", "nft"):
        calls = pushes[name] = []

        def vjp(x: Tensor, sigma: Tensor, u: Tensor, calls: list = calls) -> None:
            calls.append((x, sigma, u))

        getattr(policy, name)(samples(Field(), 0)._replace(vjp=vjp), active=4, group=4)
    x_0 = rollout(Field(), noise(0), SIGMAS).x[-1]
    for (x, sigma, awm), (same_x, _, nft) in zip(pushes["awm"], pushes["nft"], strict=True):
        assert torch.equal(x, same_x)
        target = (x - x_0) / sigma  # noise - x_0
        weight = sigma / (Field()(x, sigma) - target).abs().flatten(1).mean(1)
        torch.testing.assert_close(nft, weight[:, None, None] * awm)


@pytest.mark.parametrize("seed, group, beta", [(0, 2, 30.0), (1, 4, 5.0)])
def test_dpo_is_autograd_of_diffusion_dpo_on_the_best_and_the_worst_of_a_group(seed, group, beta):
    field, base = Field(), base_field()
    x_0 = rollout(field, noise(0), SIGMAS).x[-1]
    losses = []
    for t, eps in noised_levels(2, seed):
        for first in range(0, B, group):
            order = score(x_0)[first : first + group].argsort() + first
            for row in range(first, first + group, 2):  # as many pairs as there are rows for
                inside = 0.0
                for sign, best in ((-1, order[-1]), (1, order[0])):
                    clean, fresh = x_0[best][None], eps[row][None]
                    x = (1 - t) * clean + t * fresh
                    errors = [mean_square(v(x, t) - (fresh - clean)) for v in (field, base)]
                    inside = inside + sign * beta / 2 * (errors[0] - errors[1].detach())
                losses.append(-torch.nn.functional.logsigmoid(inside))
    expected = autograd_of(torch.stack(losses).mean(), field)
    assert close(gradient_of(policy.dpo, seed, active=2, group=group, beta=beta), expected)


# ---------------------------------------------------------------------------------------- finite differences


def pairs(field: Field, churn: float) -> tuple[Tensor, Tensor, Tensor]:
    """The states of rollouts from pairs of noises, and half of the differences of images and of scores."""
    x_1 = noise(0)[::2].repeat_interleave(2, 0) / (1 + churn)
    x_1 = x_1 + noise(1) * ((1 + churn) ** 2 - 1) ** 0.5 / (1 + churn)
    x = rollout(field, x_1, SIGMAS).x
    scores = score(x[-1])
    half = (x[-1, ::2] - x[-1, 1::2]).repeat_interleave(2, 0) / 2
    rise = (scores[::2] - scores[1::2]).repeat_interleave(2) / 2
    signs = torch.tensor([1.0, -1.0] * (B // 2))
    return x, half * signs[:, None, None], rise * signs


def test_fdfo_is_autograd_of_the_published_surrogate(churn=0.1):
    field = Field()
    x, half, rise = pairs(field, churn)
    direction = half / (mean_square(half)[:, None, None].sqrt() ** 2 + 1e-6)
    losses = []
    for i in range(T):
        v = field(x[i], SIGMAS[i])
        target = (v - direction).detach()
        log_ratio = -mean_square(v - target) + mean_square(direction)
        ratio = log_ratio.exp()
        losses.append((-rise * ratio + rise.abs() / (2 * 0.03) * (ratio - 1) ** 2).mean())
    expected = autograd_of(torch.stack(losses).mean(), field)
    assert close(gradient_of(policy.fdfo, churn=churn), expected)


def test_weighted_by_dsigma_fdfo_tends_to_the_gradient_along_the_difference(churn=1e-8):
    """Twice that of the Euler sum with detached inputs, of the score's gradient projected on a pair's difference."""

    def same_score(x_0: Tensor) -> Tensor:  # for both samples of a pair
        return (torch.sin(x_0) * gaussian(7, N, C)).sum((1, 2))

    field = Field()
    x, half, _ = pairs(field, churn)
    x_0 = x[-1].clone().requires_grad_()
    (ascent,) = torch.autograd.grad(same_score(x_0).sum(), x_0)
    along = (ascent * half).mean((1, 2)) / (mean_square(half) + 1e-6)  # the published code's 1e-6 counts here
    projected = along[:, None, None] * half
    euler_sum = sum(DSIGMA[i] * field(x[i], SIGMAS[i]) for i in range(T))
    expected = autograd_of(-2 * (projected * euler_sum).sum() / B, field)

    policy.fdfo(samples(field, 0)._replace(score=same_score), churn=churn, dsigma=True)
    assert (flat_grad(field) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("method", [policy.fdfo, policy.dpo])
def test_pairs_need_an_even_group(method):
    with pytest.raises(ValueError, match=r"even|3"):
        gradient_of(method, group=3)
