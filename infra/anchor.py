"""--anchor BETA: any method, with the trained velocity held near the untuned network's.

Wherever the method differentiates the network, at a state x that the anchor treats as constant, the loss gains

    BETA x mean over samples of mean |v(x) - v_base(x)|^2        the inner mean is over all entries of a latent

A method that differentiates at several states gains as many terms. The logged `anchor` is their mean, without BETA.
The price is two more forwards at each of these states, and a second
forward and backward where the method asks for (dv/dx)^T u.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from leaps import Samples


def anchored(method: Callable[[Samples], dict[str, Tensor]], beta: float) -> Callable[[Samples], dict[str, Tensor]]:
    """The method with the anchor's gradient added to its own. `beta` weighs the anchor in the loss."""

    def method_with_anchor(samples: Samples) -> dict[str, Tensor]:
        distances = []

        def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
            difference = samples.velocity(x, sigma) - samples.base(x, sigma)  # (b, n, c)
            distances.append(difference.square().flatten(1).mean(1))  # (b,)
            # d/dv of beta x mean over samples of mean |v - v_base|^2
            entries = difference[0].numel()
            pull = 2 * beta / samples.total / entries * difference
            if not wrt_x:
                return samples.vjp(x, sigma, u + pull)
            # What flows on into x is the method's gradient alone: for the anchor the state is fixed.
            samples.vjp(x, sigma, pull)
            return samples.vjp(x, sigma, u, wrt_x=True)

        log = method(samples._replace(vjp=vjp))
        return log | dict(anchor=torch.stack(distances).mean(0))

    return method_with_anchor
