"""FLUX.1-dev and -schnell beside their transformer, which is ../model.py; families/__init__.py explains the names."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from families.common import PATCH, lend_layers, load_frozen, load_tokenizer, pack, padded_ids, shifted_levels, unpack
from infra.reading import parse_json
from model import FLUX_DEV, Flux, FluxConfig

NAME = "FLUX.1"
PIPELINE = "FluxPipeline"
FROZEN = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # CLIP is 1, T5 is 2
Network = Flux
Config = FluxConfig
DEFAULT = FLUX_DEV
VAE = AutoencoderKL
GUIDANCE = {True: 3.5, False: None}  # FLUX.1-schnell needs none
HAS_CLIP = True

# ---------------------------------------------------------------------------------- diffusers' names

TRANSFORMER = "FluxTransformer2DModel"
SIGN = "vector_in.in_layer.weight"  # which FLUX.2 and Chroma lack
OUTER = {
    "img_in": ("x_embedder",),  # x is the noisy image
    "txt_in": ("context_embedder",),
    # Time, guidance and the pooled prompt are summed into one vector, `vec`, by one module of diffusers.
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    # FLUX.1-schnell has no guidance.
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),  # shift, scale and gate, of attention and of the MLP
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),  # to_out.1 is a dropout
    "img_mlp.0": ("ff.net.0.proj",),  # net.0 is linear and GELU in one
    "img_mlp.2": ("ff.net.2",),  # net.1 is a dropout
    # The text's weights have the names of attention to a context that is added to the image's.
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    # Attention and MLP run side by side: one product makes the inputs of both, and one joins their outputs.
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
CONFIG_NAMES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "vec_in_dim": "pooled_projection_dim",
    "context_in_dim": "joint_attention_dim",
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "axes_dim": "axes_dims_rope",
    "guidance_embed": "guidance_embeds",
}
CONFIG_DEFAULTS = {"out_channels": None, "guidance_embeds": False}


# --------------------------------------------------------------------------------------------- text


class Text(NamedTuple):
    """A batch of encoded prompts."""

    txt: Tensor  # T5, (b, m, context_in_dim)
    vec: Tensor  # CLIP, pooled, (b, vec_in_dim)


def describe_encoders(folder: Path) -> tuple[list[PreTrainedTokenizerBase], dict[str, int]]:
    """The tokenizers of CLIP and T5, and the widths of what they give, by the fields of FluxConfig."""
    clip = parse_json(folder / "text_encoder" / "config.json", CLIPTextConfig.from_dict)
    t5 = parse_json(folder / "text_encoder_2" / "config.json", T5Config.from_dict)
    tokenizers = [
        load_tokenizer(folder / "tokenizer", clip.vocab_size, NAME),
        load_tokenizer(folder / "tokenizer_2", t5.vocab_size, NAME),
    ]
    return tokenizers, {"vec_in_dim": clip.hidden_size, "context_in_dim": t5.d_model}


def load_encoders(folder: Path, dtype: torch.dtype, device: str | torch.device, offload: bool) -> list[nn.Module]:
    """CLIP and T5; with `offload`, T5's layers (9.3 GB) stay on the CPU except while they compute."""
    clip = load_frozen(CLIPTextModel, folder / "text_encoder", dtype=dtype).to(device)
    t5 = load_frozen(T5EncoderModel, folder / "text_encoder_2", dtype=dtype)
    if offload:
        # The embedding and the last norm are outside of the layers.
        t5.encoder.embed_tokens.to(device)
        t5.encoder.final_layer_norm.to(device)
        lend_layers(t5.encoder.block, device)
    else:
        t5.to(device)
    return [clip, t5]


def token_limits(pipe: Any) -> dict[str, int]:
    """How many tokens of a prompt each encoder reads: 77 and, by default, 512 for FLUX.1-dev."""
    # The tokenizer's own limit may be 1e30, which stands for none.
    clip_length = min(pipe.tokenizers[0].model_max_length, pipe.encoders[0].config.max_position_embeddings)
    return {"CLIP": clip_length, "T5 (--text-length)": pipe.text_length}


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that is tokenized for a prompt: the prompt."""
    return prompt


def encode(pipe: Any, prompts: Sequence[str]) -> Text:
    """Prompts to the two things that FLUX.1 reads of them: T5's of every token, CLIP's of the whole prompt."""
    clip, t5 = pipe.encoders
    clip_length, t5_length = token_limits(pipe).values()
    clip_ids, _ = padded_ids(pipe.tokenizers[0], prompts, clip_length)
    t5_ids, _ = padded_ids(pipe.tokenizers[1], prompts, t5_length)
    # Neither T5 nor FLUX gets a mask over the padding: FLUX was trained without one, so its image tokens attend to the
    # padding, too, and a mask would change every picture. For the same reason --text-length changes pictures.
    txt = t5(t5_ids.to(pipe.device))[0]  # (b, m, context_in_dim)
    vec = clip(clip_ids.to(pipe.device)).pooler_output  # (b, vec_in_dim)
    return Text(txt, vec)


# -------------------------------------------------------------------------------------------- image


def sigmas(schedule: dict[str, Any], steps: int, tokens: int) -> Tensor:
    """Noise levels of an image of so many tokens, from 1 to 0, (steps + 1,).

    `schedule` is scheduler_config.json: with "use_dynamic_shifting", FLUX.1-dev's, the shift depends on the image's
    size; without it, FLUX.1-schnell's, the shift is fixed.
    """
    if not schedule["use_dynamic_shifting"]:
        return shifted_levels(schedule["shift"], steps)
    # Neighbouring pixels show nearly the same, so at one level of noise a large image is more legible than a small one
    # (Stable Diffusion 3, section 5.3.2). The shift gives a larger image more of its steps at high levels.
    # mu is a straight line through (256 tokens, 0.5) and (4096 tokens, 1.15).
    low = schedule["base_image_seq_len"]
    high = schedule["max_image_seq_len"]
    slope = (schedule["max_shift"] - schedule["base_shift"]) / (high - low)
    mu = schedule["base_shift"] + slope * (tokens - low)
    return shifted_levels(math.exp(mu), steps)


def position_ids(rows: int, columns: int, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Rotary positions: (0, row, column) of an image token, (0, 0, 0) of every text token."""
    image = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))
    return image, torch.zeros(text_tokens, 3, dtype=torch.long)


def draw_noise(generator: torch.Generator, channels: int, rows: int, columns: int) -> Tensor:
    """x_1 of an image, (n, channels): the noise that FluxPipeline draws."""
    # Packed after it was drawn, as in FluxPipeline: noise drawn as tokens would be in another order.
    z = torch.randn(1, channels // PATCH**2, rows * PATCH, columns * PATCH, generator=generator)
    return pack(z)[0]


def vae_latents(vae: AutoencoderKL, x: Tensor, rows: int, columns: int) -> Tensor:
    """The VAE's latents (b, c, h, w) of tokens (b, n, c)."""
    # FLUX's latents are the VAE's, shifted and scaled to about mean 0 and variance 1.
    return unpack(x, rows, columns) / vae.config.scaling_factor + vae.config.shift_factor
