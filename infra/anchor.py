"""--anchor BETA: any method, with the trained velocity held near the untuned network's.

Wherever the method differentiates the network, at a state x that the anchor treats as constant, the loss gains BETA
times the mean over samples of one of these; means inside are over all entries of a latent:

    velocity    mean |v(x) - v_base(x)|^2
    norm        max(0, |v(x)| - |v_base(x)|), |v| being the root of the mean of v^2: NormGuard (arXiv 2606.27771)

The second one leaves the direction free: NormGuard's authors find that trained velocities are 5% to 15% longer than the
base's, and that this is what spoils images. A method that differentiates at several states gains as many terms. The
logged `anchor` is their mean, without BETA. The price is two more forwards at each of these states, and a second
forward and backward where the method asks for (dv/dx)^T u.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from leaps import Samples


def anchored(
    method: Callable[[Samples], dict[str, Tensor]],
    beta: float,
    anchor_on: Literal["velocity", "norm"] = "velocity",
) -> Callable[[Samples], dict[str, Tensor]]:
    """The method with the anchor's gradient added to its own. `beta` weighs the anchor in the loss."""
    distance_of = squared_distance if anchor_on == "velocity" else excess_norm

    def method_with_anchor(samples: Samples) -> dict[str, Tensor]:
        distances = []

        def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
            v = samples.velocity(x, sigma)
            v_base = samples.base(x, sigma)
            distance, slope = distance_of(v, v_base)
            distances.append(distance)
            # The loss is a mean over samples, and the distance a mean over the entries of a latent.
            entries = x[0].numel()
            pull = beta / samples.total / entries * slope
            if not wrt_x:
                return samples.vjp(x, sigma, u + pull)
            # What flows on into x is the method's gradient alone: for the anchor the state is fixed.
            samples.vjp(x, sigma, pull)
            return samples.vjp(x, sigma, u, wrt_x=True)

        log = method(samples._replace(vjp=vjp))
        return log | dict(anchor=torch.stack(distances).mean(0))

    return method_with_anchor


def squared_distance(v: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """mean |v - base|^2 of each sample, (b,), and the derivative of the square in v, (b, n, c)."""
    difference = v - base
    distance = difference.square().flatten(1).mean(1)
    return distance, 2 * difference


def excess_norm(v: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """By how much v is longer than base, (b,), 0 where it is not, and n c times the derivative in v, (b, n, c)."""
    norm = v.square().flatten(1).mean(1).sqrt()
    base_norm = base.square().flatten(1).mean(1).sqrt()
    excess = (norm - base_norm).relu()
    is_longer = (norm > base_norm)[:, None, None]
    length = norm.clamp(min=1e-12)[:, None, None]  # a velocity of zeros has no direction
    slope = v / length
    return excess, slope * is_longer
