"""A FLUX.2 [klein] base of random weights, 2 MB: rehearse a run with it before the real one is downloaded.

    python -m tools.tiny_klein runs/tiny-klein

Its classes and files are those of FLUX.2-klein-base-4B, only small.
"""

from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

WIDTH = 32  # of Qwen3, and of the transformer
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Qwen3's own has tools, system messages and earlier answers beside.
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"""


def main(folder: tyro.conf.Positional[Path], seed: int = 0) -> None:
    """Write the model folder FOLDER."""
    if folder.exists():
        raise SystemExit(f"error: {folder} exists: give a folder that does not")
    torch.manual_seed(seed)  # which all of diffusers and transformers draw initial weights from
    # A token for each byte, and those of a chat. Without merges a word is as many tokens as it has letters.
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, extra_special_tokens=SPECIAL[1:], chat_template=CHAT_TEMPLATE, model_max_length=131_072
    )
    # 36 layers as published, of which FLUX.2 reads 27.
    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=36,
            num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    # 32 latent channels for 8x8 pixels as published; sample_size is the size that sample.py draws by default.
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=32, sample_size=64
    )
    # The statistics of the latents' batch norm are no parameters, and are 0 and 1 in a new network.
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    # Random layers halve what they get again and again: without this all pictures were grey.
    vae.decoder.conv_out.weight.data *= 10
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=WIDTH // 16,
        joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2KleinPipeline(scheduler, vae, qwen, tokenizer, transformer).save_pretrained(folder)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
