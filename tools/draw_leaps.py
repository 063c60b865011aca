"""The README's picture of the method:  python -m tools.draw_leaps  (seconds; writes assets/leaps.png)

A latent of two numbers, so that a rollout can be drawn.  Its velocity needs no network: where clean latents are from a
few Gaussian clouds, the velocity has a closed form.  Rollout, leaps and gradient are those of training, from leaps.py.
"""

from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from infra.pictures import INK, PALETTE, save_row
from leaps import Rollout, leap_terms, one_step, rollout, similarity_weight, spans, sweep

PICTURE = Path("assets/leaps.png")
CLOUDS = torch.tensor([[-0.2, 1.5], [1.0, 0.6], [1.8, -1.1]])  # centres of the clean latents
WIDTH = 0.12  # a cloud's standard deviation
NOISE = torch.tensor([[[-1.6, -0.9]]])  # x_1, (b, n, c) = (1, 1, 2)
WISH = torch.tensor([-1.4, 1.3])  # the reward is higher nearer to it
STEPS = 12
PICKS = (1, 8)  # the steps at noise levels k and j: where the path bends, so that the connectors are long
ALPHA, TAU = 0.3, 0.1  # the paper's
BLACK, BLUE, ORANGE, GREEN, RED = PALETTE[:5]
GRAY = "#8c959f"


def main(path: Path = PICTURE) -> None:
    ro = rollout(cloud_velocity, NOISE, torch.linspace(1, 0, STEPS + 1))
    drawings = [draw_rollout, draw_leaps, draw_gradient]
    save_row([partial(draw, ro=ro) for draw in drawings], path, height=3.8, left_margin=0.1, right_margin=0.1)


# -------------------------------------------------------------------------------------- the numbers


def cloud_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_sigma = x] for x (..., 2): what flow matching learns, where x_0 is from one of the clouds."""
    clouds = CLOUDS.to(x)
    # Of a given cloud x_sigma is Gaussian, with this mean and variance, and so are x_1 and x_0 given x_sigma.
    offset = x[..., None, :] - (1 - sigma) * clouds  # (..., clouds, 2)
    variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2
    noise = sigma / variance * offset  # E[x_1 | x, cloud]
    shrinkage = (1 - sigma) * WIDTH**2 / variance
    clean = clouds + shrinkage * offset  # E[x_0 | x, cloud]
    # Bayes: each cloud counts by how likely it is for x.
    squared_distance = (offset**2).sum(-1)
    log_likelihood = -squared_distance / (2 * variance)
    weight = log_likelihood.softmax(-1)[..., None]  # (..., clouds, 1)
    velocity = weight * (noise - clean)
    return velocity.sum(-2)


def velocity_gradients(ro: Rollout) -> list[Tensor]:
    """dL/dv of each leap's velocity, (1, 1, 2), the first leap's first; L is the distance of x_0 from WISH.

    A step of gradient descent on v moves the leap's end, x - (k - j) v, along dL/dv.
    """
    gradients = []

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        """What the sweep asks of a network. A closed form has no weights; u is dL/dv, the last leap's first."""
        gradients.insert(0, u)
        _, through_velocity = torch.autograd.functional.vjp(partial(cloud_velocity, sigma=sigma), x, u)
        return through_velocity

    distance = ro.x[-1] - WISH.to(ro.x)
    direction = distance / distance.norm()  # dL/dx_0
    sweep(vjp, ro, leap_terms(ro, PICKS, ALPHA), direction)
    return gradients


def landings(ro: Rollout) -> list[Tensor]:
    """Where the two leaps land: the predictions of x_j and x_0."""
    return [one_step(ro.x[start], ro.v[start], ro.sigmas[start], ro.sigmas[end]) for start, end in spans(ro, PICKS)]


# ------------------------------------------------------------------------------------ the drawings


def draw_rollout(axes: Axes, ro: Rollout) -> None:
    """The states of the rollout, with x_1, x_k, x_j and x_0."""
    draw_background(axes, ro, "1. Roll out, pick two levels", "grey discs: where clean latents lie")
    k, j = PICKS
    draw_text(axes, ro.x[0], "$x_1$, noise", 10, -12)
    draw_text(axes, ro.x[k], "$x_k$", -12, 10)
    draw_text(axes, ro.x[j], "$x_j$", 10, -10)
    draw_text(axes, ro.x[-1], "$x_0$", 12, 0)


def draw_leaps(axes: Axes, ro: Rollout) -> None:
    """The two leaps, and dashed the connectors from their ends to the rollout, with the distances of Eq. 12."""
    draw_background(axes, ro, "2. Leap twice, and connect", "dashes: connectors, a value without gradient")
    _, distances = similarity_weight(ro, PICKS, TAU)
    first, second = landings(ro)
    k, j = PICKS
    draw_arrow(axes, ro.x[k], first, BLUE)
    draw_arrow(axes, ro.x[j], second, ORANGE)
    draw_arrow(axes, first, ro.x[j], RED, "--")
    draw_arrow(axes, second, ro.x[-1], RED, "--")
    draw_text(axes, first, f"$d_j = {distances[0].item():.2f}$", 8, -4, RED)
    draw_text(axes, second, f"$d_0 = {distances[1].item():.2f}$", 8, 6, RED)


def draw_gradient(axes: Axes, ro: Rollout) -> None:
    """Where gradient descent moves the end of each leap."""
    draw_background(axes, ro, "3. The reward turns both leaps", "green: descent on the loss moves their ends")
    k, j = PICKS
    axes.plot(*WISH, "*", color=GREEN, markersize=16)
    draw_text(axes, WISH, "more reward", -30, 14, GREEN)
    draw_arrow(axes, ro.x[k], ro.x[j], BLUE)
    draw_arrow(axes, ro.x[j], ro.x[-1], ORANGE)
    for state, gradient in zip((ro.x[j], ro.x[-1]), velocity_gradients(ro)):
        draw_arrow(axes, state, state + gradient, GREEN)


def draw_background(axes: Axes, ro: Rollout, title: str, legend: str) -> None:
    """The clouds of clean latents and the rollout, without ticks: only where things lie counts."""
    axes.set_title(title, loc="left", fontsize=15, color=BLACK)
    axes.set_xlabel(legend, loc="left", fontsize=12, color=INK)
    axes.scatter(*CLOUDS.T, s=1500, color="#d8dee4", linewidths=0)
    axes.plot(*ro.x.flatten(1).T, color=GRAY, linewidth=1.5, marker="o", markersize=5)
    axes.plot(*ro.x[list(PICKS)].flatten(1).T, "o", color=BLACK, markersize=8)
    # Equal scales, or a turn of a velocity would not look like one.
    axes.set(xticks=[], yticks=[], xlim=(-2, 2.2), ylim=(-1.6, 2.1), aspect="equal")
    axes.spines[:].set_visible(False)


def draw_text(axes: Axes, point: Tensor, text: str, dx: float, dy: float, color: str = BLACK) -> None:
    """Text beside a point; dx and dy in printer's points."""
    axes.annotate(text, point.flatten().tolist(), (dx, dy), textcoords="offset points", color=color, fontsize=15)


def draw_arrow(axes: Axes, start: Tensor, end: Tensor, color: str, style: str = "-") -> None:
    # matplotlib would stop short of both points.
    look = dict(arrowstyle="-|>", color=color, linestyle=style, linewidth=2.5, mutation_scale=18, shrinkA=0, shrinkB=0)
    axes.annotate("", end.flatten().tolist(), start.flatten().tolist(), arrowprops=look)


if __name__ == "__main__":
    main()
