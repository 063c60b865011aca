"""The base model of the shapes world: an autoencoder, text encoders that know what captions mean, and a tiny Flux.

The text encoders are trained alone and then frozen, as FLUX's are, so a caption's embeddings are a row of a table.
Flux first learns on right captions (`clean`) and then briefly on captions that are often wrong in a detail (`finish`):
it knows what to draw, and does not always do so. Trained on wrong captions from the start it would know less: colors
blend, and the relations of two shapes are never learned.

Each stage puts a network into the pipeline: of the same sizes, but with new weights.

Legend: p prompts of the world (236), n latents or images, m text tokens.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from formats.folders import Pipeline
from leaps import Velocity
from model import Flux, init_weights
from recipe.fit import RecipeFlags, TensorDict, fit
from recipe.lessons import CAPTIONS, EVEN, TEACH, distort, numbers_of, random_prompts
from sample import Text, encode, pack, padded_ids, velocity_of
from shapes.world import COLOR_NAMES, NUMBER, PROMPTS, SHAPES, random_layouts, render, scenes

GRID = 4  # rows and columns of image tokens
SCENES = dict(single=250, two=300, count=300, color=250, position=250, attr=90)  # for each prompt of a task


def fit_vae(cfg: RecipeFlags, pipe: Pipeline) -> None:
    torch.manual_seed(0)  # of the initial weights; each step of training sets a seed of its own
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(pipe.location.folder / "vae"))

    def loss_fn(rng: Generator, step: int) -> Tensor:
        # Random cells, which are fuller than those of prompts: an image has more to learn from.
        shape = rng.integers(-1, len(SHAPES), (40, 4))
        color = rng.integers(len(COLOR_NAMES), size=shape.shape)
        layouts = np.stack([shape, color], axis=1)
        images = render(layouts, rng) * 2 - 1  # the VAE's range is [-1, 1]
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        l1 = error.abs().mean()  # keeps edges sharper than the squared error alone
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # per latent entry
        return error.square().mean() + 0.5 * l1 + 3e-5 * kl  # a light KL, as in latent diffusion

    fit("vae", vae, loss_fn, cfg, steps=1700, lr=3e-3)
    pipe.vae = vae.eval().requires_grad_(False)


def encode_scenes(cfg: RecipeFlags, pipe: Pipeline) -> TensorDict:
    """Latents of scenes, once for all steps of training: x (n, 16, 32), and the prompt of each, (n,).

    Their mean is 0 and their standard deviation 1, by `shift_factor` and `scaling_factor` of the VAE.
    """

    rng = default_rng((0, 1))
    counts = torch.tensor([cfg.at_scale(SCENES[prompt.task]) for prompt in PROMPTS])
    numbers = torch.arange(len(PROMPTS)).repeat_interleave(counts)
    means = []
    for batch in numbers.split(200):  # all at once would not fit into memory
        images, _ = scenes([PROMPTS[i] for i in batch], rng)
        means.append(pipe.vae.encode(images * 2 - 1).latent_dist.mean)  # no noise: the base adds its own
    z = torch.cat(means)  # (n, 8, 8, 8)
    shift, scale = z.mean(), 1 / z.std()
    pipe.vae.register_to_config(shift_factor=shift.item(), scaling_factor=scale.item())
    return dict(x=pack((z - shift) * scale), prompt=numbers)


# -------------------------------------------------------------------------------------------- text


def fit_text_encoders(cfg: RecipeFlags, pipe: Pipeline) -> None:
    """T5 and CLIP, trained so that linear heads can read a caption's meaning off their embeddings.

    The heads are thrown away. Trained together with Flux instead, the encoders never learned relations.
    """
    torch.manual_seed(0)
    t5 = pipe.t5 = T5EncoderModel(pipe.t5.config)
    clip = pipe.clip = CLIPTextModel(pipe.clip.config)
    noun_head = nn.Linear(96, 17)  # of T5's token of a noun: see `meanings`
    mean_head = nn.Linear(96, 40)  # of the mean over T5's tokens
    pooled_head = nn.Linear(64, 40)  # of CLIP's embedding
    t5_ids = padded_ids(pipe.t5_tokenizer, CAPTIONS, pipe.text_length)
    clip_ids = padded_ids(pipe.clip_tokenizer, CAPTIONS, pipe.text_length)
    scene, noun, is_noun = meanings(pipe.text_length)

    def squared_error(x: Tensor, target: Tensor) -> Tensor:
        return (x - target).square().sum(-1).mean()

    def loss_fn(rng: Generator, step: int) -> Tensor:
        hidden = t5(t5_ids)[0]  # (p, m, 96): every step sees all captions
        pooled = clip(clip_ids).pooler_output  # (p, 64)
        noun_loss = squared_error(noun_head(hidden)[is_noun], noun[is_noun])
        pooled_loss = squared_error(pooled_head(pooled), scene)
        mean_loss = squared_error(mean_head(hidden.mean(1)), scene)
        # Flux reads the tokens and the pooled vector, so these two count in full.
        return noun_loss + pooled_loss + 0.3 * mean_loss

    modules = nn.ModuleList([t5, clip, noun_head, mean_head, pooled_head])
    fit("text", modules, loss_fn, cfg, steps=600, lr=2e-3)
    modules.eval().requires_grad_(False)


def meanings(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What captions mean, as frequencies over 200 layouts of each.

    scene (p, 40): how often each cell is empty or has each shape, and the same for colors.
    noun (p, m, 17): for the token of a noun, how often its shape is in each cell (4), its color or none (5), its shape
    (4), and the count (4).
    is_noun (p, m): which tokens are nouns.
    """
    rng = default_rng((0, 2))
    scene = torch.zeros(len(PROMPTS), 2, 4, 5)  # (p, shape or color, cell, empty or which)
    noun = torch.zeros(len(PROMPTS), length, 17)
    for i, prompt in enumerate(PROMPTS):
        layouts = torch.from_numpy(random_layouts([prompt] * 200, rng))
        scene[i] = F.one_hot(layouts + 1, 5).float().mean(0)  # index 0 is empty
        words = prompt.text.split()  # each is a token
        tokens = [j for j, word in enumerate(words) if word.startswith(SHAPES)]
        for k, j in enumerate(tokens):  # in the order of the prompt's shapes
            shape = SHAPES.index(prompt.shapes[k])
            color = COLOR_NAMES.index(prompt.colors[k]) + 1 if prompt.colors else 0
            noun[i, j, :4] = scene[i, 0, :, shape + 1]
            noun[i, j, [4 + color, 9 + shape, 12 + prompt.count]] = 1
    return scene.flatten(1), noun, noun.any(-1)


