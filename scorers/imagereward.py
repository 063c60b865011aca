"""ImageReward: BLIP's ViT, and a BERT that reads the prompt while looking at the image (THUDM/ImageReward).

A folder holds it: `ImageReward.pt`, and `vocab.txt` or `tokenizer.json` of bert-base-uncased.  The network is
transformers' BLIP under other names, so neither the ImageReward package nor its pinned timm is needed.

Legend: b images, n tokens, d the width of the ViT, e that of the BERT.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from scorers.common import (
    Device,
    Scorer,
    Tensors,
    count_layers,
    find_weights,
    freeze,
    linear_layer,
    load_network,
    preprocess,
    read_tensors,
    require_file,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, published
TOKENS = 35  # of a prompt; what follows is not read
HEAD_WIDTH = 64  # of an attention head, in both networks: a state dict does not tell
VISION_NAMES = {  # parts of timm's names, and what transformers calls them; replaced in this order
    "blip.visual_encoder.norm.": "post_layernorm.",
    "blip.visual_encoder.": "",
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
    file = check_files(path)
    state = read_tensors(file)
    try:
        vision = load_vision(state, file)
        text = load_text(state, file)
        # No activation between the layers (768, 1024, 128, 64, 16, 1 published); numbers 1, 3 and 5 are dropout.
        head = nn.Sequential(*[linear_layer(state, f"mlp.layers.{i}") for i in (0, 2, 4, 6, 7)])
    except KeyError as error:
        raise ValueError(f"{file} is not ImageReward: it lacks {error}") from None
    # By class: AutoTokenizer needs a config.json, which a folder with a vocabulary does not have.
    tokenizer = BertTokenizerFast.from_pretrained(file.parent, local_files_only=True)
    tokens, embeddings = len(tokenizer), text.config.vocab_size
    if not embeddings - 2 <= tokens <= embeddings:  # ImageReward added two tokens, which prompts do not use
        raise ValueError(
            f"the tokenizer in {file.parent} has {tokens} tokens, {file.name} knows {embeddings}: it must be that of "
            "bert-base-uncased"
        )
    vision = freeze(vision, recompute).to(device)
    # Text and head see 35 tokens a sample, the ViT 197: to recompute them, too, would save little memory.
    text, head = freeze(text).to(device), freeze(head).to(device)
    side = vision.config.image_size

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = preprocess(images, side, rounded=True)  # ImageReward crops with torchvision
        patches = vision(pixel_values=pixels).last_hidden_state  # (b, patches + 1, d)
        prompt_tokens = tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(images.device)
        hidden = text(
            input_ids=prompt_tokens.input_ids,
            # BERT looks both ways, so padding has to be hidden from it.
            attention_mask=prompt_tokens.attention_mask,
            encoder_hidden_states=patches,
        ).last_hidden_state  # (b, n, e)
        first = hidden[:, 0]  # the token that stands for the whole text, [CLS]
        return (head(first)[:, 0] - MEAN) / STD

    return Scorer(score, model=vision, reads=(tokenizer, TOKENS))


def check_files(path: str | Path) -> Path:
    """The file of weights. Raises ValueError if it is missing, or the vocabulary in its folder."""
    file = find_weights(path, "ImageReward.pt")
    require_file(file.parent, "vocab.txt", "tokenizer.json")
    return file


def load_vision(state: Tensors, file: Path) -> BlipVisionModel:
    """The ViT (L/16, 224 pixels published), its sizes read from the tensors. KeyError if one is missing."""
    prefix = "blip.visual_encoder."
    width, _, _, patch = state[f"{prefix}patch_embed.proj.weight"].shape
    positions = state[f"{prefix}pos_embed"].shape[1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{prefix}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=count_layers(state, f"{prefix}blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,  # a square of patches, and the class token
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's; BLIP's default is 1e-5
    )
    vision_state = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            for old, new in VISION_NAMES.items():
                name = name.replace(old, new)
            vision_state[name] = tensor
    return load_network(BlipVisionModel, config, vision_state, file)


def load_text(state: Tensors, file: Path) -> BlipTextModel:
    """The BERT with cross-attention (base published). KeyError if a tensor is missing."""
    prefix = "blip.text_encoder."
    text_state = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            text_state[name.removeprefix(prefix)] = tensor
    embeddings, width = text_state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=embeddings,
        hidden_size=width,
        encoder_hidden_size=text_state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(text_state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=count_layers(text_state, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(text_state["embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers builds cross-attention only for a decoder; its attention stays both ways
    )
    # The pooler is a layer that BERT has for its own training; ImageReward reads the first token without it.
    return load_network(BlipTextModel, config, text_state, file, add_pooling_layer=False)
