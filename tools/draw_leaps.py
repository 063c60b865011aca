"""The README's picture of the method:  python -m tools.draw_leaps  (seconds; writes assets/leaps.png)

A latent of two numbers, so that a rollout can be drawn.  Its velocity needs no network: where clean latents are from a
few Gaussian clouds, the velocity has a closed form.  Rollout, leaps and gradient are those of training, from leaps.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from infra.pictures import GRID, INK, PALETTE, save_row
from leaps import Rollout, leap_terms, one_step, rollout, similarity_weight, spans, sweep

PICTURE = Path("assets/leaps.png")
CLOUDS = torch.tensor([[-0.9, 1.5], [0.4, 0.6], [1.3, -1.5]])  # centres of the clean latents
WIDTH = 0.12  # a cloud's standard deviation
NOISE = torch.tensor([[[-1.9, -1.2]]])  # x_1, (b, n, c) = (1, 1, 2)
WISH = torch.tensor([-1.8, 0.5])  # the reward is higher nearer to it
STEPS = 12
PICKS = (1, 8)  # the steps at noise levels k and j: where the path bends, so that the connectors are long
ALPHA, TAU = 0.3, 0.1  # the paper's
_, *LEAP_COLORS, GREEN, RED = PALETTE[:5]  # blue and orange


def main(path: Path = PICTURE) -> None:
    sigmas = torch.linspace(1, 0, STEPS + 1)
    ro = rollout(cloud_velocity, NOISE, sigmas)
    charts = [partial(draw_leaps, ro=ro), partial(draw_gradient, ro=ro)]
    save_row(charts, path, height=3.8, left_margin=0.1, right_margin=0.2)


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


def leap_points(ro: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Where the leaps start, where the rollout is at their end, and where they land, (leaps, 2) each."""
    starts, ends, landings = [], [], []
    for start, end in spans(ro, PICKS):
        landing = one_step(ro.x[start], ro.v[start], ro.sigmas[start], ro.sigmas[end])
        starts.append(ro.x[start].flatten())
        ends.append(ro.x[end].flatten())
        landings.append(landing.flatten())
    return torch.stack(starts), torch.stack(ends), torch.stack(landings)


def velocity_gradients(ro: Rollout) -> Tensor:
    """dL/dv of each leap's velocity, (leaps, 1, 1, 2); L is the distance of x_0 from WISH.

    A step of gradient descent on v moves the leap's end, x - (k - j) v, along dL/dv.
    """
    gradients = []

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor:
        """What the sweep asks of a network. A closed form has no weights; u is dL/dv, the last leap's first."""
        gradients.insert(0, u)
        _, vjp_in_x = torch.func.vjp(partial(cloud_velocity, sigma=sigma), x)
        return vjp_in_x(u)[0]

    offset = ro.x[-1] - WISH.to(ro.x)
    grad = offset / offset.norm()  # dL/dx_0
    terms = leap_terms(ro, PICKS, ALPHA)
    sweep(vjp, ro, terms, grad)
    return torch.stack(gradients)


# ------------------------------------------------------------------------------------ the drawings


def draw_leaps(axes: Axes, ro: Rollout) -> None:
    """The rollout, the two leaps, and in red the connectors, with the distances of Eq. 12."""
    draw_background(axes, ro, "1. Roll out, leap twice, connect", "grey: rollout; discs: clean latents")
    starts, ends, landings = leap_points(ro)
    draw_arrows(axes, starts, landings, LEAP_COLORS)
    connectors = torch.stack([landings, ends])  # (2, leaps, 2)
    axes.plot(*connectors.unbind(-1), color=RED, linewidth=4)
    _, (d_j, d_0) = similarity_weight(ro, PICKS, TAU)
    draw_text(axes, landings[0], f"connector,\n$d_j = {d_j.item():.2f}$", 12, -16, RED)
    draw_text(axes, landings[1], f"connector,\n$d_0 = {d_0.item():.2f}$", 12, -16, RED)
    k, j = PICKS
    draw_text(axes, ro.x[0], "$x_1$, noise", 12, -14)
    draw_text(axes, ro.x[k], "$x_k$", -14, 10)
    draw_text(axes, ro.x[j], "$x_j$", -24, 0)
    draw_text(axes, ro.x[-1], "$x_0$", -26, -4)


def draw_gradient(axes: Axes, ro: Rollout) -> None:
    """Where gradient descent moves the end of each leap."""
    draw_background(axes, ro, "2. The reward pulls both leaps", "green: where each leap should end")
    starts, ends, _ = leap_points(ro)
    draw_arrows(axes, starts, ends, LEAP_COLORS)
    pulls = velocity_gradients(ro).flatten(1)
    draw_arrows(axes, ends, ends + pulls, [GREEN])
    axes.plot(*WISH, "*", color=GREEN, markersize=16)
    draw_text(axes, WISH, "more\nreward", -12, 12, GREEN)


def draw_background(axes: Axes, ro: Rollout, title: str, legend: str) -> None:
    """The clouds of clean latents and the rollout, without ticks: only where things lie counts."""
    axes.set_title(title, loc="left", fontsize=14)
    axes.set_xlabel(legend, loc="left", fontsize=12, color=INK)
    axes.scatter(*CLOUDS.T, s=1500, color=GRID, linewidths=0)
    axes.plot(*ro.x.flatten(1).T, "o-", color="#8c959f", markersize=5)
    # Equal scales, or a turn of a velocity would not look like one.
    axes.set(xticks=[], yticks=[], xlim=(-2.1, 1.7), ylim=(-1.9, 1.9), aspect="equal")
    axes.spines[:].set_visible(False)


def draw_text(axes: Axes, point: Tensor, text: str, dx: float, dy: float, color: str = "black") -> None:
    """Text beside a point; dx and dy in printer's points."""
    axes.annotate(text, point.flatten().tolist(), (dx, dy), textcoords="offset points", color=color, fontsize=15)


def draw_arrows(axes: Axes, starts: Tensor, ends: Tensor, colors: Sequence[str]) -> None:
    """Arrows between points (n, 2), to the scale of the axes."""
    # By default quiver scales arrows to look nice.
    scale = dict(angles="xy", scale_units="xy", scale=1)
    directions = ends - starts
    axes.quiver(*starts.T, *directions.T, color=colors, width=0.012, zorder=3, **scale)


if __name__ == "__main__":
    main()
