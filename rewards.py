"""Rewards: frozen functions of images and prompts whose gradient in the images is worth following.

    score = reward.score(images, prompts)     # images (b, 3, h, w) in [0, 1], any size  ->  (b,)

`score` is what a loss sees; `reward.scale * score` is what people report.  Preprocessing is done on tensors in
fp32, because a PIL image has no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Reward:
    """A reward: `score(images, prompts) -> (b,)` is differentiable in the images, `scale` is for reports only."""

    score: Callable[[Tensor, Sequence[str]], Tensor]
    scale: float = 1.0


def clip(name: str | Path, device: str | torch.device = "cpu") -> Reward:
    """Any transformers CLIPModel, by folder or hub id: PickScore, the tiny reward of the shapes world, plain CLIP.

    The score is the cosine of image and text, in [-1, 1]; the report is `logit_scale.exp()` times that, which is
    how PickScore quotes 22 to 26.  Raises ValueError if the folder does not hold such a model.
    """
    try:
        model = CLIPModel.from_pretrained(name, torch_dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read a CLIP reward from {str(name)!r}: {error}") from error
    model = model.eval().requires_grad_(False).to(device)
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        text = features(model.get_text_features(input_ids=ids.input_ids.to(images.device)))
        image = features(model.get_image_features(pixel_values=preprocess(images, size)))
        return (image * text).sum(-1)

    return Reward(score, scale=model.logit_scale.exp().item())


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing, differentiable: shortest side to `size` (bicubic), centre crop, normalise."""
    images = images.float()
    short = min(images.shape[-2:])
    if short != size:
        height, width = (round(side * size / short) for side in images.shape[-2:])
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(s)[:, None, None] for s in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def features(output) -> Tensor:
    """Unit-length CLIP features. transformers 5 wraps them in an output object, 4.57 returns the tensor."""
    output = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(output, dim=-1)
