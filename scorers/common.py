"""What every scorer is made of: preprocessing with a gradient, and published weights, read strictly.

Preprocessing works on tensors because a PIL image has no gradient, and in fp32 because between 1/2 and 1 bf16 has steps
of 1/256, a whole grey level.  The result equals PIL's, which published scores rest on, but for PIL's own rounding.

Legend: b images, h and w their height and width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from infra.reading import AGAIN, check_finite, parse_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STRICT = dict(  # for from_pretrained
    dtype=torch.float32,  # by default the file's, often half precision
    # By default a tensor that is missing is random, with no more than a warning: `check_complete` reads the report.
    output_loading_info=True,
    ignore_mismatched_sizes=True,  # puts tensors of another shape into the report, too
)

Score = Callable[[Tensor, Sequence[str]], Tensor]  # images (b, 3, h, w) in [0, 1], prompts -> (b,)
Device = str | torch.device
Tensors = dict[str, Tensor]  # a state dict


class Scorer(NamedTuple):
    """A scorer: `score` is what a loss sees, differentiable in the images if the scorer has a gradient."""

    score: Score
    scale: float = 1.0  # people report scale * score
    model: nn.Module | None = None  # the frozen network; rules have none
    task_of: Callable[[str], str] | None = None  # a prompt's task, where means are reported for each task
    reads: tuple[PreTrainedTokenizerBase, int] | None = None  # the tokenizer of prompts, and how many tokens are read


# --------------------------------------------------------------------------------------- preprocessing


def preprocess(images: Tensor, size: int, rounded: bool = False) -> Tensor:
    """CLIP's preprocessing: shortest side to `size`, centre crop, normalise.  (b, 3, h, w) -> (b, 3, size, size)

    A crop that would begin at half a pixel begins at the pixel before, as in transformers; `rounded`, at the nearest
    even one, as in torchvision.
    """
    images = images.float()
    height, width = images.shape[-2:]
    short = min(height, width)
    # The long side is rounded down: transformers and torchvision agree on that.
    images = resize(images, height * size // short, width * size // short)
    offsets = [(side - size) / 2 for side in images.shape[-2:]]
    row, column = map(round if rounded else int, offsets)
    return normalize(images[..., row : row + size, column : column + size])


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as PIL does: the columns, then the rows, each followed by a clip to [0, 1]."""
    if images.shape[-2:] == (height, width):
        return images  # and no clip: an augmented image may leave [0, 1]
    # Bicubic weights are negative in places, so values overshoot at edges; an 8-bit image of PIL cannot hold those.
    images = bicubic(images, images.shape[-2], width).clamp(0, 1)
    return bicubic(images, height, width).clamp(0, 1)


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic interpolation as PIL's; without antialias a reduced image would skip pixels."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def normalize(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to CLIP's mean 0 and standard deviation 1 in each channel."""
    mean = images.new_tensor(CLIP_MEAN).view(3, 1, 1)
    std = images.new_tensor(CLIP_STD).view(3, 1, 1)
    return (images - mean) / std


# -------------------------------------------------------------------------------------- published weights


def find_weights(path: str | Path, name: str) -> Path:
    """The file of weights that a path means: `name` in a folder, or the file itself, whatever its name."""
    file = Path(path)
    if file.is_dir():
        file = file / name
    if not file.is_file():
        raise ValueError(f"no reward file at {str(file)!r}: download it, or give its path as NAME=PATH")
    return file


def require_file(folder: Path, *names: str) -> None:
    """Raise ValueError if a reward's folder has none of the files that `names` (patterns, too) stand for."""
    if not any(list(folder.glob(name)) for name in names):
        raise ValueError(f"{folder} lacks {' or '.join(names)}: see the README's table of rewards")


def read_tensors(file: Path) -> dict[str, Any]:
    """The content of a published file of tensors, on the CPU. Raises ValueError naming the file if it is damaged."""
    # weights_only: a .pt file is a pickle, which could run a stranger's code.
    load = partial(torch.load, map_location="cpu", weights_only=True)
    load = load_file if file.suffix == ".safetensors" else load
    return parse_file(file, lambda path: dict(load(path)), f"truncated, or no file of tensors: {AGAIN}")


def count_layers(state: Tensors, prefix: str) -> int:
    """The number of layers of a network: how many numbers follow `prefix` in the names of its tensors."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return len(numbers)


def linear_layer(state: Tensors, name: str) -> nn.Linear:
    """A layer of a published head, in fp32: heads are small, and their last digits are the score's."""
    weight = state[f"{name}.weight"].float()  # (outputs, inputs)
    layer = nn.Linear(*weight.T.shape)
    layer.load_state_dict(dict(weight=weight, bias=state[f"{name}.bias"].float()))
    return layer


def load_network(network: type, config: Any, state: Tensors, file: Path, **options: Any) -> Any:
    """A transformers network with published tensors. Raises ValueError naming the file if they do not fill it."""
    model, report = network.from_pretrained(
        None,  # no folder: the config and the tensors are at hand
        config=config,
        state_dict=state,
        **STRICT | options,
    )
    check_complete(report, file)
    return model


def check_complete(report: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError unless transformers reports that each tensor of a model was in the file, in its shape."""
    unfit = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if unfit:
        raise ValueError(f"{source} lacks tensors, or has them in another shape: {len(unfit)}, e.g. {unfit[0]}")


def freeze(model: nn.Module, recompute: bool = False) -> nn.Module:
    """The model for inference, its weights without gradients. `recompute`: layers keep only inputs until the backward.

    Raises ValueError for weights that are not finite.
    """
    check_finite(model.named_parameters())
    model.eval().requires_grad_(False)
    if not recompute:
        return model
    # Reentrant checkpoints raise in torch.autograd.grad, which samples.py calls for each reward.
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    else:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    for module in model.modules():
        # transformers recomputes layers only in training mode.  Unlike layer.train(), this sets the flag of the layer
        # alone: dropout inside of it stays off.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    return model
