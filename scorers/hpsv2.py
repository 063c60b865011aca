"""HPSv2.1: a ViT-H/14 of open_clip, fine-tuned on human preferences (xswu/HPSv2, HPS_v2.1_compressed.pt).

Its network is transformers' CLIPModel under other names, so the published state dict is renamed in memory and
neither open_clip nor the hpsv2 package is needed.  The tokenizer is CLIP's, which FLUX has in its `tokenizer/`.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from scorers.clip import cosine
from scorers.common import Device, Scorer, build, file_in, normalize, read_tensors

FILE = "HPS_v2.1_compressed.pt"
HEADS = 16  # of both towers of ViT-H/14, which the shapes in a state dict do not tell
OPEN_CLIP = {
    "vision_model.class_embedding": "vision_model.embeddings.class_embedding",
    "vision_model.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "vision_model.conv1": "vision_model.embeddings.patch_embedding",
    "vision_model.ln_pre": "vision_model.pre_layrnorm",
    "vision_model.ln_post": "vision_model.post_layernorm",
    "text_model.token_embedding": "text_model.embeddings.token_embedding",
    "text_model.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_model.ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def hpsv2(
    file: str | Path, tokenizer: PreTrainedTokenizerBase, device: Device = "cpu", recompute: bool = False
) -> Scorer:
    """HPSv2.1 from its published state dict, or the folder that holds it; the tokenizer is FLUX's CLIP tokenizer.

    Score and report are the cosine of image and text.  Raises ValueError if the file is no such state dict.
    """
    file = file_in(file, FILE)
    state = read_tensors(file)
    state = from_open_clip(state.get("state_dict", state), source=file)
    words, length = (len(state[f"text_model.embeddings.{kind}_embedding.weight"]) for kind in ("token", "position"))
    if len(tokenizer) != words:
        raise ValueError(f"{file} knows {words} tokens, the CLIP tokenizer of --model {len(tokenizer)}: FLUX's has all")
    places = len(state["vision_model.embeddings.position_embedding.weight"])
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config=dict(vocab_size=words, max_position_embeddings=length, **ids, **tower(state, "text_model")),
        vision_config=dict(image_size=math.isqrt(places - 1) * patch, patch_size=patch, **tower(state, "vision_model")),
        projection_dim=len(state["text_projection.weight"]),
    )
    model = build(CLIPModel, config, state, source=file)
    of_clean = cosine(model, tokenizer, letterbox, device, recompute)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return of_clean(images, [clean(prompt) for prompt in prompts])

    return Scorer(score, model=model)


def clean(prompt: str) -> str:
    """What open_clip's tokenizer does to text first: curly quotes and broken letters, &amp;, white space, capitals.

    FLUX's tokenizer does the last two by itself, which changes nothing.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def tower(state: dict[str, Tensor], prefix: str) -> dict[str, int | str]:
    """The sizes of one of the two transformers, read from its tensors."""
    layers = {name.split(".")[3] for name in state if name.startswith(f"{prefix}.encoder.layers.")}
    inner, width = state[f"{prefix}.encoder.layers.0.mlp.fc1.weight"].shape
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=HEADS,
        hidden_act="gelu",
    )


def from_open_clip(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """open_clip's names to transformers': q, k, v are split, projections transposed. ValueError for another model."""
    needed = ["visual.proj", "visual.conv1.weight", "visual.positional_embedding", "positional_embedding"]
    needed += ["text_projection", "logit_scale", "token_embedding.weight"]
    needed += [f"{p}transformer.resblocks.0.mlp.c_fc.weight" for p in ("", "visual.")]
    if missing := [name for name in needed if not isinstance(state.get(name), Tensor)]:
        raise ValueError(f"{source} is no state dict of open_clip's ViT: it lacks {missing[0]}")
    renamed = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "logit_scale": state["logit_scale"],
    }
    for name in state.keys() - {"visual.proj", "text_projection", "logit_scale", "attn_mask"}:
        new = f"vision_model.{name.removeprefix('visual.')}" if name.startswith("visual.") else f"text_model.{name}"
        for theirs, ours in OPEN_CLIP.items():
            new = new.replace(theirs, ours)
        if ".in_proj_" in new:
            for part, third in zip("qkv", state[name].chunk(3)):
                renamed[new.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed[new] = state[name]
    return renamed


def letterbox(images: Tensor, size: int) -> Tensor:
    """HPSv2's preprocessing, differentiable: longest side to `size`, black bars to a square, normalise.

    HPSv2 resizes tensors, so bicubic overshoots are not clipped, unlike PIL's.
    """
    images = images.float()
    scale = size / max(images.shape[-2:])
    rows, columns = (max(1, round(side * scale)) for side in images.shape[-2:])
    if scale != 1:
        images = F.interpolate(images, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
    down, across = size - rows, size - columns
    return normalize(F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2)))
