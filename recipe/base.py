"""The base model of the shapes world: an autoencoder, text encoders that know what captions mean, and a tiny Flux.

The text encoders are trained alone and then frozen, as FLUX's are, so a caption's embeddings are a row of a table.
Flux first learns on right captions (`clean`) and then briefly on captions that are often wrong in a detail (`finish`):
it knows what to draw, and does not always do so. Trained on wrong captions from the start it would know less: colors
blend, and the relations of two shapes are never learned.

Legend: p prompts of the world (236), n latents or images, m text tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import AutoTokenizer

from leaps import Velocity, rollout
from model import Flux, init_weights
from recipe.fit import PrepareFlags, TensorDict, fit_stage, load_or_compute
from recipe.lessons import numbers_of
from recipe.models import TINY, make_text_encoders, make_tokenizers, make_vae, token_table
from recipe.prompts import EVEN, TEACH, distort, random_prompts
from sample import Text, pack, sigmas, unpack, velocity_of
from shapes.world import COLOR_NAMES, NUMBER, PROMPTS, SHAPES, random_layouts, render, scenes

SHIFT = 3.0  # of the noise levels, in training and in sampling; FLUX has 3.16 at 1024x1024
SCHEDULE = dict(use_dynamic_shifting=False, shift=SHIFT)
GRID = 4  # rows and columns of image tokens
SCENES = {  # for each prompt of a task; attr has 144 prompts
    "single": 250,
    "two": 300,
    "count": 300,
    "color": 250,
    "position": 250,
    "attr": 90,
}


# ------------------------------------------------------------------------------- vae and its latents


def stage_vae(cfg: PrepareFlags) -> AutoencoderKL:
    torch.manual_seed(cfg.seed)  # of the initial weights; each step of training sets a seed of its own
    vae = make_vae()

    def loss_fn(rng: Generator, step: int) -> TensorDict:
        # Random cells, which are fuller than those of prompts: an image has more to learn from.
        shape = rng.integers(-1, len(SHAPES), (40, 4))
        color = rng.integers(len(COLOR_NAMES), size=shape.shape)
        layouts = np.stack([shape, color], axis=1)
        images = render(layouts, rng) * 2 - 1  # the VAE's range is [-1, 1]
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        mse = error.square().mean()
        l1 = error.abs().mean()  # keeps edges sharper than the squared error alone
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # per latent entry
        loss = mse + 0.5 * l1 + 3e-5 * kl  # a light KL, as in latent diffusion
        return dict(loss=loss, mse=mse)

    modules = nn.ModuleDict(dict(vae=vae))
    fit_stage("vae", modules, loss_fn, cfg, steps=1700, lr=3e-3)
    return vae.eval().requires_grad_(False)


def latents(cfg: PrepareFlags) -> TensorDict:
    """Encoded scenes, once for all steps of training: x (n, 16, 32), and the prompt of each, (n,).

    Their mean is 0 and their standard deviation 1, by `shift_factor` and `scaling_factor`, which go into the VAE's
    config.
    """

    def compute() -> TensorDict:
        vae = stage_vae(cfg)
        rng = default_rng((cfg.seed, 1))  # 1, 2, 3: streams of the latents, the meanings, the walkers
        numbers = []
        for i, prompt in enumerate(PROMPTS):
            numbers += [i] * cfg.at_scale(SCENES[prompt.task])
        numbers = torch.tensor(numbers)
        means = []
        for batch in numbers.split(200):  # all at once would not fit into memory
            images, _ = scenes([PROMPTS[i] for i in batch], rng)
            means.append(vae.encode(images * 2 - 1).latent_dist.mean)  # no noise: the base adds its own
        z = torch.cat(means)  # (n, 8, 8, 8)
        shift, scale = z.mean(), 1 / z.std()
        return dict(
            x=pack((z - shift) * scale),
            prompt=numbers,
            shift_factor=shift,
            scaling_factor=scale,
        )

    return load_or_compute(cfg.work / "latents.pt", compute)


def decoder(cfg: PrepareFlags) -> Callable[[Tensor], Tensor]:
    """A function from packed latents (n, 16, 32) to images in [0, 1], differentiable."""
    data, vae = latents(cfg), stage_vae(cfg)

    def decode(x: Tensor) -> Tensor:
        z = unpack(x, GRID, GRID) / data["scaling_factor"] + data["shift_factor"]
        return (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)  # as sample.decode

    return decode


# -------------------------------------------------------------------------------------------- text


def stage_text(cfg: PrepareFlags) -> nn.ModuleDict:
    """T5 and CLIP text encoders, trained so that linear heads can read a caption's meaning off their embeddings.

    The heads are thrown away. Trained together with Flux instead, the encoders never learned relations.
    """
    t5_ids, clip_ids = token_ids(cfg)
    torch.manual_seed(cfg.seed)
    text = make_text_encoders(cfg.work)
    heads = nn.ModuleDict(
        dict(
            noun=nn.Linear(TINY.context_in_dim, 17),  # of the token of a noun: see `meanings`
            mean=nn.Linear(TINY.context_in_dim, 40),  # of the mean over tokens
            pooled=nn.Linear(TINY.vec_in_dim, 40),
        )
    )
    scene, noun, is_noun = meanings(cfg, t5_ids)

    def loss_fn(rng: Generator, step: int) -> TensorDict:
        hidden = text["t5"](t5_ids)[0]  # (p, m, 96): every step sees all captions
        pooled = text["clip"](clip_ids).pooler_output  # (p, 64)
        noun_error = heads["noun"](hidden) - noun
        pooled_error = heads["pooled"](pooled) - scene
        mean_error = heads["mean"](hidden.mean(1)) - scene
        noun_loss = noun_error[is_noun].square().sum(-1).mean()
        pooled_loss = pooled_error.square().sum(-1).mean()
        mean_loss = mean_error.square().sum(-1).mean()
        # Flux reads the tokens and the pooled vector, so these two count in full.
        loss = noun_loss + pooled_loss + 0.3 * mean_loss
        return dict(loss=loss)

    modules = nn.ModuleDict(dict(text=text, heads=heads))
    fit_stage("text", modules, loss_fn, cfg, steps=600, lr=2e-3)
    return text.eval().requires_grad_(False)


def token_ids(cfg: PrepareFlags) -> tuple[Tensor, Tensor]:
    """T5's and CLIP's ids of every prompt, (p, m) each; makes the tokenizers the first time."""
    if not (cfg.work / "tokenizer" / "vocab.json").exists():
        make_tokenizers(cfg.work)
    return token_table(cfg.work / "tokenizer_2"), token_table(cfg.work / "tokenizer")


def meanings(cfg: PrepareFlags, t5_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What captions mean, as frequencies over 200 layouts of each.

    scene (p, 40): how often each cell is empty or has each shape, and the same for colors.
    noun (p, m, 17): for the token of a noun, how often its shape is in each cell (4), its color or none (5), its shape
    (4), and the count (4).
    is_noun (p, m): which tokens are nouns.
    """
    rng = default_rng((cfg.seed, 2))
    tokenizer = AutoTokenizer.from_pretrained(cfg.work / "tokenizer_2")
    shape_of_word = {}
    for i, shape in enumerate(SHAPES):
        shape_of_word |= {shape: i, f"{shape}s": i, f"{shape}es": i}

    scene = torch.zeros(len(PROMPTS), 2, 4, 5)  # (p, shape or color, cell, empty or which)
    noun = torch.zeros(*t5_ids.shape, 17)
    is_noun = torch.zeros(t5_ids.shape, dtype=torch.bool)
    for i, prompt in enumerate(PROMPTS):
        layouts = torch.from_numpy(random_layouts([prompt] * 200, rng))
        cells = F.one_hot(layouts + 1, 5)  # index 0 is empty
        scene[i] = cells.float().mean(0)
        colors = list(prompt.colors)
        for j, token in enumerate(tokenizer.convert_ids_to_tokens(t5_ids[i])):
            shape = shape_of_word.get(token.strip("\u2581"))  # sentencepiece's mark of the start of a word
            if shape is None:
                continue
            color = COLOR_NAMES.index(colors.pop(0)) + 1 if colors else 0  # nouns come in the order of their colors
            noun[i, j, :4] = scene[i, 0, :, shape + 1]
            noun[i, j, 4 + color] = 1
            noun[i, j, 9 + shape] = 1
            noun[i, j, 13 + prompt.count - 1] = 1
            is_noun[i, j] = True
    return scene.flatten(1), noun, is_noun


