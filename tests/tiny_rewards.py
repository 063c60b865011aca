"""Small random rewards under the published names: what a user downloads, a thousandth of its size.

open_clip's ViT, Qwen2-VL with HPSv3's head, BLIP with ImageReward's head; each with a tokenizer of its kind.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from scorers import hpsv3
from shapes.world import all_prompts

WIDTH, HEADS = 32, 16  # HPSv2.1's heads, of both towers


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal, with outputs of order one: larger than any library draws, so that all parts matter."""
    fan_in = shape[-1] if len(shape) == 2 else torch.Size(shape[1:]).numel() or 1
    return torch.randn(shape, generator=generator) / fan_in**0.5


def affine(state: dict[str, Tensor], name: str, generator: torch.Generator, *shape: int) -> None:
    """A weight and a bias."""
    state[f"{name}.weight"] = random(generator, *shape)
    state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)


def norm(state: dict[str, Tensor], name: str, generator: torch.Generator, width: int) -> None:
    """A layer norm's weight near one, and its bias."""
    state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
    state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)


# ------------------------------------------------------------------------------------------------ HPSv2.1


def open_clip_state(words: int, length: int = 12, side: int = 28, patch: int = 7, layers: int = 2) -> dict[str, Tensor]:
    """The state dict of a small open_clip ViT: tower widths 32, projections to 24."""
    g = torch.Generator().manual_seed(1)
    state = {
        "positional_embedding": 0.5 * torch.randn(length, WIDTH, generator=g),
        "text_projection": random(g, WIDTH, 24),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": torch.randn(WIDTH, generator=g),
        "visual.positional_embedding": 0.5 * torch.randn((side // patch) ** 2 + 1, WIDTH, generator=g),
        "visual.proj": random(g, WIDTH, 24),
        "visual.conv1.weight": random(g, WIDTH, 3, patch, patch),
        "token_embedding.weight": torch.randn(words, WIDTH, generator=g),
    }
    for tower in ("", "visual."):
        for i in range(layers):
            block = f"{tower}transformer.resblocks.{i}"
            norm(state, f"{block}.ln_1", g, WIDTH)
            norm(state, f"{block}.ln_2", g, WIDTH)
            state[f"{block}.attn.in_proj_weight"] = random(g, 3 * WIDTH, WIDTH)
            state[f"{block}.attn.in_proj_bias"] = 0.1 * torch.randn(3 * WIDTH, generator=g)
            affine(state, f"{block}.attn.out_proj", g, WIDTH, WIDTH)
            affine(state, f"{block}.mlp.c_fc", g, 4 * WIDTH, WIDTH)
            affine(state, f"{block}.mlp.c_proj", g, WIDTH, 4 * WIDTH)
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        norm(state, name, g, WIDTH)
    return state


def write_hpsv2(file: Path, words: int) -> dict[str, Tensor]:
    """A file as HPS_v2.1_compressed.pt is: a dict that holds the state dict."""
    state = open_clip_state(words)
    torch.save({"epoch": 0, "state_dict": state}, file)
    return state


# -------------------------------------------------------------------------------------------------- HPSv3


def write_hpsv3(folder: Path, published_names: bool = True) -> Path:
    """A folder with HPSv3.safetensors, and config.json and tokenizer in the form of Qwen2-VL-7B-Instruct's."""
    folder.mkdir(parents=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([hpsv3.PROMPT, hpsv3.CHAT, *(p.text for p in all_prompts())], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    )
    words = tokenizer.get_vocab_size()
    config = {  # flat, as published; today's transformers sorts it into two
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": words + 200,  # as published: Qwen2-VL has more embeddings than tokens, HPSv3 kept those of tokens
        "bos_token_id": words - 6,
        "eos_token_id": words - 4,
        "image_token_id": words - 1,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shape = Qwen2VLConfig.from_pretrained(folder)
    shape.text_config.vocab_size = words + 1
    g = torch.Generator().manual_seed(2)
    state = {}
    for name, tensor in Qwen2VLModel(shape).state_dict().items():
        is_matrix = tensor.ndim > 1  # else a norm's weight or a bias
        values = random(g, *tensor.shape) if is_matrix else 1 + 0.2 * torch.randn(tensor.shape, generator=g)
        if not published_names:
            name = f"model.{name}"
        elif name.startswith("language_model."):
            name = f"model.{name.removeprefix('language_model.')}"
        state[name] = values
    state["lm_head.weight"] = torch.zeros(words + 1, 64)
    for i, (inner, outer) in zip((0, 3, 5), [(64, 48), (48, 16), (16, 2)]):
        affine(state, f"rm_head.{i}", g, outer, inner)
    save_file(state, folder / "HPSv3.safetensors")
    return folder


# -------------------------------------------------------------------------------------------- ImageReward


def write_imagereward(folder: Path) -> dict[str, Tensor]:
    """A folder with ImageReward.pt and the vocabulary of a BERT tokenizer."""
    folder.mkdir(parents=True)
    words = sorted({w for p in all_prompts() for w in p.text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    g = torch.Generator().manual_seed(3)
    state = {}
    eye, width, patch, side = "blip.visual_encoder", 128, 16, 32
    state[f"{eye}.cls_token"] = torch.randn(1, 1, width, generator=g)
    state[f"{eye}.pos_embed"] = 0.5 * torch.randn(1, (side // patch) ** 2 + 1, width, generator=g)
    affine(state, f"{eye}.patch_embed.proj", g, width, 3, patch, patch)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norm(state, f"{block}.norm1", g, width)
        affine(state, f"{block}.attn.qkv", g, 3 * width, width)
        affine(state, f"{block}.attn.proj", g, width, width)
        norm(state, f"{block}.norm2", g, width)
        affine(state, f"{block}.mlp.fc1", g, 2 * width, width)
        affine(state, f"{block}.mlp.fc2", g, width, 2 * width)
    norm(state, f"{eye}.norm", g, width)
    bert, deep = "blip.text_encoder", 64
    state[f"{bert}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{bert}.embeddings.word_embeddings.weight"] = torch.randn(len(vocabulary) + 2, deep, generator=g)
    state[f"{bert}.embeddings.position_embeddings.weight"] = 0.5 * torch.randn(40, deep, generator=g)
    norm(state, f"{bert}.embeddings.LayerNorm", g, deep)
    for i in range(2):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, source in (("attention", deep), ("crossattention", width)):
            affine(state, f"{layer}.{attention}.self.query", g, deep, deep)
            affine(state, f"{layer}.{attention}.self.key", g, deep, source)
            affine(state, f"{layer}.{attention}.self.value", g, deep, source)
            affine(state, f"{layer}.{attention}.output.dense", g, deep, deep)
            norm(state, f"{layer}.{attention}.output.LayerNorm", g, deep)
        affine(state, f"{layer}.intermediate.dense", g, 2 * deep, deep)
        affine(state, f"{layer}.output.dense", g, deep, 2 * deep)
        norm(state, f"{layer}.output.LayerNorm", g, deep)
    for i, (inner, outer) in zip((0, 2, 4, 6, 7), [(deep, 32), (32, 24), (24, 16), (16, 8), (8, 1)]):
        affine(state, f"mlp.layers.{i}", g, outer, inner)
    torch.save(state, folder / "ImageReward.pt")
    return state
