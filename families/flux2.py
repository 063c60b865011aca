"""FLUX.2 [klein] base beside its transformer, which is ../flux2.py; families/__init__.py explains the names."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from families import flux1
from families.common import Text, lend_layers, load_frozen, load_tokenizer, padded_ids, shifted_levels, unpack
from flux2 import KLEIN_4B, Flux2, Flux2Config
from infra.reading import parse_json

NAME = "FLUX.2"
PIPELINE = "Flux2KleinPipeline"
FROZEN = ("scheduler", "vae", "text_encoder", "tokenizer")
Network = Flux2
Config = Flux2Config
DEFAULT = KLEIN_4B
VAE = AutoencoderKLFlux2
GUIDANCE = {False: 4.0}  # by a second evaluation
HAS_CLIP = False
QWEN_LAYERS = (9, 18, 27)  # whose outputs are the features of a prompt

# ---------------------------------------------------------------------------------- diffusers' names

TRANSFORMER = "Flux2Transformer2DModel"
SIGN = "double_stream_modulation_img.lin.weight"
OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    # FLUX.2 [klein] has no guidance.
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
DOUBLE = {name: names for name, names in flux1.DOUBLE.items() if "attn" in name} | {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {
    "linear1": ("attn.to_qkv_mlp_proj",),  # diffusers has it fused, unlike FLUX.1's
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
CONFIG_NAMES = flux1.CONFIG_NAMES | {"mlp_ratio": "mlp_ratio", "theta": "rope_theta"}
del CONFIG_NAMES["vec_in_dim"]
CONFIG_DEFAULTS = {"out_channels": None, "eps": 1e-6, "timestep_guidance_channels": 256}

# --------------------------------------------------------------------------------------------- text


def describe_encoders(folder: Path) -> tuple[list[PreTrainedTokenizerBase], dict[str, int]]:
    """Qwen3's tokenizer, and the width of its features, by the field of Flux2Config."""
    qwen = parse_json(folder / "text_encoder" / "config.json", qwen_config)
    tokenizers = [load_tokenizer(folder / "tokenizer", qwen.vocab_size, NAME)]
    return tokenizers, {"context_in_dim": len(QWEN_LAYERS) * qwen.hidden_size}


def qwen_config(entries: dict[str, Any]) -> Qwen3Config:
    """A config.json of Qwen3, with the layers that are needed: 27 of 36. Raises ValueError if it has fewer."""
    config = Qwen3Config.from_dict(entries)
    layers = max(QWEN_LAYERS)
    if config.num_hidden_layers < layers:
        raise ValueError(f"Qwen3 has {config.num_hidden_layers} layers instead of {layers} or more")
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers]
    return config


class FirstLayers(Qwen3Model):
    """Qwen3 without its last layers, which a file may have."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"layers\.", "norm", "lm_head"]


def load_encoders(folder: Path, dtype: torch.dtype, device: str | torch.device, offload: bool) -> list[nn.Module]:
    """The first 27 layers of Qwen3; with `offload` they stay on the CPU except while they compute."""
    config = parse_json(folder / "text_encoder" / "config.json", qwen_config)
    qwen = load_frozen(FirstLayers, folder / "text_encoder", dtype=dtype, config=config)
    qwen.norm = nn.Identity()  # the features are taken before the last norm
    if offload:
        qwen.embed_tokens.to(device)
        qwen.rotary_emb.to(device)
        lend_layers(qwen.layers, device)
    else:
        qwen.to(device)
    return [qwen]


def token_limits(pipe: Any) -> dict[str, int]:
    """How many tokens of a prompt Qwen3 reads, those of the chat around it included."""
    return {"Qwen3 (--text-length)": pipe.text_length}


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that is tokenized for a prompt: a chat in which a user says it, and the answer is about to begin."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def encode(pipe: Any, prompts: Sequence[str]) -> Text:
    """Prompts to what FLUX.2 reads of them: three of Qwen3's hidden states per token, side by side in one tensor."""
    (qwen,), (tokenizer,) = pipe.encoders, pipe.tokenizers
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    ids, mask = padded_ids(tokenizer, texts, pipe.text_length)
    # Qwen3 gets a mask over the padding. FLUX.2 gets none, so its image tokens attend to the padding.
    mask = mask.to(pipe.device)
    output = qwen(ids.to(pipe.device), attention_mask=mask, output_hidden_states=True, use_cache=False)
    features = [output.hidden_states[layer] for layer in QWEN_LAYERS]  # the 0th are the embeddings
    return (torch.cat(features, dim=-1),)  # (b, m, context_in_dim)


# -------------------------------------------------------------------------------------------- image


def sigmas(schedule: dict[str, Any], steps: int, tokens: int) -> Tensor:
    """Noise levels of an image of so many tokens, from 1 to 0, (steps + 1,); `schedule` is scheduler_config.json."""
    if not schedule["use_dynamic_shifting"]:
        return shifted_levels(schedule["shift"], steps)
    # As black-forest-labs' compute_empirical_mu. For 10 and for 200 steps mu is a line in the number of tokens; for
    # other numbers of steps it is interpolated linearly. scheduler_config.json has FLUX.1's line, which is not used.
    mu_10 = 8.73809524e-05 * tokens + 1.89833333
    mu_200 = 0.00016927 * tokens + 0.45666666
    mu = mu_200
    if tokens <= 4300:
        mu += (steps - 200) * (mu_200 - mu_10) / 190
    return shifted_levels(math.exp(mu), steps)


def position_ids(rows: int, columns: int, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Rotary positions: (0, row, column, 0) of an image token, (0, 0, 0, i) of the i-th text token."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(rows), torch.arange(columns), zero)
    return image, torch.cartesian_prod(zero, zero, zero, torch.arange(text_tokens))


def draw_noise(generator: torch.Generator, channels: int, rows: int, columns: int) -> Tensor:
    """x_1 of an image, (n, channels): the noise that Flux2KleinPipeline draws, channels first."""
    z = torch.randn(channels, rows, columns, generator=generator)
    return rearrange(z, "c h w -> (h w) c")


def vae_latents(vae: AutoencoderKLFlux2, x: Tensor, rows: int, columns: int) -> Tensor:
    """The VAE's latents (b, c, h, w) of tokens (b, n, 4 c)."""
    # The VAE has a batch norm. Its statistics, of each channel of a token, take the place of FLUX.1's shift and scale.
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return unpack(x * std + vae.bn.running_mean, rows, columns)
