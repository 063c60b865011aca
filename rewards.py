"""Rewards: frozen functions of images and prompts whose gradient in the images is worth following.

    score = reward.score(images, prompts)     # images (b, 3, h, w) in [0, 1], any size  ->  (b,)

`score` is what a loss sees; `reward.scale * score` is what people report.  Preprocessing is done on tensors in
fp32, because a PIL image has no gradient.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

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
    model, tokenizer = load_clip(name)
    model = model.eval().requires_grad_(False).to(device)
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        text = features(model.get_text_features(input_ids=ids.input_ids.to(images.device)))
        image = features(model.get_image_features(pixel_values=preprocess(images, size)))
        return (image * text).sum(-1)

    return Reward(score, scale=model.logit_scale.exp().item())


def load_clip(name: str | Path) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A CLIPModel in fp32 and its tokenizer.  Never from a pickle; no network unless `name` is a hub id.

    transformers only warns of missing tensors and goes on with random ones, and its version 5 makes up an empty
    tokenizer where there is none: both are errors here.
    """
    local = Path(name).is_dir()
    if not local and (Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name))):
        raise ValueError(f"no reward folder at {str(name)!r} (and that is no hub id of the form owner/name)")
    part = "config.json"
    try:
        kind = CLIPConfig.get_config_dict(name, local_files_only=local)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"model_type is {kind!r} instead of 'clip'")
        part = "weights"
        model, report = CLIPModel.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, which the error would not
        )
        if unfit := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise ValueError(
                f"missing tensors, or of another shape than config.json says: {len(unfit)}, e.g. {unfit[0]}"
            )
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        size, embedded = len(tokenizer), model.config.text_config.vocab_size
        if not len(set(tokenizer.all_special_ids)) < size <= embedded:
            raise ValueError(f"missing or another model's, with {size} tokens where the model knows {embedded}")
    except Exception as error:  # OSError, SafetensorError, TypeError: each library raises its own
        source = "folder" if local else "hub id (there is no such folder)"
        raise ValueError(
            f"cannot read the {part} of the CLIP reward in {source} {str(name)!r}: {error}\n"
            "It takes what save_pretrained writes for a CLIPModel (as safetensors) and for its tokenizer."
        ) from error
    return model, tokenizer


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing, differentiable: shortest side to `size` (bicubic), centre crop, normalise.

    As PIL resizes: columns, then rows, each followed by a clip, as bicubic overshoots at edges.
    """
    images = images.float()
    rows, columns = images.shape[-2:]
    short = min(rows, columns)
    if short != size:
        height, width = rows * size // short, columns * size // short
        for shape in ((rows, width), (height, width)):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(s)[:, None, None] for s in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def features(output: Tensor | ModelOutput) -> Tensor:
    """Unit-length CLIP features. transformers 5 wraps them in an output object, 4.57 returns the tensor."""
    output = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(output, dim=-1)