def caption_table(cfg: PrepareFlags) -> Text:
    """What Flux sees of every prompt of the world: T5's embeddings (p, m, 96) and CLIP's (p, 64)."""

    def compute() -> list[Tensor]:
        t5_ids, clip_ids = token_ids(cfg)
        text = stage_text(cfg)
        return [text["t5"](t5_ids)[0], text["clip"](clip_ids).pooler_output]

    return Text(*load_or_compute(cfg.work / "captions.pt", compute))


# -------------------------------------------------------------------------------------------- flux


def stage_clean(cfg: PrepareFlags) -> Flux:
    torch.manual_seed(cfg.seed)
    flux = Flux(TINY)
    init_weights(flux)  # adaLN-zero, as DiT
    fit_flux(cfg, "clean", flux, TEACH, distorted=0.0, steps=3500, lr=2e-3, average=0.998)
    return flux


def stage_finish(cfg: PrepareFlags) -> Flux:
    """The base. A light finish moves the weights by 3%, so alignment has little to undo."""
    flux = stage_clean(cfg)
    weights = EVEN | dict(single=8)  # never wrong: keeps objects crisp while habits change
    fit_flux(cfg, "finish", flux, weights, distorted=0.5, steps=450, lr=1e-4, average=0.0)
    return flux


def fit_flux(
    cfg: PrepareFlags,
    name: str,
    flux: Flux,
    weights: dict[str, float],
    distorted: float,
    steps: int,
    lr: float,
    average: float,
) -> None:
    """Flow matching on scenes whose caption is wrong in a detail with probability `distorted`."""
    data, table = latents(cfg), caption_table(cfg)
    rows_of_prompt = []
    for i in range(len(PROMPTS)):
        rows = torch.nonzero(data["prompt"] == i)[:, 0]
        rows_of_prompt.append(rows.numpy())  # the scenes of each prompt

    def loss_fn(rng: Generator, step: int) -> TensorDict:
        captions = random_prompts(128, rng, weights)
        # The scene is distorted, not the caption, so that the captions keep their weights.
        scene_prompts = [distort(p, rng) if rng.random() < distorted else p for p in captions]
        rows = [rng.choice(rows_of_prompt[NUMBER[p]]) for p in scene_prompts]
        x0 = data["x"][rows]
        velocity = caption_velocity(flux, table, numbers_of(captions))
        return flow_loss(velocity, x0, torch.randn_like(x0))

    fit_stage(name, flux, loss_fn, cfg, steps, lr, average)


