"""How the tiny reward is trained: on what words mean, on what the base model really draws, and on its own hacks.

A reward is hacked where it has seen nothing. So during training latents of the base's images walk up its gradient, to
where it likes them more, and the judge labels at once what they have become.
"""

import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from config import SHAPES as PRESET
from formats.folders import Pipeline
from leaps import rollout
from model import Flux
from recipe.base import GRID, caption_velocity
from recipe.fit import RecipeFlags, TensorDict, fit, generator, load_or_compute
from recipe.lessons import UNKNOWN, fades, judge_labels, training_scenes
from recipe.prompts import CAPTIONS, EVEN, TEACH, numbers_of, random_prompts
from recipe.reward import attacked_loss, augment, dense_loss, fade_loss, of_caption, scores, walk
from rewards import WEIGHTS
from sample import decode, encode, padded_ids, sigmas
from scorers.clip import features
from shapes.world import SIZE

RADIUS = 1.5  # L2 in pixels: a right image becomes wrong within 1.5 to 2, so attacks of 3 contradict their own labels
N_WALKERS = 480  # latents that walk
N_MOVED = 48  # walkers that a training step moves
RESTART = 0.1  # chance of such a walker to start anew, so that the reward sees the first steps of a walk as well


def label_images(cfg: RecipeFlags, pipe: Pipeline, clean: Flux, latents: TensorDict) -> list[TensorDict]:
    """Images with the judge's label for every prompt: decoded scenes, then samples before and after the finish.

    Each set: x (n, 16, 32), latents; images (n, 3, 64, 64) uint8; caption (n,); fits (n, p).
    """

    def label(x: Tensor, caption: Tensor) -> TensorDict:
        images = torch.cat([decode(pipe, batch, SIZE, SIZE) for batch in x.split(100)])
        pixels = images.mul(255).round().byte()  # a quarter of the memory
        return dict(x=x, images=pixels, caption=caption, fits=judge_labels(images))

    def compute() -> list[TensorDict]:
        rows = generator("scenes").choice(len(latents["x"]), cfg.at_scale(2500))
        sets = [label(latents["x"][rows], latents["prompt"][rows])]
        # In few Euler steps and in many, because images of few steps have more defects.
        for name, flux, steps, n in (
            ("clean", clean, 5, 2000),
            ("clean", clean, 25, 1000),
            ("finish", pipe.flux, 5, 2500),
            ("finish", pipe.flux, PRESET.rollout_steps, 4000),  # alignment starts from these samples
        ):
            rng = generator(f"{name}-{steps}")
            caption = numbers_of(random_prompts(cfg.at_scale(n), rng, EVEN))
            torch.manual_seed(int(rng.integers(2**31)))
            sets.append(label(sample_latents(pipe, flux, caption, steps), caption))
        return sets

    return load_or_compute(cfg, "labels", compute)


def sample_latents(pipe: Pipeline, flux: Flux, caption: Tensor, steps: int) -> Tensor:
    """A network's own latents for prompts by number: (n,) to (n, 16, 32)."""
    table = encode(pipe, CAPTIONS)
    levels = sigmas(pipe.schedule, steps, GRID**2)
    noise = torch.randn(len(caption), GRID**2, flux.config.in_channels)
    samples = []
    for numbers, x1 in zip(caption.split(250), noise.split(250)):
        velocity = caption_velocity(flux, table, numbers)
        samples.append(rollout(velocity, x1, levels).x[-1])
    return torch.cat(samples)


