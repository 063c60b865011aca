"""CLIP as a reward: PickScore, the tiny reward of the shapes world, any CLIPModel that transformers has written."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from scorers.common import STRICT, Device, Score, Scorer, complete, freeze, preprocess


def clip(name: str | Path, device: Device = "cpu", recompute: bool = False) -> Scorer:
    """Any transformers CLIPModel, by folder or hub id: PickScore, the tiny reward of the shapes world, plain CLIP.

    The score is the cosine of image and text, in [-1, 1]; the report is `logit_scale.exp()` times that, which is
    how PickScore quotes 22 to 26.  Raises ValueError if the folder does not hold such a model.
    """
    model, tokenizer = load_clip(name)
    score = cosine(model, tokenizer, preprocess, device, recompute)
    return Scorer(score, scale=model.logit_scale.exp().item(), model=model)


def cosine(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Callable[[Tensor, int], Tensor],
    device: Device,
    recompute: bool,
) -> Score:
    """The score of a CLIPModel, frozen on the device: the cosine of its image and text features."""
    model = freeze(model, recompute).to(device)
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        text = features(model.get_text_features(input_ids=ids.input_ids.to(images.device)))
        image = features(model.get_image_features(pixel_values=preprocess(images, size)))
        return (image * text).sum(-1)

    return score


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
        loaded = CLIPModel.from_pretrained(name, use_safetensors=True, local_files_only=local, **STRICT)
        model = complete(*loaded)
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


def features(output: Tensor | ModelOutput) -> Tensor:
    """Unit-length CLIP features. transformers 5 wraps them in an output object, 4.57 returns the tensor."""
    output = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(output, dim=-1)
