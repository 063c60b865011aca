"""A frozen network in fp8, a byte a weight, for a LoRA over it on a small GPU.

Each row of a linear layer is scaled to the largest number of e4m3, 448, and rounded to its 4 significant bits: a weight
is off by 1/16 at most, by 1/40 on average, but for those below 1/28,000 of their row's largest. A layer is up-cast as
it is used, forward and backward, so that one at a time is there in full.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Flux

KIND, LARGEST = torch.float8_e4m3fn, 448.0


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) in fp8, and the scale of each row, (out, 1)."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (weight.float() / scale).to(KIND), scale


def up_cast(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.to(dtype) * scale).to(dtype)


class Product(torch.autograd.Function):
    """x W^T + b of a frozen W in fp8, which is up-cast once more in the backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, up_cast(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ up_cast(*ctx.saved_tensors, grad.dtype), None, None, None


class Linear8(nn.Module):
    """A frozen linear layer with its weight in fp8. Parameters: weight, scale, and bias if there is one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = torch.empty_like(linear.weight, dtype=KIND), linear.weight.new_empty(len(linear.weight), 1)
        self.weight, self.scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale.float()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.scale, self.bias)


def to_fp8(flux: Flux) -> None:
    """Give the blocks' linear layers, also those inside of LoRAs, the form above, in place; `in_fp8` has the values."""
    for stack in (flux.double_blocks, flux.single_blocks):
        for name, linear in [(n, m) for n, m in stack.named_modules() if type(m) is nn.Linear]:
            stack.set_submodule(name, Linear8(linear))


def in_fp8(tensors: Iterator[tuple[str, Tensor]], known: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network whose parameters are `known`: where a weight has a scale there, both."""
    for name, tensor in tensors:
        scaled = f"{name.removesuffix('weight')}scale"
        if name.endswith(".weight") and scaled in known:
            tensor, scale = rounded(tensor)
            yield scaled, scale
        yield name, tensor
