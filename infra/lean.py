"""--lean: all weights in bf16 on one GPU, and an optimizer whose moments take a byte each (torchao).

An update of 1e-5 is below the precision of most weights in bf16: rounding to the nearest number would undo each update.
Stochastic rounding goes up or down, with odds such that the mean of the rounded weight is the exact one.
"""

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit  # the tensor class of quantized moments


class LeanAdamW(AdamW8bit):
    """torchao's AdamW8bit with fp32 moments for small tensors, run without torch.compile.

    Construct it with bf16_stochastic_round=True.
    """

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """A moment of zeros for the parameter `p`.

        AdamW8bit quantizes moments of 4096 entries or more, and keeps smaller ones in the parameter's dtype. In bf16 a
        second moment could not decay: 0.999 of a bf16 number rounds to the number itself. So small moments are fp32.
        """
        buffer = super()._new_buffer(p, signed)
        return buffer if isinstance(buffer, OptimState8bit) else buffer.float()

    # AdamW8bit compiles its update anew for each shape of a parameter. Eager mode needs no compiler, and no wait.
    @torch.compiler.set_stance("force_eager")
    def step(self, closure=None):
        return super().step(closure)
