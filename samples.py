"""What a method is given: this file is the one place where `Samples` are built.

A method (leaps.py, baselines/, or yours) knows noise, noise levels, a velocity, a vector-Jacobian product and the
reward of a latent. Everything else about a batch is hidden here: the prompts, the VAE, the dtype of the network,
several rewards with their weights and lambdas, and micro-batches. The mathematics comes first; what counts and logs,
called there in a line each, is at the end of the file.

Legend as in leaps.py: b samples, n tokens, c channels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from families import Network, NetworkConfig
from families.common import Text
from formats.folders import Pipeline
from formats.lora import without_lora
from infra.meter import Flops, Meter
from infra.seeds import generator_of
from leaps import Samples, Velocity, hinge, vjp_of
from rewards import Reward
from sample import decode, encode, is_guided, velocity_of, weighted_sum, weighted_texts


@dataclass
class Size:
    """The size of an image, and what follows from it."""

    height: int  # in pixels, as width
    width: int
    rows: int  # of tokens, as columns
    columns: int
    sigmas: Tensor  # noise levels of a rollout, (T + 1,), from 1 down to 0
    flops: Flops | None = None  # of one evaluation of the network


# ------------------------------------------------------------------------------------------- noise


def draw_x_1(seed: int, update: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """The noise x_1 of a whole batch, (batch, n, c) on the CPU, and the generator that drew it.

    The noise is a function of (seed, update) and of the shape of the whole batch. It does not depend on the number of
    ranks or on how the batch is split, so a run resumes bitwise and any update can be repeated.
    """
    generator = generator_of(seed, update)
    return torch.randn(*shape, generator=generator), generator


def noise_of(x_1: Tensor, rows: slice, seed: int, update: int, like: Tensor) -> Callable[[int], Tensor]:
    """`Samples.noise` for some rows of a batch whose x_1 is (batch, n, c): the i-th Gaussian of each sample."""

    def noise(i: int) -> Tensor:
        if i == 0:
            return x_1[rows].to(like)
        # The 2 keeps these keys apart from the keys of other random numbers of an update.
        gaussian = torch.randn(x_1.shape, generator=generator_of(seed, update, 2, i))
        return gaussian[rows].to(like)

    return noise


# ----------------------------------------------------------------------------------------- samples


def build_samples(
    pipe: Pipeline,
    prompts: Sequence[str],
    size: Size,
    rewards: Sequence[Reward],
    noise: Callable[[int], Tensor],
    generator: torch.Generator,
    guidance: float | None = None,
    negative_prompt: str = "",
    detach_negative: bool = False,
    base: Network | None = None,
    total: int | None = None,
    update: int = 0,
    micro_batch: int | None = None,
) -> tuple[Samples, "RewardLog"]:
    """The samples of some prompts, and the log of what the rewards give while a method runs.

    `base` is the untuned network; for a LoRA the trained network, whose LoRA is off while the base is evaluated.
    `total` is the number of this rank's samples, by which losses are divided (Eq. 13); None: these samples.
    Activations are kept for `micro_batch` samples at a time (None: all).
    """
    b = len(prompts)
    total = total or b
    micro_batch = micro_batch or b
    micro_batches = [slice(i, i + micro_batch) for i in range(0, b, micro_batch)]
    # Encoded once: every call of the network reads the same texts.
    branches = weighted_texts(pipe, encode(pipe, prompts), guidance, negative_prompt)
    # Without its gradient the negative branch is a constant of the leap, and the positive one keeps its weight.
    differentiated = branches[:1] if detach_negative else branches
    log = RewardLog(rewards)

    def network(flux: Network, text: Text, rows: slice) -> Velocity:
        """The velocity of some of the samples in one branch, differentiable in the weights and in x."""
        text_of_rows = tuple(tensor[rows] for tensor in text)
        return velocity_of(flux, text_of_rows, size.rows, size.columns, guidance, pipe.compute)

    def guided(flux: Network) -> Velocity:
        return weighted_sum([(weight, network(flux, text, slice(0, b))) for weight, text in branches])

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return guided(pipe.flux)(x, sigma)

    @torch.no_grad()
    def base_velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with without_lora(base):
            return guided(base)(x, sigma)

    @torch.enable_grad()  # also in a method of yours that is under no_grad
    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        levels = torch.as_tensor(sigma).expand(b)  # a method gives one noise level, or one per sample
        gradients = []
        # The activations of one micro-batch and one branch at a time. Their gradients in the weights add up.
        for rows in micro_batches:
            wrt_rows = []
            for weight, text in differentiated:
                vjp_of_rows = vjp_of(network(pipe.flux, text, rows))
                wrt_rows.append(vjp_of_rows(x[rows], levels[rows], weight * u[rows], wrt_x))
            # dv/dx of a sum of branches is the sum of theirs.
            if wrt_x:
                gradients.append(sum(wrt_rows[1:], wrt_rows[0]))
        return torch.cat(gradients) if wrt_x else None

    reward, score = reward_functions(pipe, prompts, size, rewards, total, micro_batches, log)
    samples = Samples(
        noise=noise,
        sigmas=size.sigmas,
        generator=generator,
        velocity=velocity,
        base=base_velocity if base else None,
        vjp=vjp,
        reward=reward,
        score=score,
        total=total,
        update=update,
    )
    return samples, log


def reward_functions(
    pipe: Pipeline,
    prompts: Sequence[str],
    size: Size,
    rewards: Sequence[Reward],
    total: int,
    micro_batches: list[slice],
    log: "RewardLog",
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """`Samples.reward` and `Samples.score`: from latents (b, n, c) through the VAE and the rewards."""

    @torch.enable_grad()
    def reward(x_0: Tensor, weight: Tensor | None = None) -> Tensor:
        """dL/dx_0, (b, n, c), of the loss L = mean over the batch of weight x hinge (Eq. 11 to 13)."""
        if weight is None:  # a method that gives no weights counts all samples alike
            weight = torch.ones_like(x_0[:, 0, 0])
        gradients = []
        for rows in micro_batches:
            # A leaf: the gradient stops at the latents, and the method takes it from there.
            latents = x_0[rows].detach().requires_grad_()
            images = decode(pipe, latents, size.height, size.width)
            scores = [r.score(images, prompts[rows]) for r in rewards]
            losses = []
            for r, score_of_rows in zip(rewards, scores):
                hinges = r.weight * hinge(score_of_rows, r.lam)  # Eq. 11
                losses.append(weight[rows] * hinges)  # the weight of Eq. 12
            # Each reward is differentiated down to the image, and its activations are freed before the VAE's are used.
            image_gradients = [torch.autograd.grad(loss.sum(), images)[0] for loss in losses]
            images.backward(sum(image_gradients) / total)  # Eq. 13: a mean. VAE and rewards are frozen
            gradients.append(latents.grad)
            log.add_scores(scores)
            log.add_losses(losses, image_gradients)
        return torch.cat(gradients)

    @torch.no_grad()
    def score(x_0: Tensor) -> Tensor:
        """The weighted sum of the rewards, (b,), for methods that need no gradient of them."""
        sums = []
        for rows in micro_batches:
            images = decode(pipe, x_0[rows], size.height, size.width)
            scores = [r.score(images, prompts[rows]) for r in rewards]
            weighted = [r.weight * score_of_rows for r, score_of_rows in zip(rewards, scores)]
            sums.append(sum(weighted))
            log.add_scores(scores)
        return torch.cat(sums)

    return reward, score


def trial_samples(sigmas: Tensor, size: int, generator: torch.Generator, update: int = 0) -> tuple[Samples, Counter]:
    """Random samples without a network, to try a method on, and a counter of which function it calls how often.

    A method that fails on them fails in milliseconds, before any weights are read. The counts tell what a method needs
    (the reward's gradient, the untuned network) and how many evaluations of the network an update takes.
    """
    # More than one token and channel: a mistake in a shape has a chance to show.
    draws = torch.Generator().manual_seed(0)
    calls: Counter[str] = Counter()

    def latents(*inputs: Any) -> Tensor:
        return torch.randn(size, 3, 2, generator=draws)

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        if u.shape != x.shape:
            raise ValueError(f"vjp takes a u of the shape of x, {tuple(x.shape)}, not {tuple(u.shape)}")
        return latents() if wrt_x else None

    @contextmanager
    def count(name: str) -> Iterator[None]:
        calls[name] += 1
        yield

    samples = Samples(
        noise=latents,
        sigmas=sigmas,
        generator=generator,
        velocity=latents,
        base=latents,
        vjp=vjp,
        reward=lambda x_0, weight=None: latents(),
        score=lambda x_0: latents()[:, 0, 0],
        total=size,
        update=update,
    )
    return observed(samples, count), calls


# ------------------------------------------------------------------------------- counting and logging


def observed(samples: Samples, around: Callable[[str], AbstractContextManager]) -> Samples:
    """The same samples, with each call of a function inside of `around(its name)`."""

    def wrap(name: str) -> Callable:
        function = getattr(samples, name)

        def call(*args, **options):
            with around(name):
                return function(*args, **options)

        return call

    names = ["velocity", "vjp", "reward", "score"]
    if samples.base:
        names.append("base")
    return samples._replace(**{name: wrap(name) for name in names})


def branch_counts(config: NetworkConfig, guidance: float | None, detach_negative: bool) -> tuple[int, int]:
    """Evaluations of the network in a velocity, and evaluations with a gradient in a vjp."""
    if not is_guided(config, guidance):
        return 1, 1
    return 2, 1 if detach_negative else 2


def metered(samples: Samples, meter: Meter, b: int, forwards: int = 1, backwards: int = 1) -> Samples:
    """The same b samples; the meter counts seconds and evaluations of the network in each part of an update.

    `forwards` and `backwards` are those of `branch_counts`.
    """

    def around(name: str) -> AbstractContextManager:
        if name in ("velocity", "base"):
            return meter("rollout", forwards=b * forwards)
        if name == "vjp":
            return meter("leaps", backwards=b * backwards)
        return meter("reward")  # the VAE and the rewards are not counted as evaluations of the network

    return observed(samples, around)


class RewardLog:
    """Collects, sample by sample, what the rewards give while a method runs."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = rewards
        self.values: dict[str, list[Tensor]] = {}  # name -> tensors (b,), one per micro-batch and call

    def add(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value.detach())

    def add_scores(self, scores: Sequence[Tensor]) -> None:
        """The reported scores, and whether a sample has no loss left; without a lambda it always has."""
        satisfied = torch.ones_like(scores[0], dtype=torch.bool)
        for reward, score in zip(self.rewards, scores):
            self.add(reward.name, reward.scale * score)  # as it is reported, PickScore times its logit scale
            lam = torch.inf if reward.lam is None else reward.lam
            satisfied &= score >= lam
        self.add("satisfied", satisfied.float())

    def add_losses(self, losses: Sequence[Tensor], image_gradients: Sequence[Tensor]) -> None:
        """The loss; and of several rewards the norm of each one's gradient in the image: which of them dominates?"""
        self.add("loss", sum(losses))
        if len(self.rewards) > 1:
            for reward, gradient in zip(self.rewards, image_gradients):
                self.add(f"{reward.name}_grad", gradient.float().flatten(1).norm(dim=1))

    def means(self, b: int) -> dict[str, Tensor]:
        """Each value per sample, (b,): a mean over calls, because a method may call the rewards several times."""
        means = {}
        for name, values in self.values.items():
            means[name] = torch.cat(values).view(-1, b).mean(0)
        return means
