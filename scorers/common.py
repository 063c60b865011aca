"""What every scorer is made of: preprocessing with a gradient, and published weights, read strictly.

A scorer is a frozen function of images and prompts.  Preprocessing is done on tensors in fp32, because a PIL image has
no gradient; it equals PIL's.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Score = Callable[[Tensor, Sequence[str]], Tensor]  # images (b, 3, h, w) in [0, 1], prompts -> (b,)
Device = str | torch.device


class Scorer(NamedTuple):
    """`score` is what a loss sees, differentiable in the images if the scorer has a gradient."""

    score: Score
    scale: float = 1.0  # times the score is what people report
    model: nn.Module | None = None  # the frozen network, if that is what it is
    task_of: Callable[[str], str] | None = None  # a prompt's task, where scores are also told by task


# --------------------------------------------------------------------------------------- preprocessing


def preprocess(images: Tensor, size: int, rounded: bool = False) -> Tensor:
    """CLIP's preprocessing, differentiable: shortest side to `size` (bicubic, as PIL), centre crop, normalise.

    A crop that would begin between two pixels begins at the first, as transformers' does; rounded, as torchvision's.
    """
    images = images.float()
    rows, columns = images.shape[-2:]
    short = min(rows, columns)
    images = resize(images, rows * size // short, columns * size // short)
    top, left = (round((side - size) / 2) if rounded else (side - size) // 2 for side in images.shape[-2:])
    return normalize(images[..., top : top + size, left : left + size])


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic as PIL's: columns, then rows, each followed by a clip to [0, 1], as bicubic overshoots at edges."""
    if images.shape[-2:] != (height, width):
        for shape in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def normalize(images: Tensor) -> Tensor:
    """[0, 1] to CLIP's mean 0 and standard deviation 1, a channel."""
    mean, std = (images.new_tensor(s)[:, None, None] for s in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


# -------------------------------------------------------------------------------------- published weights


STRICT = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)  # `complete` names them


def file_in(path: str | Path, name: str) -> Path:
    """The file of weights that a path means: `name` in a folder, or the file itself, whatever it is called."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def check_tensors(file: Path) -> None:
    """Raise ValueError if a published file is missing, empty, truncated or something else, as far as its ends tell."""
    if not file.is_file():
        raise ValueError(f"no reward file at {str(file)!r}: download it, or give its path as NAME=PATH")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # reads its head, which knows the length of the whole
                return
        with file.open("rb") as opened:
            start = opened.read(4)
        if start.startswith(b"PK"):  # torch's archives, whose list of contents is at the end; older ones have none
            zipfile.ZipFile(file).close()
        elif not start.startswith(b"\x80"):
            raise ValueError("empty" if not start else f"it starts with {start!r}")
    except Exception as error:
        raise ValueError(damaged(file, error)) from error


def damaged(file: str | Path, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot read {file}: truncated, or no file of tensors ({reason}); download it again"


def read_tensors(file: str | Path) -> dict[str, Any]:
    """A published file of tensors, .safetensors or .pt (weights only, nothing in it is run), on the CPU.

    Raises ValueError naming the file if it is missing, truncated or something else.
    """
    if not Path(file).is_file():
        raise ValueError(f"no reward file at {str(file)!r}: download it, or give its path as NAME=PATH")
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(damaged(file, error)) from error


def build(kind: type, config: Any, state: dict[str, Tensor], source: str | Path, **options: Any) -> Any:
    """A transformers model, in fp32 by default, from its config and a state dict. ValueError if they do not fit."""
    try:
        return complete(*kind.from_pretrained(None, config=config, state_dict=state, **STRICT | options))
    except ValueError as error:
        raise ValueError(f"{source} is no whole {kind.__name__}: {error}") from error


def complete(model: nn.Module, report: dict[str, Any]) -> nn.Module:
    """The model, if transformers reports that every tensor of it was found in the right shape, else a ValueError."""
    if unfit := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"missing tensors, or of another shape than config.json says: {len(unfit)}, e.g. {unfit[0]}")
    return model


def freeze(model: nn.Module, recompute: bool = False) -> nn.Module:
    """For inference, without gradients of its own. `recompute`: layers keep their inputs only until the backward.

    transformers recomputes in training mode only, so the layers are put into it, but not what is inside them:
    dropout stays off.
    """
    model = model.eval().requires_grad_(False)
    if recompute:
        current = hasattr(model, "activation_checkpointing_enable")  # its name in transformers 5
        enable = model.activation_checkpointing_enable if current else model.gradient_checkpointing_enable
        enable(dict(use_reentrant=False))
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
    return model
