"""Make everything the shapes world ships, from nothing:  python -m recipe.prepare

Each stage writes its result to --work and is skipped when that is there; an interrupted one goes on from its last
checkpoint.  It takes two hours on two cores.  All of it in minutes, and nothing shipped replaced:

    python -m recipe.prepare --scale 0.002 --work /tmp/try --out /tmp/try/out

The stages:

    vae      AutoencoderKL on rendered scenes
    text     T5 and CLIP text encoders on what captions mean, frozen from then on
    clean    tiny Flux on right captions: what the base knows
    finish   a light finish on captions that are often wrong in a detail: it knows, but does not always obey
    read     the reward on rendered scenes: what the words mean
    labels   images of the base, labelled by the judge
    reward   the reward on those, adversarially, on fades from one scene to another, and on pictures that walk up its
             own gradient, which the judge labels as they go
    ship     shapes/tiny-flux, shapes/tiny-reward and the prompt files

`python -m recipe.report` then measures what was made.
"""

import torch
import tyro

from recipe.base import stage_clean, stage_finish, stage_text, stage_vae
from recipe.fit import Config
from recipe.ship import ship_base, ship_prompts, ship_reward
from recipe.teach import stage_labels, stage_read, stage_reward


def stage_ship(cfg: Config) -> None:
    ship_base(cfg, stage_finish(cfg), cfg.out / "tiny-flux")
    ship_reward(cfg, stage_reward(cfg)["clip"], cfg.out / "tiny-reward")
    ship_prompts(cfg.out)


STAGES = dict(
    vae=stage_vae,
    text=stage_text,
    clean=stage_clean,
    finish=stage_finish,
    read=stage_read,
    labels=stage_labels,
    reward=stage_reward,
    ship=stage_ship,
)


def main(cfg: Config) -> None:
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise SystemExit(f"error: --stages: there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if cfg.scale != 1 and (cfg.work == Config.work or cfg.out == Config.out):
        raise SystemExit("error: --scale: give it a --work and an --out of its own, or what is shipped is replaced")
    torch.set_num_threads(cfg.threads)
    cfg.work.mkdir(parents=True, exist_ok=True)
    for stage in cfg.stages or STAGES:
        STAGES[stage](cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
