"""What a method needs around it: folders, prompts, logs, processes, checkpoints, pictures."""

import importlib.util
import sys

# Where torchao is installed, diffusers and transformers import it, which prints warnings at every start, for their own
# quantization, which nothing here uses. They look for it once, so it is hidden while they do; infra/lean.py finds it.
if "torchao" not in sys.modules and importlib.util.find_spec("torchao"):
    sys.modules["torchao"] = None
    from diffusers.utils import is_torchao_available as diffusers_looks
    from transformers.utils import is_torchao_available as transformers_looks

    diffusers_looks(), transformers_looks()
    del sys.modules["torchao"]
