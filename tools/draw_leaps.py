"""The README's picture of the method:  python -m tools.draw_leaps  (seconds; writes assets/leaps.png)

A latent of two numbers, so that a rollout can be drawn.  Its velocity needs no network: where clean latents are from a
few Gaussian clouds it has a closed form.  Rollout, leaps and gradient are those that train, from leaps.py.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from torch import Tensor

from infra.pictures import INK, PALETTE, save_row
from leaps import Rollout, leap_terms, one_step, rollout, similarity_weight, spans, sweep, vjp_of

CLOUDS = torch.tensor([[0.0, 0.9], [1.6, 0.7], [1.5, -0.7]])  # centres of the clean latents
WIDTH = 0.12  # a cloud's standard deviation
NOISE = torch.tensor([[[-1.9, -0.9]]])  # x_1, (b, n, c) = (1, 1, 2)
WISH = torch.tensor([-0.8, 0.9])  # the reward is higher nearer to it
STEPS, PICKS, ALPHA, TAU = 12, (1, 7), 0.3, 0.1
BLACK, BLUE, ORANGE, GREEN = PALETTE[:4]


@dataclass(frozen=True)
class Config:
    """Draw the rollout, the leaps and the gradient."""

    out: Path = Path("assets/leaps.png")
    """The picture."""


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_sigma = x] for x (..., 2): what flow matching learns, where x_0 is from one of the clouds.

    Given a cloud all is Gaussian; the clouds count by how likely they are for x.
    """
    clouds = CLOUDS.to(x)
    off = x[..., None, :] - (1 - sigma) * clouds  # (..., clouds, 2)
    spread = (1 - sigma) ** 2 * WIDTH**2 + sigma**2  # the variance of x_sigma, given a cloud
    noise, clean = sigma / spread * off, clouds + (1 - sigma) * WIDTH**2 / spread * off
    likely = (-(off**2).sum(-1) / (2 * spread)).softmax(-1)
    return (likely[..., None] * (noise - clean)).sum(-2)


def pulls(ro: Rollout) -> list[Tensor]:
    """dL/dv of each leap's velocity, (1, 1, 2), the first leap's first; L is the distance of x_0 from WISH.

    A step down that gradient moves the leap's end, x - (k - j) v, along it.
    """
    into_x, found = vjp_of(velocity), []

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        found.insert(0, u)  # the last leap comes first
        return into_x(x, sigma, u, wrt_x) if wrt_x else None  # there are no weights

    away = ro.x[-1] - WISH.to(ro.x)
    sweep(vjp, ro, leap_terms(ro, PICKS, ALPHA), away / away.norm())
    return found


# ------------------------------------------------------------------------------------ three drawings


def background(axes: Axes, ro: Rollout, title: str) -> None:
    """The clouds of clean latents and the rollout, without ticks: only where things lie counts."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    random = torch.Generator().manual_seed(0)
    clean = CLOUDS[:, None] + 1.5 * WIDTH * torch.randn(3, 60, 2, generator=random)
    axes.scatter(*clean.flatten(0, 1).T, s=6, color="#d0d7de", linewidths=0)
    axes.plot(*ro.x.flatten(1).T, color="#8c959f", linewidth=1, marker="o", markersize=3.5)
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def label(axes: Axes, at: Tensor, text: str, dx: float, dy: float, color: str = INK) -> None:
    axes.annotate(text, at.flatten().tolist(), (dx, dy), textcoords="offset points", color=color, fontsize=10)


def arrow(axes: Axes, start: Tensor, end: Tensor, color: str, style: str = "-", head: str = "-|>") -> None:
    look = dict(arrowstyle=head, color=color, linestyle=style, linewidth=1.6, shrinkA=0, shrinkB=0)
    axes.annotate("", end.flatten().tolist(), start.flatten().tolist(), arrowprops=look)


def leaps_of(ro: Rollout) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each leap: where it starts, where it lands, and where the rollout is at that level."""
    ends = spans(ro, PICKS)
    return [(ro.x[s], one_step(ro.x[s], ro.v[s], ro.sigmas[s], ro.sigmas[e]), ro.x[e]) for s, e in ends]


def draw_rollout(axes: Axes, ro: Rollout) -> None:
    background(axes, ro, "1. Roll out, without a gradient; pick two steps")
    label(axes, ro.x[0], "$x_1$, noise", 6, -10)
    label(axes, ro.x[-1], "$x_0$", 7, -6)
    for pick, name in zip(PICKS, ("$x_k$", "$x_j$")):
        axes.plot(*ro.x[pick].flatten(), "o", color=BLACK, markersize=6)
        label(axes, ro.x[pick], name, -6, 8, BLACK)


def draw_leaps(axes: Axes, ro: Rollout) -> None:
    background(axes, ro, "2. Leap along each one's velocity; connect")
    _, d = similarity_weight(ro, PICKS, TAU)
    names = (r"$\hat{x}_{j|k}$", r"$\hat{x}_{0|j}$"), ("$x_k$", "$x_j$"), ("d_j", "d_0")
    for (start, landed, real), color, landing, name, distance, of_leap in zip(leaps_of(ro), (BLUE, ORANGE), *names, d):
        arrow(axes, start, landed, color)
        arrow(axes, landed, real, color, ":", "-")
        label(axes, landed, f"{landing}   ${distance} = {of_leap.item():.2f}$", 9, -5, color)
        label(axes, start, name, -14, 6, BLACK)


def draw_gradient(axes: Axes, ro: Rollout) -> None:
    background(axes, ro, "3. The reward's gradient turns both velocities")
    axes.plot(*WISH, "*", color=GREEN, markersize=12)
    label(axes, WISH, "more reward", -24, 10, GREEN)
    for (start, _, real), pull, color in zip(leaps_of(ro), pulls(ro), (BLUE, ORANGE)):
        arrow(axes, start, real, color, "--", "-")
        arrow(axes, real, real + 0.8 * pull, GREEN)


def run(cfg: Config) -> None:
    ro = rollout(velocity, NOISE, torch.linspace(1, 0, STEPS + 1))
    save_row([partial(draw, ro=ro) for draw in (draw_rollout, draw_leaps, draw_gradient)], cfg.out)


if __name__ == "__main__":
    run(tyro.cli(Config, description=__doc__))
