"""What a run needs around its method: processes, checkpoints, prompts, logs, pictures."""

import logging

# diffusers and transformers import torchao where it is installed. Its import logs warnings about kernels and enums that
# nothing here uses, at every start and on every rank.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
    logging.getLogger(name).setLevel(logging.ERROR)
