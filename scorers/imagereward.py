"""ImageReward: BLIP's ViT, and a BERT that reads the prompt while looking at the image (THUDM/ImageReward).

A folder holds it: `ImageReward.pt`, and `vocab.txt` or `tokenizer.json` of bert-base-uncased.  The network is
transformers' BLIP under other names, so neither the ImageReward package nor its pinned timm is needed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from scorers.common import Device, Scorer, build, file_in, freeze, preprocess, read_tensors

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, published
TOKENS = 35  # of a prompt
HEAD_WIDTH = 64  # of an attention head, in both networks
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


def imagereward(path: str | Path, device: Device = "cpu", recompute: bool = False) -> Scorer:
    """ImageReward from its folder, or the file of weights in it.

    Score and report are its standardised output, about 1 for FLUX.
    Raises ValueError naming the file that is missing, truncated or of another model.
    """
    file = file_in(path, FILE)
    folder = file.parent
    state = read_tensors(file)
    try:
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot read {folder}: beside {file.name} it needs vocab.txt of bert-base-uncased "
            f"({type(error).__name__}: {error})"
        ) from error
    vision, text, head = build_vision(state, file), build_text(state, file), build_head(state, file)
    known = text.config.vocab_size
    if not known - 2 <= len(tokenizer) <= known:  # ImageReward's own has two more, which prompts do not use
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, {file.name} knows {known}: it must be that of "
            "bert-base-uncased"
        )
    vision, text, head = freeze(vision, recompute).to(device), freeze(text).to(device), freeze(head).to(device)
    size = vision.config.image_size

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pad = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        tokens = tokenizer(list(prompts), **pad).to(images.device)
        features = vision(pixel_values=preprocess(images, size, rounded=True)).last_hidden_state  # (b, patches + 1, d)
        read = text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
        ).last_hidden_state
        return (head(read[:, 0])[:, 0] - MEAN) / STD

    return Scorer(score, model=vision)


def build_vision(state: dict[str, Tensor], file: Path) -> BlipVisionModel:
    """The ViT (L/16, 224 pixels published), its sizes read from the tensors. ValueError if they do not fit."""
    found = under(
        state, "blip.visual_encoder.", file, "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"
    )
    width, _, _, patch = found["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(found["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=layers(found, "blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(found["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    renamed = {}
    for name, tensor in found.items():
        name = "post_layernorm." + name[len("norm.") :] if name.startswith("norm.") else name
        for theirs, ours in VISION.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return build(BlipVisionModel, config, renamed, source=file)


def build_text(state: dict[str, Tensor], file: Path) -> BlipTextModel:
    """The BERT with cross-attention (base published), under the names it has. ValueError if they do not fit."""
    words, places, cross = (
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.0.crossattention.self.key.weight",
    )
    found = under(state, "blip.text_encoder.", file, words, places, cross, "encoder.layer.0.intermediate.dense.weight")
    config = BlipTextConfig(
        vocab_size=len(found[words]),
        hidden_size=found[words].shape[1],
        encoder_hidden_size=found[cross].shape[1],
        intermediate_size=len(found["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=layers(found, "encoder.layer."),
        num_attention_heads=found[words].shape[1] // HEAD_WIDTH,
        max_position_embeddings=len(found[places]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # only that makes the cross-attention; attention stays both ways
    )
    return build(BlipTextModel, config, found, source=file, add_pooling_layer=False)


def build_head(state: dict[str, Tensor], file: Path) -> nn.Sequential:
    """The head: linear layers without anything between them (768, 1024, 128, 64, 16, 1 published)."""
    inside = under(state, "mlp.layers.", file)
    try:
        linear = [nn.Linear(*reversed(inside[f"{i}.weight"].shape)) for i in (0, 2, 4, 6, 7)]
        for layer, i in zip(linear, (0, 2, 4, 6, 7)):
            layer.load_state_dict({k: inside[f"{i}.{k}"].float() for k in ("weight", "bias")})
        return nn.Sequential(*linear)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{file} is not ImageReward: its head mlp.layers does not fit ({error})") from error


def under(state: dict[str, Tensor], prefix: str, file: Path, *needed: str) -> dict[str, Tensor]:
    """The tensors whose names start with prefix, without it. ValueError if one that is needed lacks."""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if lacking := [name for name in needed if name not in found]:
        raise ValueError(f"{file} is not ImageReward: it lacks {prefix}{lacking[0]}")
    return found


def layers(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow prefix in the names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
