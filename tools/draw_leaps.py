"""The README's picture of the method:  python -m tools.draw_leaps  (seconds; writes assets/leaps.png)

A latent of two numbers, so that a rollout can be drawn.  Its velocity needs no network: where clean latents are from a
few Gaussian clouds, the velocity has a closed form.  Rollout, leaps and gradient are those of training, from leaps.py.
"""

from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from torch import Tensor

from infra.flags import flags
from infra.pictures import INK, PALETTE, save_row
from leaps import Rollout, leap_terms, one_step, rollout, similarity_weight, spans, sweep, vjp_of

CLOUDS = torch.tensor(  # centres of the clean latents
    [
        [0.0, 0.9],
        [1.6, 0.7],
        [1.5, -0.7],
    ]
)
WIDTH = 0.12  # a cloud's standard deviation
NOISE = torch.tensor([[[-1.9, -0.9]]])  # x_1, (b, n, c) = (1, 1, 2)
WISH = torch.tensor([-0.8, 0.9])  # the reward is higher nearer to it
STEPS = 12
PICKS = (1, 7)  # the steps at noise levels k and j: far apart, so that the arrows can be told apart
ALPHA, TAU = 0.3, 0.1  # the paper's
BLACK, BLUE, ORANGE, GREEN = PALETTE[:4]
LEAP_COLORS = (BLUE, ORANGE)
START_NAMES = ("$x_k$", "$x_j$")


@flags
class DrawLeapsFlags:
    """Draw the rollout, the leaps and the gradient."""

    out: Path = Path("assets/leaps.png")
    """The picture."""


def main(cfg: DrawLeapsFlags) -> None:
    sigmas = torch.linspace(1, 0, STEPS + 1)
    ro = rollout(cloud_velocity, NOISE, sigmas)
    charts = [
        partial(draw_rollout, ro=ro),
        partial(draw_leaps, ro=ro),
        partial(draw_gradient, ro=ro),
    ]
    save_row(charts, cfg.out)


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
    # The sweep of training asks for one vector-Jacobian product a leap. This one also notes what it was asked for.
    vjp_wrt_x = vjp_of(cloud_velocity)
    gradients = []

    def recording_vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        # The sweep hands over dL/dv as u; it goes from the last leap to the first.
        gradients.insert(0, u)
        if wrt_x:
            return vjp_wrt_x(x, sigma, u, wrt_x)
        return None  # a closed form has no weights

    distance = ro.x[-1] - WISH.to(ro.x)
    direction = distance / distance.norm()  # dL/dx_0
    sweep(recording_vjp, ro, leap_terms(ro, PICKS, ALPHA), direction)
    return gradients


def leap_points(ro: Rollout) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each leap: where it starts, where it lands, and where the rollout is at that level."""
    points = []
    for start, end in spans(ro, PICKS):
        k = ro.sigmas[start]
        j = ro.sigmas[end]
        landing = one_step(ro.x[start], ro.v[start], k, j)
        points.append((ro.x[start], landing, ro.x[end]))
    return points


# ------------------------------------------------------------------------------------ the drawings


def draw_rollout(axes: Axes, ro: Rollout) -> None:
    """The states of the rollout, with x_1, x_k, x_j and x_0."""
    draw_background(axes, ro, "1. Roll out, without a gradient; pick two steps")
    noise = ro.x[0]
    clean = ro.x[-1]
    draw_text(axes, noise, "$x_1$, noise", 6, -10)
    draw_text(axes, clean, "$x_0$", 7, -6)
    for pick, name in zip(PICKS, START_NAMES):
        state = ro.x[pick]
        x, y = state.flatten()
        axes.plot(x, y, "o", color=BLACK, markersize=6)
        draw_text(axes, state, name, -6, 8, BLACK)


def draw_leaps(axes: Axes, ro: Rollout) -> None:
    """The two leaps, and dotted the connectors from their ends to the rollout, with the distances of Eq. 12."""
    draw_background(axes, ro, "2. Leap along each one's velocity; connect")
    landing_names = (r"$\hat{x}_{j|k}$", r"$\hat{x}_{0|j}$")
    distance_names = ("d_j", "d_0")
    _, distances = similarity_weight(ro, PICKS, TAU)
    for i, (start, landing, state) in enumerate(leap_points(ro)):
        color = LEAP_COLORS[i]
        draw_arrow(axes, start, landing, color)
        draw_arrow(axes, landing, state, color, ":", "-")  # the connector
        distance = f"${distance_names[i]} = {distances[i].item():.2f}$"
        draw_text(axes, landing, f"{landing_names[i]}   {distance}", 9, -5, color)
        draw_text(axes, start, START_NAMES[i], -14, 6, BLACK)


def draw_gradient(axes: Axes, ro: Rollout) -> None:
    """Where gradient descent moves the end of each leap."""
    draw_background(axes, ro, "3. The reward's gradient turns both velocities")
    axes.plot(*WISH, "*", color=GREEN, markersize=12)
    draw_text(axes, WISH, "more reward", -24, 10, GREEN)
    gradients = velocity_gradients(ro)
    for i, (start, _, state) in enumerate(leap_points(ro)):
        draw_arrow(axes, start, state, LEAP_COLORS[i], "--", "-")
        # 0.8 is for the eye: what counts is directions and the ratio of the lengths.
        draw_arrow(axes, state, state + 0.8 * gradients[i], GREEN)


def draw_background(axes: Axes, ro: Rollout, title: str) -> None:
    """The clouds of clean latents and the rollout, without ticks: only where things lie counts."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(3, 60, 2, generator=generator)
    # Wider than the clouds are, so that one sees points and not a blot.
    spread = 1.5 * WIDTH
    clean = CLOUDS[:, None] + spread * offsets
    x, y = clean.flatten(0, 1).T
    axes.scatter(x, y, s=6, color="#d0d7de", linewidths=0)
    x, y = ro.x.flatten(1).T
    axes.plot(x, y, color="#8c959f", linewidth=1, marker="o", markersize=3.5)
    # Equal scales, or a turn of a velocity would not look like one.
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_text(axes: Axes, point: Tensor, text: str, dx: float, dy: float, color: str = INK) -> None:
    """Text beside a point; dx and dy in printer's points."""
    axes.annotate(
        text,
        point.flatten().tolist(),
        xytext=(dx, dy),
        textcoords="offset points",
        color=color,
        fontsize=10,
    )


def draw_arrow(axes: Axes, start: Tensor, end: Tensor, color: str, style: str = "-", head: str = "-|>") -> None:
    """An arrow, or with the head "-" a line."""
    look = {
        "arrowstyle": head,
        "color": color,
        "linestyle": style,
        "linewidth": 1.6,
        # matplotlib would stop short of both points.
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate("", end.flatten().tolist(), start.flatten().tolist(), arrowprops=look)


if __name__ == "__main__":
    main(tyro.cli(DrawLeapsFlags))