def fit_reward(cfg: RecipeFlags, pipe: Pipeline, labels: list[TensorDict]) -> CLIPModel:
    """The reward, on rendered scenes (`read`), and then on labelled images, fades and walkers as well (`reward`)."""
    ids = padded_ids(pipe.clip_tokenizer, CAPTIONS, pipe.text_length)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig.from_pretrained(WEIGHTS["tiny"]))
    # CLIP's initial position embeddings (0.02) are so small that a tower of this size may not learn where things are.
    # Larger ones, a vector for the row plus one for the column, tell it from the start.
    embedding = model.vision_model.embeddings.position_embedding.weight  # (1 + 64, 160), the class token first
    rows, columns = 0.3 * torch.randn(2, 8, 160)
    embedding.data[1:] = (rows[:, None] + columns).flatten(0, 1)
    model.logit_scale.requires_grad_(False)  # the scale of scores is fixed: OFFSET and SLOPE refer to it
    cells = nn.Linear(160, 4 * 2 * 5)  # for each cell, empty and four shapes, empty and four colors; thrown away
    modules = nn.ModuleList([model, cells])

    def read_loss(rng: Generator, step: int) -> Tensor:
        # No attacks in the first 40% of the stage, or the tower may not learn where things are; full ones after 90%.
        progress = step / cfg.at_scale(1500)
        radius = RADIUS * min(1, max(0, 2 * progress - 0.8))
        text = features(model.get_text_features(input_ids=ids))
        batch = training_scenes(random_prompts(96, rng, TEACH), rng)
        return attacked_loss(model, cells, text, batch, radius, rng)

    fit("read", modules, read_loss, cfg, steps=1500, lr=1e-3)

    data = concatenate(labels)
    starts = concatenate(labels[1:])  # from the model's samples, where alignment starts, too
    rows = default_rng((0, 3)).integers(len(starts["x"]), size=N_WALKERS)
    walkers = dict(x=starts["x"][rows], caption=starts["caption"][rows])

    def reward_loss(rng: Generator, step: int) -> Tensor:
        rows = rng.integers(len(data["caption"]), size=32)  # half of the batch; the other half is rendered
        labelled = dict(
            images=data["images"][rows] / 255,
            fits=data["fits"][rows],
            caption=data["caption"][rows],
            layout=torch.full((32, 2, 4), UNKNOWN),  # nobody knows what a model really drew
        )
        rendered = training_scenes(random_prompts(32, rng, TEACH), rng)  # they alone teach the head to read cells
        text = features(model.get_text_features(input_ids=ids))
        loss = attacked_loss(model, cells, text, concatenate([rendered, labelled]), RADIUS, rng)
        fade = fades(random_prompts(24, rng, TEACH), rng)
        fading_loss = fade_loss(model, text, fade, rng)

        # The walk follows the current reward without training it; the images at its end train it. They are labelled for
        # all prompts, so the caption that a walker follows plays no part in the loss.
        images = move_walkers(walkers, starts, pipe, model, text.detach(), rng)
        score, _ = scores(model, augment(images, rng), text)  # not attacked: the walk was the attack
        return loss + dense_loss(score, judge_labels(images)) + fading_loss

    fit("reward", modules, reward_loss, cfg, steps=1500, lr=7e-4)
    return model


def concatenate(batches: list[TensorDict]) -> TensorDict:
    """The rows of all batches, which have the same keys."""
    result = {}
    for key in batches[0]:
        result[key] = torch.cat([batch[key] for batch in batches])
    return result


def move_walkers(
    walkers: TensorDict,
    starts: TensorDict,
    pipe: Pipeline,
    model: CLIPModel,
    text: Tensor,
    rng: Generator,
) -> Tensor:
    """Move some of the walkers on, in place, and return their images."""
    moving = rng.choice(N_WALKERS, N_MOVED, replace=False)
    restarts = moving[rng.random(N_MOVED) < RESTART]
    rows = rng.integers(len(starts["x"]), size=len(restarts))
    for key in walkers:
        walkers[key][restarts] = starts[key][rows]
    caption = walkers["caption"][moving]

    def caption_score(x: Tensor) -> Tensor:
        score, _ = scores(model, decode(pipe, x, SIZE, SIZE), text)
        return of_caption(score, caption)

    steps = int(rng.integers(1, 3))  # 1 or 2: long walks come from many calls, each with a newer reward
    walkers["x"][moving] = walk(caption_score, walkers["x"][moving], steps)
    return decode(pipe, walkers["x"][moving], SIZE, SIZE)
