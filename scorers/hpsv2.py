"""HPSv2.1: a ViT-H/14 of open_clip, fine-tuned on human preferences (xswu/HPSv2, HPS_v2.1_compressed.pt).

Its network is transformers' CLIPModel under other names, so the published state dict is renamed in memory and
neither open_clip nor the hpsv2 package is needed.  The tokenizer is CLIP's, which FLUX has in its `tokenizer/`.
"""

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ftfy
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from infra.reading import parse_file
from scorers.clip import clip_cosine
from scorers.common import (
    Device,
    Scorer,
    Tensors,
    bicubic,
    count_layers,
    find_weights,
    load_network,
    normalize,
    read_tensors,
)

CLIP_TOKENIZER = "weights/PickScore_v1"  # all CLIP models have the same tokenizer
HEADS = 16  # of both towers of ViT-H/14: a state dict does not tell, as all heads share one tensor
CLIP_NAMES = {  # parts of open_clip's names, and what transformers calls them; vision and text share most
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",  # sic
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def hpsv2(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None, device: Device = "cpu", recompute: bool = False
) -> Scorer:
    """HPSv2.1 from its published state dict, or the folder that holds it.

    The tokenizer is FLUX.1's CLIP tokenizer; None, for a model that has none, takes PickScore's.
    Score and report are the cosine of image and text.  Raises ValueError if the file is no such state dict.
    """
    file = check_files(path)
    if tokenizer is None:
        remedy = "hpsv2 needs CLIP's tokenizer, which --model has not: put PickScore there"
        tokenizer = parse_file(CLIP_TOKENIZER, partial(AutoTokenizer.from_pretrained, local_files_only=True), remedy)
    state = read_tensors(file)
    try:
        # The published file has the state dict under a key; a bare state dict is fine, too.
        state = from_open_clip(state.get("state_dict", state))
        config = clip_config(state, tokenizer)
    except KeyError as error:
        raise ValueError(f"{file} is no state dict of open_clip's ViT: it lacks {error}") from None
    tokens, embeddings = len(tokenizer), config.text_config.vocab_size
    if tokens != embeddings:
        raise ValueError(f"{file} knows {embeddings} tokens, the CLIP tokenizer of --model {tokens}: FLUX's has all")
    model = load_network(CLIPModel, config, state, file)
    # The score is the bare cosine, without the trained temperature: HPSv2 is quoted so.
    cosine = clip_cosine(model, tokenizer, letterbox, device, recompute)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return cosine(images, [clean(prompt) for prompt in prompts])

    return Scorer(score, model=model)


def check_files(path: str | Path) -> Path:
    """The file of weights. Raises ValueError if there is none."""
    return find_weights(path, "HPS_v2.1_compressed.pt")


def clean(prompt: str) -> str:
    """What open_clip's tokenizer does to text first: broken letters, curly quotes, &amp;, white space, capitals.

    FLUX's tokenizer does the last two by itself, which changes nothing.
    """
    prompt = ftfy.fix_text(prompt)
    prompt = html.unescape(html.unescape(prompt))  # twice, as open_clip does
    return " ".join(prompt.split()).lower()


def letterbox(images: Tensor, size: int) -> Tensor:
    """HPSv2's preprocessing: longest side to `size`, black bars to a square, normalise.  -> (b, 3, size, size)"""
    images = images.float()
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    # HPSv2 resizes tensors, not PIL images, so nothing clips what bicubic overshoots.
    images = bicubic(images, height, width)
    rows, columns = size - height, size - width  # of black
    # F.pad begins at the last axis; of an odd number the larger half is at the right and at the bottom.
    bars = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return normalize(F.pad(images, bars))


def from_open_clip(state: Tensors) -> Tensors:
    """A state dict of open_clip's under transformers' names. Raises KeyError for another model's."""
    renamed = {
        # open_clip computes x @ proj with a bare matrix, transformers has a linear layer, which transposes its weight.
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "logit_scale": state["logit_scale"],
    }
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection", "logit_scale", "attn_mask"):  # the mask is a constant
            continue
        is_vision = name.startswith("visual.")
        clip_name = f"vision_model.{name.removeprefix('visual.')}" if is_vision else f"text_model.{name}"
        # A part may stand anywhere in a name, and a name may hold several: all are replaced.
        for old, new in CLIP_NAMES.items():
            clip_name = clip_name.replace(old, new)
        if ".in_proj_" in clip_name:  # q, k and v in one tensor
            for letter, rows in zip("qkv", tensor.chunk(3)):
                renamed[clip_name.replace("in_proj_", f"{letter}_proj.")] = rows
        else:
            renamed[clip_name] = tensor
    return renamed


def clip_config(state: Tensors, tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    """The config of a renamed state dict, its sizes read from the tensors: no file of them is published."""
    embeddings, _ = state["text_model.embeddings.token_embedding.weight"].shape
    length, _ = state["text_model.embeddings.position_embedding.weight"].shape
    positions, _ = state["vision_model.embeddings.position_embedding.weight"].shape
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    text = dict(
        vocab_size=embeddings,
        max_position_embeddings=length,
        # transformers looks for the end of the text by its id, where open_clip takes the highest id: the same token.
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = dict(
        image_size=math.isqrt(positions - 1) * patch,  # a square of patches, and the class token
        patch_size=patch,
    )
    # Both towers end in a linear layer to the width of the common features.
    return CLIPConfig(
        text_config=text | tower_sizes(state, "text_model."),
        vision_config=vision | tower_sizes(state, "vision_model."),
        projection_dim=len(state["text_projection.weight"]),
    )


def tower_sizes(state: Tensors, prefix: str) -> dict:
    """The sizes of one of the two transformers."""
    inner, width = state[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=count_layers(state, f"{prefix}encoder.layers."),
        num_attention_heads=HEADS,
        hidden_act="gelu",  # the exact one: OpenAI's CLIP, and transformers' default, have an approximation
    )
