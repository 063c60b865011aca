"""CLIP as a reward: PickScore, the tiny reward of the shapes world, any CLIPModel that transformers has written.

Legend: b images, n tokens, d the width of the features.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from infra.reading import parse_file
from scorers.common import STRICT, Device, Score, Scorer, check_complete, freeze, preprocess, require_file


def clip(name: str | Path, device: Device = "cpu", recompute: bool = False) -> Scorer:
    """Any CLIPModel of transformers, by folder or hub id.

    The score is the cosine of image and text, in [-1, 1]; the report is `logit_scale.exp()` times that, which is
    how PickScore quotes 22 to 26.  Raises ValueError if the folder does not hold such a model.
    """
    model, tokenizer = load_clip(name)
    score = clip_cosine(model, tokenizer, preprocess, device, recompute)
    # CLIP's softmax multiplies cosines by exp(logit_scale), 100 in most trained models.
    reads = tokenizer, model.config.text_config.max_position_embeddings
    return Scorer(score, scale=model.logit_scale.exp().item(), model=model, reads=reads)


def clip_cosine(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    to_pixels: Callable[[Tensor, int], Tensor],
    device: Device,
    recompute: bool,
) -> Score:
    """The score of a CLIPModel, frozen on the device: the cosine of image and text.

    `to_pixels` takes images (b, 3, h, w) and the side that the model sees to normalised pixels (b, 3, side, side).
    """
    model = freeze(model, recompute).to(device)
    side = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        # No attention mask: tokens look back only, and the end of the text, which is read, stands before the padding.
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(images.device)  # (b, n)
        text = features(model.get_text_features(input_ids=ids))  # (b, d)
        image = features(model.get_image_features(pixel_values=to_pixels(images, side)))  # (b, d)
        return (image * text).sum(-1)

    return score


def features(output: Tensor | ModelOutput) -> Tensor:
    """Unit-length CLIP features. transformers 5 wraps them in an output object, 4.57 returns the tensor."""
    if not isinstance(output, Tensor):
        output = output.pooler_output
    return F.normalize(output, dim=-1)


def check_files(name: str | Path) -> None:
    """Raise ValueError if a folder lacks a file, or there is none and the name cannot be a hub id, either."""
    folder = Path(name)
    if folder.is_dir():
        require_file(folder, "config.json")
        require_file(folder, "*.safetensors")  # the weights may be in several
        require_file(folder, "tokenizer.json", "vocab.json")
    # owner/name might also be a path: a file that exists is one.
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"no reward folder at {str(name)!r} (and that is no hub id of the form owner/name)")


def load_clip(name: str | Path) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A CLIPModel in fp32 and its tokenizer. Raises ValueError naming the folder; no network unless `name` is a hub id.

    Weights come from safetensors only: a pickle could run code of a stranger.
    """
    check_files(name)
    local = Path(name).is_dir()

    def load(name: str | Path) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
        model, report = CLIPModel.from_pretrained(name, use_safetensors=True, local_files_only=local, **STRICT)
        check_complete(report, name)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        tokens, embeddings = len(tokenizer), model.config.text_config.vocab_size
        # Where a hub id has no vocabulary, transformers 5 makes up a tokenizer of special tokens alone.
        if not len(set(tokenizer.all_special_ids)) < tokens <= embeddings:
            raise ValueError(f"the tokenizer has {tokens} tokens where the model knows {embeddings}")
        return model, tokenizer

    remedy = "give a folder or hub id of what save_pretrained writes for a CLIPModel and its tokenizer"
    return parse_file(name, load, remedy)
