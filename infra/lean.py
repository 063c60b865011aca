"""All weights in bf16 on one GPU: an optimizer that rounds them at random, with a byte per moment (torchao).

An update of 1e-5 is below the precision of most weights in bf16: rounded to the nearest, it would be lost every time.
Rounded up or down with the odds of what is cut off, it survives on average.
"""

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class LeanAdamW(AdamW8bit):
    """torchao's AdamW8bit, but for two things; to be made with bf16_stochastic_round."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """Small tensors, which it does not quantize, would have bf16 moments, too coarse to decay: fp32 here."""
        buffer = super()._new_buffer(p, signed)
        return buffer if isinstance(buffer, OptimState8bit) else buffer.float()

    @torch.compiler.set_stance("force_eager")
    def step(self, closure=None):
        """It would compile a kernel for each shape."""
        return super().step(closure)
