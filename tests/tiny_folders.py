"""FLUX folders as FluxPipeline saves them: every class is real, every size small, every weight random."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import shapes
from formats.weights import WEIGHTS

FLUX_DEV_SCHEDULE = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}  # the published file
DEV_LIKE = dict(guidance_embeds=True, schedule=FLUX_DEV_SCHEDULE)
SCHNELL_LIKE = dict(guidance_embeds=False, schedule=dict(use_dynamic_shifting=False, shift=3.0))


def copy_tokenizers(folder: Path) -> None:
    """CLIP's kind in `tokenizer/`, T5's in `tokenizer_2/`: those of the shapes world, of some hundred tokens."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(Path(shapes.__file__).parent / "tiny-flux" / name, folder / name)


def write_checkpoint(folder: Path, guidance_embeds: bool, schedule: dict) -> Path:
    """Write such a folder."""
    torch.manual_seed(0)
    copy_tokenizers(folder / "made")
    clip_tokenizer = AutoTokenizer.from_pretrained(folder / "made" / "tokenizer")
    t5_tokenizer = AutoTokenizer.from_pretrained(folder / "made" / "tokenizer_2")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    )
    sizes = dict(d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **sizes))
    schedule = {k: v for k, v in schedule.items() if not k.startswith("_")}
    scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
    FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer).save_pretrained(folder)
    shutil.rmtree(folder / "made")
    return folder


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def shard(folder: Path) -> list[str]:
    """Cut a folder's transformer into shards, as diffusers does with the 24 GB of FLUX.1-dev; their names."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / WEIGHTS).unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    return sorted(p.name for p in (folder / "transformer").glob("*.safetensors"))
