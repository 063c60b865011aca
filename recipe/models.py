"""The tiny models of the shapes world with random weights: the classes of FLUX.1-dev at 1/5000 of its size."""

import io
import json
import string
from math import log
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
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
from shapes.world import PROMPTS, SIZE

CAPTIONS = [prompt.text for prompt in PROMPTS]
TEXT_LENGTH = 12  # the longest caption has 11 tokens
VISION_WIDTH = 160  # of the reward's image tower
SCORE_SCALE = 10.0  # logit_scale.exp() of the reward: reported scores are 10 cosines
PATCH = 8  # pixels of an image patch of the reward, each way
TINY = FluxConfig(
    in_channels=32,  # 8 latent channels in patches of 2x2
    out_channels=32,
    vec_in_dim=64,  # the width of CLIP's text encoder
    context_in_dim=96,  # the width of T5
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(8, 12, 12),  # sums to the 32 channels of a head
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,  # no distilled guidance to imitate
)


def make_vae() -> AutoencoderKL:
    """FLUX's kind of autoencoder, f8: 3 channels of 64x64 to 8 of 8x8. Its decoder costs less than a rollout."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),  # FLUX: 128, 256, 512, 512
        latent_channels=8,  # FLUX: 16
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,  # as in FLUX's autoencoder
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,  # it runs in fp32 anyway
    )


def make_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Write `tokenizer/` (CLIP's kind of BPE) and `tokenizer_2/` (T5's sentencepiece) for the world's captions.

    Every word is one token; any other text falls back to its characters.
    """
    return make_clip_tokenizer(folder / "tokenizer"), make_t5_tokenizer(folder / "tokenizer_2")


def make_t5_tokenizer(folder: Path) -> T5Tokenizer:
    words = sorted(set(" ".join(CAPTIONS).split()))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Printable ASCII as well, so that any other text falls back to its characters.
        sentence_iterator=iter([*CAPTIONS, *string.printable[:95] * 2]),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        user_defined_symbols=["\u2581" + word for word in words],  # sentencepiece's mark of the start of a word
        pad_id=0,  # T5's ids: padding 0, end 1, no start
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config.pop("extra_special_tokens", None)  # transformers 5 writes a list, which 4.57 cannot read
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def make_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()  # merges end at spaces, so that words are tokens
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than the captions need: all their words get merged
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    # CLIP's order of ids: bytes, bytes at the end of a word, merges, start, end.
    tokens = [
        *alphabet,
        *[byte + "</w>" for byte in alphabet],
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2", *map(" ".join, merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoders(
    clip_tokenizer: CLIPTokenizer,
    t5_tokenizer: T5Tokenizer,
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained text encoders of the widths that TINY expects."""
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TINY.context_in_dim,
            d_kv=24,  # 4 heads of 24 are the width
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,  # there are only 236 captions, and all must be learned
        )
    )
    clip_config = CLIPTextConfig(
        hidden_size=TINY.vec_in_dim,
        intermediate_size=2 * TINY.vec_in_dim,
        num_attention_heads=2,
        **clip_text_sizes(clip_tokenizer),
    )
    return CLIPTextModel(clip_config), t5


def clip_text_sizes(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """What the text encoders of Flux and of the reward have in common."""
    return dict(
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH,
        # CLIP pools at the end token, so its id must be that of the tokenizer.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_reward(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel: 64 patches of 8x8 pixels, captions of up to TEXT_LENGTH tokens."""
    text = dict(
        hidden_size=96,
        intermediate_size=192,
        num_attention_heads=4,
        hidden_act="gelu",
        **clip_text_sizes(tokenizer),
    )
    vision = dict(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=5,
        hidden_act="gelu",  # a third faster on CPUs than CLIP's quick_gelu, which it is nearly equal to
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=64,
        logit_scale_init_value=log(SCORE_SCALE),
    )
    model = CLIPModel(config)
    # CLIP's initial position embeddings (0.02) are so small that a tower of this size may not learn where things are.
    # Larger ones, a vector for the row plus one for the column, tell it from the start.
    embedding = model.vision_model.embeddings.position_embedding.weight  # (1 + 64, 160), the class token first
    rows, columns = 0.3 * torch.randn(2, SIZE // PATCH, VISION_WIDTH)
    embedding.data[1:] = (rows[:, None] + columns).flatten(0, 1)
    return model
