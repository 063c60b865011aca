"""--fp8: the frozen network under a LoRA at a byte a weight, for a small GPU.

Each row of a linear layer's weight is scaled so that its largest entry is 448, the largest number of e4m3, and rounded
to e4m3's 4 significant bits. The error of a weight is at most 1/16 of it and 1/44 on average, except for weights below
1/28,000 of the largest in their row. A layer is up-cast as it computes, forward and backward, so that one layer at a
time is in full precision.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Flux

E4M3 = torch.float8_e4m3fn  # 1 sign, 4 exponent and 3 mantissa bits
E4M3_MAX = 448.0
NamedTensors = Iterator[tuple[str, Tensor]]


def quantize_frozen(flux: Flux, tensors: NamedTensors) -> NamedTensors:
    """Give the linear layers of a Flux's blocks the form of `Fp8Linear`, in place, and return `tensors` for that form.

    `flux` has its LoRAs already, if any: within them the frozen layers are converted. The values of its parameters do
    not count; `tensors` has them, by name, and is read one tensor at a time.
    """
    for stack in (flux.double_blocks, flux.single_blocks):
        # A list, since the loop replaces what it walks over.
        for name, module in list(stack.named_modules()):
            if type(module) is nn.Linear:
                stack.set_submodule(name, Fp8Linear(module))
    parameter_names = {name for name, _ in flux.named_parameters()}
    return quantized_tensors(tensors, parameter_names)


def quantized_tensors(tensors: NamedTensors, parameter_names: set[str]) -> NamedTensors:
    """`tensors`, with each weight that has a scale among the parameters as two tensors: e4m3 numbers and scales."""
    for name, tensor in tensors:
        scale_name = f"{name.removesuffix('weight')}scale"
        if scale_name in parameter_names:
            tensor, scale = quantize(tensor)
            yield scale_name, scale
        yield name, tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) in e4m3, and the scale of each of its rows, (out, 1) in fp32."""
    row_max = weight.float().abs().amax(1, keepdim=True)
    scale = row_max.clamp(min=1e-12) / E4M3_MAX  # a row may be zero
    numbers = (weight.float() / scale).to(E4M3)
    return numbers, scale


def up_cast(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # The product is in the scale's fp32, and is rounded once.
    return (weight.to(dtype) * scale).to(dtype)


class Fp8Linear(nn.Module):
    """A frozen linear layer with its weight in e4m3. Parameters: weight, scale, and bias if there is one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # On the layer's device, meta included. The values come from quantized_tensors.
        weight = torch.empty_like(linear.weight, dtype=E4M3)
        scale = linear.weight.new_empty(len(weight), 1, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return Fp8Product.apply(x, self.weight, self.scale, self.bias)


class Fp8Product(torch.autograd.Function):
    """x W^T + b of a frozen W in e4m3.

    autograd alone would keep each layer's up-cast weight until its backward. This keeps the e4m3 numbers, and up-casts
    them a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        full_weight = up_cast(weight, scale, x.dtype)
        return F.linear(x, full_weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        grad_x = grad @ up_cast(weight, scale, grad.dtype)
        # One gradient for each argument of forward: all but x are frozen.
        return grad_x, None, None, None
