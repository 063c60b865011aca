"""Write what the repository ships: the base in the layout of FLUX.1-dev, the reward as a CLIPModel, the prompts."""

import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import CLIPModel

from formats.saving import save_transformer
from model import Flux
from recipe.base import SCHEDULE, latents, stage_text, stage_vae
from recipe.fit import OF_TASK, Config
from recipe.models import TINY, make_tokenizers
from shapes.world import TASKS, is_held_out

ALIGN = dict(single=2, two=3, count=3, color=2, position=3, attr=3)  # shares of the tasks in train-prompts.txt
PARTS = dict(
    scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    text_encoder=("transformers", "CLIPTextModel"),
    text_encoder_2=("transformers", "T5EncoderModel"),
    tokenizer=("transformers", "CLIPTokenizer"),
    tokenizer_2=("transformers", "T5TokenizerFast"),
    transformer=("diffusers", "FluxTransformer2DModel"),
    vae=("diffusers", "AutoencoderKL"),
)


def ship_base(cfg: Config, flux: Flux, folder: Path) -> None:
    """A model folder in the layout of FLUX.1-dev."""
    vae, text, data = stage_vae(cfg), stage_text(cfg), latents(cfg)
    vae.register_to_config(shift_factor=data["shift_factor"].item(), scaling_factor=data["scaling_factor"].item())
    vae.save_pretrained(folder / "vae")
    # The published names of FLUX.1-dev's encoder, which every transformers reads; version 5 would drop the prefix.
    named = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text["clip"].state_dict().items()}
    text["clip"].save_pretrained(folder / "text_encoder")
    save_file(named, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    text["t5"].save_pretrained(folder / "text_encoder_2")
    make_tokenizers(folder)
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    save_transformer(folder / "transformer", TINY, flux.state_dict().items())
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.35.0", **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def ship_reward(cfg: Config, clip: CLIPModel, folder: Path) -> None:
    clip.save_pretrained(folder)
    for file in (cfg.work / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def ship_prompts(folder: Path) -> None:
    """What train.py aligns on, none of it held out, and what it evaluates: held-out prompts where a task has some."""
    allowed = {t: [p for p in ps if not is_held_out(p)] for t, ps in OF_TASK.items()}
    lines = [allowed[t][i % len(allowed[t])].text for t, w in ALIGN.items() for i in range(144 * w)]
    (folder / "train-prompts.txt").write_text("\n".join(lines) + "\n")
    asked = {t: [p for p in ps if is_held_out(p)] or ps for t, ps in OF_TASK.items()}
    lines = [asked[t][i % len(asked[t])].text for t in TASKS for i in range(60)]
    (folder / "eval-prompts.txt").write_text("\n".join(lines) + "\n")
