"""The tiny models of the shapes world, fresh: real classes, the layout of FLUX.1-dev, 1/5000 of its size."""

import io
import json
import string
from math import log
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from model import FluxConfig
from shapes.world import all_prompts

TEXT_LENGTH = 12  # the longest caption has 11 tokens
VISION_WIDTH = 160  # of the reward's image tower
SCORE_SCALE = 10.0  # logit_scale.exp() of the reward: reported scores are 10 cosines
TINY = FluxConfig(
    in_channels=32,
    out_channels=32,
    vec_in_dim=64,
    context_in_dim=96,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(8, 12, 12),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,
)


def make_vae() -> AutoencoderKL:
    """FLUX's kind of autoencoder, f8: 64x64x3 to 8x8x8, with a decoder that costs less than a rollout."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def make_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` (CLIP's kind of BPE) and `tokenizer_2/` (T5's sentencepiece) for the world's captions.

    Words are single pieces; any other text falls back to its characters.
    """
    captions = [p.text for p in all_prompts()]
    words = sorted({word for caption in captions for word in caption.split()})

    spiece = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *string.printable[:95] * 2]),
        model_writer=spiece,
        vocab_size=200,
        hard_vocab_limit=False,
        user_defined_symbols=["\u2581" + word for word in words],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(spiece.getvalue())
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2", extra_ids=0, model_max_length=TEXT_LENGTH)
    t5.save_pretrained(folder / "tokenizer_2")
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    entries = json.loads(config.read_text())
    entries.pop("extra_special_tokens", None)  # transformers 5 writes a list, which 4.57 cannot read
    config.write_text(json.dumps(entries, indent=2) + "\n")

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n")
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TEXT_LENGTH)
    clip.save_pretrained(folder / "tokenizer")


def make_text_encoders(folder: Path) -> nn.ModuleDict:
    """Fresh T5 and CLIP text encoders, of the widths that TINY takes; tokenizers are read from `folder`."""
    t5_tokens = len(AutoTokenizer.from_pretrained(folder / "tokenizer_2"))
    clip_tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_tokens,
            d_model=TINY.context_in_dim,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=TINY.vec_in_dim,
            intermediate_size=2 * TINY.vec_in_dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return nn.ModuleDict(dict(t5=t5, clip=clip))


def token_table(folder: Path) -> Tensor:
    """A tokenizer's ids of every caption, in the order of all_prompts(): (236, TEXT_LENGTH)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    captions = [p.text for p in all_prompts()]
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def make_reward(tokenizer_folder: Path) -> CLIPModel:
    """A fresh CLIPModel: 64 patches of 8x8 pixels, captions of up to TEXT_LENGTH tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=5,
        hidden_act="gelu",  # a third faster on CPUs than CLIP's quick_gelu, which it is nearly equal to
        image_size=64,
        patch_size=8,
    )
    scale = dict(projection_dim=64, logit_scale_init_value=log(SCORE_SCALE))
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **scale))
    # CLIP draws position embeddings so small that a tower of this size never learns where things are.
    embedding = model.vision_model.embeddings.position_embedding.weight  # (1 + 64, 160), the class token first
    side = 64 // model.config.vision_config.patch_size
    rows, columns = 0.3 * torch.randn(2, side, embedding.shape[1])
    embedding.data[1:] = (rows[:, None] + columns).flatten(0, 1)
    return model