# -------------------------------------------------------------------------------------------- flux


def fit_flux(cfg: RecipeFlags, pipe: Pipeline, latents: TensorDict) -> Flux:
    """The base, and what it was before its finish, which is returned."""
    table = encode(pipe, CAPTIONS)

    def fit_captions(name: str, flux: Flux, weights: dict, distorted: float, **schedule: float) -> None:
        """Flow matching on scenes whose caption is wrong in a detail with probability `distorted`."""

        def loss_fn(rng: Generator, step: int) -> Tensor:
            captions = random_prompts(128, rng, weights)
            # The scene is distorted, not the caption, so that the captions keep their weights.
            scene_prompts = [distort(p, rng) if rng.random() < distorted else p for p in captions]
            rows = []
            for prompt in scene_prompts:
                of_prompt = torch.nonzero(latents["prompt"] == NUMBER[prompt])[:, 0]
                rows.append(rng.choice(of_prompt))
            x0 = latents["x"][rows]  # the image; x_1 is the noise, as in leaps.py
            x1 = torch.randn_like(x0)
            sigma = torch.sigmoid(torch.randn(len(x0)))  # logit-normal, as in SD3
            shift = pipe.schedule["shift"]  # in training as in sampling
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            x = torch.lerp(x0, x1, sigma[:, None, None])
            velocity = caption_velocity(flux, table, numbers_of(captions))
            return F.mse_loss(velocity(x, sigma), x1 - x0)

        fit(name, flux, loss_fn, cfg, **schedule)

    torch.manual_seed(0)
    clean = Flux(pipe.flux.config)
    init_weights(clean)  # adaLN-zero, as DiT
    fit_captions("clean", clean, TEACH, distorted=0.0, steps=3500, lr=2e-3, average=0.998)
    # A light finish moves the weights by 3%, so alignment has little to undo.
    pipe.flux = copy.deepcopy(clean)
    weights = EVEN | dict(single=8)  # never wrong: keeps objects crisp while habits change
    fit_captions("finish", pipe.flux, weights, distorted=0.5, steps=450, lr=1e-4)
    return clean


def caption_velocity(flux: Flux, table: Text, caption: Tensor) -> Velocity:
    """A network's velocity for prompts by number, (n,)."""
    text = Text(table.txt[caption], table.vec[caption])
    return velocity_of(flux, text, GRID, GRID)
