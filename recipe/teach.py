"""How the tiny reward is trained: on what words mean, on what the base model really draws, and on its own hacks.

A reward is hacked where it has seen nothing. So during training latents of the base's images walk up its gradient, to
where it likes them more, and the judge labels at once what they have become.
"""

from collections.abc import Callable
from functools import partial

import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn

from config import SHAPES as PRESET
from model import Flux
from recipe.base import decoder, latents, sample_latents, stage_clean, stage_finish, token_ids
from recipe.fit import PrepareFlags, TensorDict, fit_stage, load_or_compute, print_scores, stage_seed
from recipe.lessons import UNKNOWN, fades, numbers_of, training_scenes, truths
from recipe.models import VISION_WIDTH, make_reward
from recipe.prompts import EVEN, TEACH, random_prompts
from recipe.reward import attacked_loss, augment, dense_loss, fade_loss, of_caption, scores, walk
from scorers.clip import features
from shapes.judge import accuracy, objects_in
from shapes.world import PROMPTS, Prompt

RADIUS = 1.5  # L2 in pixels: a right image becomes wrong within 1.5 to 2, so attacks of 3 contradict their own labels
N_WALKERS = 480  # latents that walk
N_MOVED = 48  # walkers that a training step moves
RESTART = 0.1  # chance of such a walker to start anew, so that the reward sees the first steps of a walk as well


def stage_read(cfg: PrepareFlags) -> nn.ModuleDict:
    """The reward on rendered scenes. `clip` is the reward, `cells` a head that is thrown away later."""
    _, ids = token_ids(cfg)  # CLIP's
    torch.manual_seed(cfg.seed)
    model = make_reward(cfg.work / "tokenizer")
    model.logit_scale.requires_grad_(False)  # the scale of scores is fixed: OFFSET and SLOPE refer to it
    cells = nn.Linear(VISION_WIDTH, 4 * 2 * 5)  # for each cell, empty and four shapes, empty and four colors
    modules = nn.ModuleDict(dict(clip=model, cells=cells))

    def loss_fn(rng: Generator, step: int) -> TensorDict:
        # No attacks in the first 40% of the stage, or the tower may not learn where things are; full ones after 90%.
        progress = step / cfg.at_scale(1500)
        radius = RADIUS * min(1, max(0, 2 * progress - 0.8))
        text = features(model.get_text_features(input_ids=ids))
        prompts = random_prompts(96, rng, TEACH)
        batch = training_scenes(prompts, rng)
        return attacked_loss(modules, text, batch, radius, rng)

    fit_stage("read", modules, loss_fn, cfg, steps=1500, lr=1e-3)
    return modules


def stage_labels(cfg: PrepareFlags) -> list[TensorDict]:
    """Labelled images: decoded scenes first, then samples of the base before and after its finish.

    In few Euler steps and in many, because images of few steps have more defects.
    """

    def decoded_scenes(rng: Generator) -> tuple[list[Prompt], Tensor]:
        data = latents(cfg)
        n = cfg.at_scale(2500, minimum=64)
        rows = torch.from_numpy(rng.choice(len(data["x"]), n))
        prompts = [PROMPTS[i] for i in data["prompt"][rows]]
        return prompts, data["x"][rows]

    clean = stage_clean(cfg)
    finish = stage_finish(cfg)
    steps = PRESET.rollout_steps  # alignment starts from these samples
    return [
        label_images(cfg, "scenes", decoded_scenes),
        label_samples(cfg, "clean", clean, 5, 2000),
        label_samples(cfg, "clean", clean, 25, 1000),
        label_samples(cfg, "finish", finish, 5, 2500),
        label_samples(cfg, "finish", finish, steps, 4000),
    ]


def label_samples(cfg: PrepareFlags, name: str, flux: Flux, steps: int, n: int) -> TensorDict:
    """n samples of the model in so many Euler steps, labelled."""

    def model_samples(rng: Generator) -> tuple[list[Prompt], Tensor]:
        prompts = random_prompts(cfg.at_scale(n, minimum=64), rng, EVEN)
        seed = int(rng.integers(2**31))
        return prompts, sample_latents(cfg, flux, numbers_of(prompts), steps, seed)

    return label_images(cfg, f"{name}-{steps}", model_samples)


