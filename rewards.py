"""Rewards: frozen functions of images and prompts whose gradient in the images is worth following.

    score = reward.score(images, prompts)     # images (b, 3, h, w) in [0, 1], any size  ->  (b,)

`score` is what a loss sees; `reward.scale * score` is what people report.  Preprocessing is done on tensors in
fp32, because a PIL image has no gradient.  On the command line a reward is NAME, NAME=PATH or FILE.py:FUNCTION:

    tiny         the CLIP of the shapes world, shipped                   pickscore    a folder, or its hub id
    clip         any CLIPModel: a folder or a hub id                     hpsv2        HPS_v2.1_compressed.pt
    hpsv3        a folder, see hpsv3.py                                  imagereward  a folder, see imagereward.py
    judge        the rules of the shapes world; no gradient, to watch or evaluate only

Without a path, weights are looked for in WEIGHTS.  A weight may follow: `pickscore:0.5 hpsv2:0.5`.
"""

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TINY = Path(__file__).parent / "shapes" / "tiny-reward"
WEIGHTS = {  # where a name without a path looks, from the current folder
    "tiny": TINY,
    "pickscore": Path("weights/PickScore_v1"),
    "hpsv2": Path("weights/HPS_v2.1_compressed.pt"),
    "hpsv3": Path("weights/HPSv3"),
    "imagereward": Path("weights/ImageReward"),
}
WEIGHT = r"[-+]?[\d.][-+.\de]*"  # of a reward among several, as it is written
LAMBDA = {"tiny": 0.4, "hpsv2": 0.55, "pickscore": 0.4, "hpsv3": 13.5}  # the paper's, but for ours
# What is logged under names of its own, which a user's function may not have.
LOGGED = frozenset(("reward", "loss", "satisfied", "k", "j", "d_j", "d_0", "w", "step", "seconds", "grad_norm",
                    "prompt", "prompts", "by_prompt", "memory", "tflops", "mfu", "forwards", "backwards", "tag",
                    "single", "two", "count", "color", "position", "attr"))  # fmt: skip
Score = Callable[[Tensor, Sequence[str]], Tensor]
Device = str | torch.device


@dataclass(frozen=True)
class Reward:
    """A reward: `score(images, prompts) -> (b,)` is differentiable in the images, `scale` is for reports only."""

    score: Score
    scale: float = 1.0
    name: str = "reward"
    weight: float = 1.0  # in a sum of several, of the loss's scores
    lam: float | None = None  # lambda of Eq. 11, in units of the score; None: no hinge
    model: nn.Module | None = None  # the frozen network, if that is what it is


# --------------------------------------------------------------------------------- from the command line


def resolve(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of a reward; of a user's file the name is empty. ValueError if there can be no such."""
    what, weight = re.fullmatch(rf"(.*?)(?::({WEIGHT}))?", spec, re.DOTALL).groups()
    try:
        weight = float(weight or 1)
    except ValueError:
        raise ValueError(f"the weight of reward {spec!r} is no number") from None
    if ".py:" in what:
        if not Path(file := what.rpartition(":")[0]).is_file():
            raise ValueError(f"no file {file!r} for the reward {spec!r}")
        return "", what, weight
    name, _, path = what.partition("=")
    if not path and name in WEIGHTS:
        path = str(WEIGHTS[name])
        if not Path(path).exists():
            raise ValueError(f"no weights of the reward {name!r} at {path}: put them there, or say {name}=PATH")
    if name not in (*WEIGHTS, "clip", "judge") or (name == "judge") == bool(path):
        known = ", ".join([*WEIGHTS, "clip=PATH", "judge"])
        raise ValueError(f"no reward {spec!r}: it is one of {known}, NAME=PATH or FILE.py:FUNCTION")
    hub_id = name in ("clip", "pickscore") and re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)
    if path and not hub_id and not Path(path).exists():
        raise ValueError(f"no reward file at {path!r}: download it, or give its path as NAME=PATH")
    return name, path, weight


