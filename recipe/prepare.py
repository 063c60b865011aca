"""Train the models of the shapes world from nothing:  python -m recipe.prepare

It takes two hours on two cores. Each stage saves its result in --out and is skipped if the result exists. To try all
stages in minutes:

    python -m recipe.prepare --scale 0.002 --out /tmp/try
"""

import shutil
from pathlib import Path

import tyro
from safetensors.torch import save_file

from config import SHAPES as PRESET
from formats.folders import load_pipeline
from formats.saving import save_transformer
from recipe.base import encode_scenes, fit_flux, fit_text_encoders, fit_vae
from recipe.fit import RecipeFlags
from recipe.reward import fit_reward, label_images


def main(cfg: RecipeFlags) -> None:
    # Sizes, tokenizers, schedule and prompts are those that are shipped. Only weights are made.
    shipped = Path(PRESET.model)
    no_copy = shutil.ignore_patterns("*.safetensors", "*.py", "*.md", "__pycache__")
    shutil.copytree(shipped.parent, cfg.out, ignore=no_copy, dirs_exist_ok=True)

    pipe = load_pipeline(shipped)  # its networks are replaced one by one
    fit_vae(cfg, pipe)
    latents = encode_scenes(cfg, pipe)
    fit_text_encoders(cfg, pipe)
    clean = fit_flux(cfg, pipe, latents)

    # A model folder in the layout of FLUX.1-dev.
    folder = cfg.out / shipped.name
    save_transformer(folder / "transformer", pipe.flux.config, pipe.flux.state_dict().items())
    pipe.vae.save_pretrained(folder / "vae")
    pipe.encoders[1].save_pretrained(folder / "text_encoder_2")  # FLUX's number 2 is T5
    # The published names of FLUX.1-dev's encoder, which every transformers reads; version 5 would drop the prefix.
    tensors = {}
    for key, tensor in pipe.encoders[0].state_dict().items():
        tensors["text_model." + key.removeprefix("text_model.")] = tensor
    save_file(tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})

    # The reward learns from what the base draws, and from what becomes of that on the way up its own gradient.
    labels = label_images(cfg, pipe, clean, latents)
    reward = fit_reward(cfg, pipe, labels)
    reward.save_pretrained(cfg.out / "tiny-reward")


if __name__ == "__main__":
    main(tyro.cli(RecipeFlags, description=__doc__))