def label_images(
    cfg: PrepareFlags,
    name: str,
    make: Callable[[Generator], tuple[list[Prompt], Tensor]],
) -> TensorDict:
    """Images with the judge's label for every prompt; `make(rng)` returns their prompts and latents.

    x (n, 16, 32), latents; images (n, 3, 64, 64) uint8; caption (n,); fits (n, p).
    """

    def compute() -> TensorDict:
        prompts, x = make(default_rng(stage_seed(cfg, name)))
        decode = decoder(cfg)
        images = torch.cat([decode(batch) for batch in x.split(100)])
        caption = numbers_of(prompts)
        fits = truths(objects_in(images))
        print_scores(f"{len(x)} images, {name}", accuracy(of_caption(fits, caption), prompts))
        pixels = images.mul(255).round().byte()  # a quarter of the memory
        return dict(x=x, images=pixels, caption=caption, fits=fits)

    return load_or_compute(cfg.work / f"{name}.labels.pt", compute)


def stage_reward(cfg: PrepareFlags) -> nn.ModuleDict:
    """The reward on labelled images and rendered scenes, both attacked; on fades; and on walkers."""
    modules = stage_read(cfg)
    model = modules["clip"]
    _, ids = token_ids(cfg)
    labels = stage_labels(cfg)
    move_walkers = walkers(cfg, concatenate(labels[1:]))  # from the model's samples, where alignment starts, too
    data = concatenate(labels)

    def loss_fn(rng: Generator, step: int) -> TensorDict:
        rows = rng.integers(len(data["caption"]), size=32)
        rows = torch.from_numpy(rows)  # half of the batch; the other half is rendered
        labelled = dict(
            images=data["images"][rows] / 255,
            fits=data["fits"][rows],
            caption=data["caption"][rows],
            layout=torch.full((32, 2, 4), UNKNOWN),  # nobody knows what a model really drew
        )
        prompts = random_prompts(32, rng, TEACH)
        scenes = training_scenes(prompts, rng)  # they alone teach the head to read cells
        batch = concatenate([scenes, labelled])
        text = features(model.get_text_features(input_ids=ids))
        log = attacked_loss(modules, text, batch, RADIUS, rng)

        prompts = random_prompts(24, rng, TEACH)
        fade = fade_loss(model, text, fades(prompts, rng), rng)

        # The walk follows the current reward without training it; the images at its end train it. They are labelled for
        # all prompts, so the caption that a walker follows plays no part in the loss.
        score_fn = partial(scores, model, text=text.detach())
        images, fits = move_walkers(score_fn, rng)
        score, _ = scores(model, augment(images, rng), text)  # not attacked: the walk was the attack
        walk_loss = dense_loss(score, fits)

        log["loss"] = log["loss"] + walk_loss + fade["loss"]
        log["order"] = fade["order"]
        log["walk"] = walk_loss.detach()
        return log

    fit_stage("reward", modules, loss_fn, cfg, steps=1500, lr=7e-4)
    return modules


def concatenate(batches: list[TensorDict]) -> TensorDict:
    """The rows of all batches, which have the same keys."""
    result = {}
    for key in batches[0]:
        result[key] = torch.cat([batch[key] for batch in batches])
    return result


def walkers(cfg: PrepareFlags, starts: TensorDict) -> Callable[[Callable, Generator], tuple]:
    """A function that moves some of the walkers on, and returns their images and labels (n, p).

    Walkers are in no checkpoint: an interrupted stage goes on with new ones.
    """
    decode = decoder(cfg)
    n_starts = len(starts["x"])
    rows = default_rng((cfg.seed, 3)).integers(n_starts, size=N_WALKERS)
    x = starts["x"][rows]
    caption = starts["caption"][rows]

    def move(score_fn: Callable, rng: Generator) -> tuple[Tensor, Tensor]:
        moving = rng.choice(N_WALKERS, N_MOVED, replace=False)
        restarts = moving[rng.random(N_MOVED) < RESTART]
        rows = rng.integers(n_starts, size=len(restarts))
        x[restarts] = starts["x"][rows]  # in place: the walkers outlive the call
        caption[restarts] = starts["caption"][rows]

        captions = caption[moving]

        def caption_score(x: Tensor) -> Tensor:
            score, _ = score_fn(decode(x))
            return of_caption(score, captions)

        steps = int(rng.integers(1, 3))  # 1 or 2: long walks come from many calls, each with a newer reward
        x[moving] = walk(caption_score, x[moving], steps)
        images = decode(x[moving])
        return images, truths(objects_in(images))  # the judge, since nobody knows what a walked image shows

    return move
