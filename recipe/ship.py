"""Write the files of the world: the base in the layout of FLUX.1-dev, the reward as a CLIPModel, the prompts."""

import json
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import CLIPModel

from formats.saving import save_transformer
from model import Flux
from recipe.base import SCHEDULE, latents, stage_text, stage_vae
from recipe.fit import PrepareFlags
from recipe.models import TINY, make_tokenizers
from recipe.prompts import OF_TASK
from shapes.world import Prompt, is_held_out

ALIGN_LINES = 144  # of the training file, for each unit of a task's share
ALIGN_SHARES = dict(single=2, two=3, count=3, color=2, position=3, attr=3)
EVAL_LINES = 60  # of the evaluation file, for each task, as the judge's mean is over tasks
PIPELINE = dict(  # model_index.json, by which FluxPipeline finds its classes
    _class_name="FluxPipeline",
    _diffusers_version="0.35.0",
    scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    text_encoder=("transformers", "CLIPTextModel"),
    text_encoder_2=("transformers", "T5EncoderModel"),
    tokenizer=("transformers", "CLIPTokenizer"),
    tokenizer_2=("transformers", "T5TokenizerFast"),
    transformer=("diffusers", "FluxTransformer2DModel"),
    vae=("diffusers", "AutoencoderKL"),
)


def ship_base(cfg: PrepareFlags, flux: Flux, folder: Path) -> None:
    """A model folder in the layout of FLUX.1-dev."""
    vae, text, data = stage_vae(cfg), stage_text(cfg), latents(cfg)
    # The VAE was trained before its latents were measured, so their shift and scale come into its config here.
    vae.register_to_config(
        shift_factor=data["shift_factor"].item(),
        scaling_factor=data["scaling_factor"].item(),
    )
    vae.save_pretrained(folder / "vae")
    text["clip"].save_pretrained(folder / "text_encoder")
    # The published names of FLUX.1-dev's encoder, which every transformers reads; version 5 would drop the prefix.
    clip_tensors = {}
    for key, tensor in text["clip"].state_dict().items():
        clip_tensors["text_model." + key.removeprefix("text_model.")] = tensor
    save_file(clip_tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    text["t5"].save_pretrained(folder / "text_encoder_2")  # FLUX's number 2 is T5
    make_tokenizers(folder)
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    save_transformer(folder / "transformer", TINY, flux.state_dict().items())
    (folder / "model_index.json").write_text(json.dumps(PIPELINE, indent=2) + "\n")


def ship_reward(cfg: PrepareFlags, clip: CLIPModel, folder: Path) -> None:
    clip.save_pretrained(folder)
    shutil.copytree(cfg.work / "tokenizer", folder, dirs_exist_ok=True)  # beside the weights, as transformers reads it


def ship_prompts(folder: Path) -> None:
    """train-prompts.txt has no held-out prompts; eval-prompts.txt has only those, in the tasks that hold some out."""
    train, evaluation = [], []
    for task, prompts in OF_TASK.items():
        held_out = [p for p in prompts if is_held_out(p)]
        allowed = [p for p in prompts if not is_held_out(p)]
        train += repeat_captions(allowed, ALIGN_LINES * ALIGN_SHARES[task])
        evaluation += repeat_captions(held_out or prompts, EVAL_LINES)  # single and two hold none out
    (folder / "train-prompts.txt").write_text("".join(train))
    (folder / "eval-prompts.txt").write_text("".join(evaluation))


def repeat_captions(prompts: list[Prompt], n: int) -> list[str]:
    """n lines: the captions in turn."""
    return [prompts[i % len(prompts)].text + "\n" for i in range(n)]
