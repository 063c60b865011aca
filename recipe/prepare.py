"""Make everything that the shapes world ships, from nothing:  python -m recipe.prepare

It takes two hours on two cores. Each stage saves its result in --work and is skipped if the result exists; an
interrupted stage resumes from its last checkpoint. To try all stages in minutes, without replacing anything shipped:

    python -m recipe.prepare --scale 0.002 --work /tmp/try --out /tmp/try/out

The stages:

    vae      AutoencoderKL on rendered scenes
    text     T5 and CLIP text encoders on what captions mean, frozen from then on
    clean    tiny Flux on right captions: what the base knows
    finish   a light finish on captions that are often wrong in a detail: the base knows, but does not always obey
    read     the reward on rendered scenes: what the words mean
    labels   images of the base, labelled by the judge
    reward   the reward on the labelled images, attacked; on fades from one scene to another; and on images that walk
             up its own gradient, which the judge labels as they go
    ship     shapes/tiny-flux, shapes/tiny-reward and the prompt files

`python -m recipe.report` then measures what was made.
"""

import torch
import tyro

from recipe.base import stage_clean, stage_finish, stage_text, stage_vae
from recipe.fit import PrepareFlags
from recipe.ship import ship_base, ship_prompts, ship_reward
from recipe.teach import stage_labels, stage_read, stage_reward


def stage_ship(cfg: PrepareFlags) -> None:
    # A finished stage only loads its result.
    ship_base(cfg, stage_finish(cfg), cfg.out / "tiny-flux")
    ship_reward(cfg, stage_reward(cfg)["clip"], cfg.out / "tiny-reward")
    ship_prompts(cfg.out)


STAGES = dict(  # in the order in which they need each other
    vae=stage_vae,
    text=stage_text,
    clean=stage_clean,
    finish=stage_finish,
    read=stage_read,
    labels=stage_labels,
    reward=stage_reward,
    ship=stage_ship,
)


def main(cfg: PrepareFlags) -> None:
    for stage in cfg.stages:
        if stage not in STAGES:
            raise SystemExit(f"error: --stages: there is no stage {stage!r}; there are {', '.join(STAGES)}")
    defaults = PrepareFlags()
    if cfg.scale != 1 and (cfg.work == defaults.work or cfg.out == defaults.out):
        # A short run would be taken for a finished one, or would overwrite the world that all runs use.
        raise SystemExit("error: --scale: set --work and --out as well, or the shipped files would be replaced")
    torch.set_num_threads(cfg.threads)  # rounding, and so the weights, depend on their number
    cfg.work.mkdir(parents=True, exist_ok=True)
    for stage in cfg.stages or STAGES:  # each calls those that it needs
        STAGES[stage](cfg)


if __name__ == "__main__":
    main(tyro.cli(PrepareFlags, description=__doc__))