def flow_loss(velocity: Velocity, x0: Tensor, x1: Tensor) -> TensorDict:
    """Flow matching: the squared error of the velocity x_1 - x_0 at random noise levels."""
    sigma = torch.sigmoid(torch.randn(len(x0)))  # logit-normal, as in SD3
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    x = torch.lerp(x0, x1, sigma[:, None, None])
    error = F.mse_loss(velocity(x, sigma), x1 - x0)  # x_0 is the image, x_1 the noise, as in leaps.py
    return dict(loss=error)


def caption_velocity(flux: Flux, table: Text, caption: Tensor) -> Velocity:
    """The model's velocity for prompts by number, (n,)."""
    text = Text(table.txt[caption], table.vec[caption])
    return velocity_of(flux, text, GRID, GRID)


def sample_latents(cfg: PrepareFlags, flux: Flux, caption: Tensor, steps: int, seed: int) -> Tensor:
    """The model's own latents for prompts by number: (n,) to (n, 16, 32)."""
    table = caption_table(cfg)
    generator = torch.Generator().manual_seed(seed)  # its own, so that training is not disturbed
    levels = sigmas(SCHEDULE, steps, GRID**2)
    noise = torch.randn(len(caption), GRID**2, TINY.in_channels, generator=generator)
    samples = []
    for numbers, x1 in zip(caption.split(250), noise.split(250)):
        velocity = caption_velocity(flux, table, numbers)
        states = rollout(velocity, x1, levels)
        samples.append(states.x[-1])
    return torch.cat(samples)
