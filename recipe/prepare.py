"""Make everything that the shapes world ships, from nothing:  python -m recipe.prepare

It takes two hours on two cores. Each stage saves its result in --out and is skipped if the result exists. To try all
stages in minutes:

    python -m recipe.prepare --scale 0.002 --out /tmp/try
"""

import shutil
from pathlib import Path

import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import CLIPTextModel, T5EncoderModel

import shapes
from formats.folders import load_pipeline
from formats.saving import save_transformer
from model import Flux
from recipe.base import SHIFT, encode_scenes, fit_flux, fit_text_encoders, fit_vae
from recipe.fit import RecipeFlags
from recipe.models import TINY, make_tokenizers
from recipe.prompts import OF_TASK
from recipe.teach import fit_reward, label_images
from shapes.world import Prompt, is_held_out

ALIGN_SHARES = dict(single=2, two=3, count=3, color=2, position=3, attr=3)
ALIGN_LINES = 144  # of the training file, for each unit of a task's share
EVAL_LINES = 60  # of the evaluation file, for each task, as the judge's mean is over tasks


def main(cfg: RecipeFlags) -> None:
    write_prompts(cfg.out)
    # The base: an autoencoder, text encoders that know what captions mean, and a tiny Flux.
    folder = cfg.out / "tiny-flux"
    tokenizers = make_tokenizers(folder)
    vae = fit_vae(cfg)
    latents = encode_scenes(cfg, vae)
    clip, t5, table = fit_text_encoders(cfg, *tokenizers)
    clean, base = fit_flux(cfg, latents, table)
    vae.register_to_config(
        shift_factor=latents["shift_factor"].item(),
        scaling_factor=latents["scaling_factor"].item(),
    )
    write_base(folder, vae, clip, t5, base)

    # The reward learns from what the base draws, and from what becomes of that on the way up its own gradient.
    pipe = load_pipeline(folder)
    labels = label_images(cfg, pipe, clean, latents)
    reward = fit_reward(cfg, pipe, labels)
    reward.save_pretrained(cfg.out / "tiny-reward")
    # The tokenizer beside the weights, as transformers reads it.
    shutil.copytree(folder / "tokenizer", cfg.out / "tiny-reward", dirs_exist_ok=True)


def write_prompts(folder: Path) -> None:
    """train-prompts.txt has no held-out prompts; eval-prompts.txt has only those, in the tasks that hold some out."""
    train, evaluation = [], []
    for task, prompts in OF_TASK.items():
        held_out = [p for p in prompts if is_held_out(p)]
        allowed = [p for p in prompts if not is_held_out(p)]
        train += repeat_captions(allowed, ALIGN_LINES * ALIGN_SHARES[task])
        evaluation += repeat_captions(held_out or prompts, EVAL_LINES)  # single and two hold none out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-prompts.txt").write_text("".join(train))
    (folder / "eval-prompts.txt").write_text("".join(evaluation))


def repeat_captions(prompts: list[Prompt], n: int) -> list[str]:
    """n lines: the captions in turn."""
    return [prompts[i % len(prompts)].text + "\n" for i in range(n)]


def write_base(folder: Path, vae: AutoencoderKL, clip: CLIPTextModel, t5: T5EncoderModel, flux: Flux) -> None:
    """A model folder in the layout of FLUX.1-dev, beside the tokenizers."""
    vae.save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "text_encoder")
    # The published names of FLUX.1-dev's encoder, which every transformers reads; version 5 would drop the prefix.
    tensors = {}
    for key, tensor in clip.state_dict().items():
        tensors["text_model." + key.removeprefix("text_model.")] = tensor
    save_file(tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    t5.save_pretrained(folder / "text_encoder_2")  # FLUX's number 2 is T5
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=SHIFT)
    scheduler.save_pretrained(folder / "scheduler")
    save_transformer(folder / "transformer", TINY, flux.state_dict().items())
    # Nothing in this file is trained: by it FluxPipeline finds its classes.
    shutil.copy(Path(shapes.__file__).parent / "tiny-flux" / "model_index.json", folder)


if __name__ == "__main__":
    main(tyro.cli(RecipeFlags, description=__doc__))