def open_reward(
    spec: str,
    device: Device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    recompute: bool = False,
    size: int = 64,
) -> Reward:
    """The reward that `spec` names: NAME[=PATH][:WEIGHT] or FILE.py:FUNCTION[:WEIGHT].

    `tokenizer` is FLUX's CLIP tokenizer, which hpsv2 shares; `recompute` trades time for memory in the backward;
    `size` is the side of the images that a user's function is tried on.
    Raises ValueError, before anything is on the device, naming the spec and what is wrong with it.
    """
    name, path, weight = resolve(spec)
    if not name:
        return replace(users(path, device, size), weight=weight)
    if name == "judge":
        reward = rules()
    elif name in ("tiny", "clip", "pickscore"):
        from clip import clip  # each of these is read only by who asks for it

        reward = clip(path, device, recompute)
    elif name == "hpsv2":
        from hpsv2 import hpsv2

        reward = hpsv2(path, tokenizer, device, recompute)
    elif name == "hpsv3":
        from hpsv3 import hpsv3

        reward = hpsv3(path, device, recompute)
    else:
        from imagereward import imagereward

        reward = imagereward(path, device, recompute)
    return replace(reward, name=name, weight=weight, lam=LAMBDA.get(name))


def name_of(spec: str) -> str:
    """The name that a spec begins with, or the function of a user's."""
    what = re.sub(f":{WEIGHT}$", "", spec)
    return what.rpartition(":")[2] if ".py:" in what else what.partition("=")[0]


def check_rewards(specs: Sequence[str]) -> None:
    """Raise ValueError if one cannot be, two share a name, by which they are logged, or one has a log's own."""
    names = [name_of(spec) for spec in specs]
    for spec, name in zip(specs, names, strict=True):
        resolve(spec)
        if name in LOGGED or (".py:" in spec and name == "judge"):
            raise ValueError(f"reward {spec!r}: call the function something else than {name}, which is logged")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"rewards are logged by name, and two are named {twice.pop()!r}")


def open_rewards(specs: Sequence[str], *options: Any) -> list[Reward]:
    """All of them, checked."""
    check_rewards(specs)
    return [open_reward(spec, *options) for spec in specs]


@torch.no_grad()
def score_all(reward: Reward, images: Tensor, prompts: Sequence[str], device: Device, batch: int = 64) -> Tensor:
    """Reported scores of images that lie on the CPU, without a gradient: (n, 3, h, w) to (n,)."""
    parts = zip(images.split(batch), (prompts[i : i + batch] for i in range(0, len(prompts), batch)))
    return reward.scale * torch.cat([reward.score(part.to(device), list(text)).cpu() for part, text in parts])


def reported(rewards: list[Reward], means: dict[str, float]) -> dict[str, float]:
    """What is logged of the trained rewards: their weighted sum, and each by name."""
    return {"reward": sum(r.weight * means[r.name] for r in rewards), **means}


def users(spec: str, device: Device, size: int) -> Reward:
    """A user's own `FILE.py:FUNCTION`, a function (images, prompts) -> (b,). Tried at once on random images."""
    file, _, function = spec.rpartition(":")
    sys.path.insert(0, str(Path(file).parent))  # it may have helpers beside it
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward file {file} does not run: {told(error)}") from error
    score = getattr(module, function, None)
    if not callable(score):
        raise ValueError(f"{file} defines no function {function!r}")
    for n in (2, 1):
        images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        try:
            result = score(images, ["a photo of a circle"] * n)
        except Exception as error:
            raise ValueError(f"reward {spec} fails on images ({n}, 3, {size}, {size}): {told(error)}") from error
        if not isinstance(result, Tensor) or result.shape != (n,):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"reward {spec} must return one score per image, ({n},) for {n}, and returned {got}")
    return Reward(score, name=function)


def told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def rules() -> Reward:
    """The judge of the shapes world: 1 where an image shows what its prompt asks for, else 0. Without a gradient."""
    from shapes.world import judge, parse

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return judge(images, [parse(p) for p in prompts]).float()

    return Reward(score)


# --------------------------------------------------------------------------------------- preprocessing


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing, differentiable: shortest side to `size` (bicubic, as PIL), centre crop, normalise."""
    images = images.float()
    rows, columns = images.shape[-2:]
    short = min(rows, columns)
    images = resize(images, rows * size // short, columns * size // short)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot read {file}: truncated, or no file of tensors ({reason}); download it again"
        ) from error


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
