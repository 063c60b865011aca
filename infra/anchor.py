"""--anchor BETA: the trained velocity is held near the base's.

Wherever a method differentiates the network, at a state x that is held fixed, the loss gains

    BETA x mean over samples of mean |v(x) - v_base(x)|^2        the inner mean over all entries of a latent

A method that differentiates at more states is held by as many terms.  What is logged is their mean, without BETA.

With a LoRA the base is the same network without it; with all weights it is a frozen copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from formats.lora import LoRA
from infra.distributed import Process, local_shard, shard_flux
from leaps import VJP, Velocity, vjp_of
from model import Flux


def anchored(velocity: Velocity, base: Velocity, beta: float, note: Callable[[Tensor], None]) -> VJP:
    """`vjp_of(velocity)` that adds to the weights' `.grad` the anchor's gradient too, beta times a sum over samples.

    `note` is given the distance of each sample, (b,).
    """

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        # The state is fixed for the anchor but not for the method: what goes back into it is of u alone.
        into_x = vjp_of(velocity)(x, sigma, u, wrt_x=True) if wrt_x else None
        v = velocity(x.detach(), sigma).to(x.dtype)
        with torch.no_grad():
            apart = v - base(x, sigma).to(x.dtype)
        note(apart.square().flatten(1).mean(1))
        v.backward(2 * beta / apart[0].numel() * apart + (0 if wrt_x else u))
        return into_x

    return vjp


def without_lora(flux: Flux, velocity: Velocity) -> Velocity:
    """A velocity of `flux`, as it was before its LoRA; of a network that has none, the same."""
    layers = [layer for layer in flux.modules() if isinstance(layer, LoRA)]

    def base(x: Tensor, sigma: Tensor) -> Tensor:
        for layer in layers:
            layer.off = True
        try:
            return velocity(x, sigma)
        finally:
            for layer in layers:
                layer.off = False

    return base


@torch.no_grad()
def frozen_copy(flux: Flux, process: Process, dtype: torch.dtype) -> Flux:
    """A copy of a network that is never trained, in the dtype it computes in, cut over the ranks as the other is."""
    with torch.device("meta"):
        copy = Flux(flux.config).to(dtype).requires_grad_(False)
    shard_flux(copy, process, dtype)
    copy.to_empty(device=process.device)
    for ours, theirs in zip(copy.parameters(), flux.parameters(), strict=True):
        local_shard(ours).copy_(local_shard(theirs))
    return copy
