"""The base model of the shapes world: an autoencoder, text encoders that know what captions mean, and a tiny Flux.

The text encoders are trained alone and then frozen, as FLUX's are, so a caption's embeddings are a row of a table.
Flux first learns on right captions (`clean`) and then briefly on captions that are often wrong in a detail (`finish`):
it knows what to draw, and does not always do so. Trained on wrong captions from the start it would know less: colors
blend, and the relations of two shapes are never learned.

Legend: p prompts of the world (236), n latents or images, m text tokens.
"""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from leaps import Velocity
from model import Flux, init_weights
from recipe.fit import RecipeFlags, TensorDict, fit, load_or_compute
from recipe.models import CAPTIONS, TEXT_LENGTH, TINY, make_text_encoders, make_vae
from recipe.prompts import EVEN, TEACH, distort, numbers_of, random_prompts
from sample import Text, pack, padded_ids, velocity_of
from shapes.world import COLOR_NAMES, NUMBER, PROMPTS, SHAPES, random_layouts, render, scenes

TextEncoders = tuple[CLIPTextModel, T5EncoderModel, Text]
SHIFT = 3.0  # of the noise levels, in training and in sampling; FLUX has 3.16 at 1024x1024
GRID = 4  # rows and columns of image tokens
SCENES = dict(single=250, two=300, count=300, color=250, position=250, attr=90)  # for each prompt of a task


def fit_vae(cfg: RecipeFlags) -> AutoencoderKL:
    torch.manual_seed(0)  # of the initial weights; each step of training sets a seed of its own
    vae = make_vae()

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
    return vae.eval().requires_grad_(False)


def encode_scenes(cfg: RecipeFlags, vae: AutoencoderKL) -> TensorDict:
    """Latents of scenes, once for all steps of training: x (n, 16, 32), and the prompt of each, (n,).

    Their mean is 0 and their standard deviation 1, by `shift_factor` and `scaling_factor`.
    """

    def compute() -> TensorDict:
        rng = default_rng((0, 1))
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
        return dict(x=pack((z - shift) * scale), prompt=numbers, shift_factor=shift, scaling_factor=scale)

    return load_or_compute(cfg, "latents", compute)


# -------------------------------------------------------------------------------------------- text


def fit_text_encoders(cfg: RecipeFlags, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> TextEncoders:
    """CLIP and T5, trained so that linear heads can read a caption's meaning off their embeddings, and these.

    The heads are thrown away. Trained together with Flux instead, the encoders never learned relations.
    """
    torch.manual_seed(0)
    clip, t5 = make_text_encoders(clip_tokenizer, t5_tokenizer)
    noun_head = nn.Linear(TINY.context_in_dim, 17)  # of the token of a noun: see `meanings`
    mean_head = nn.Linear(TINY.context_in_dim, 40)  # of the mean over tokens
    pooled_head = nn.Linear(TINY.vec_in_dim, 40)
    t5_ids = padded_ids(t5_tokenizer, CAPTIONS, TEXT_LENGTH)
    clip_ids = padded_ids(clip_tokenizer, CAPTIONS, TEXT_LENGTH)
    scene, noun, is_noun = meanings()

    def loss_fn(rng: Generator, step: int) -> Tensor:
        hidden = t5(t5_ids)[0]  # (p, m, 96): every step sees all captions
        pooled = clip(clip_ids).pooler_output  # (p, 64)
        noun_loss = squared_error(noun_head(hidden), noun)[is_noun].mean()
        pooled_loss = squared_error(pooled_head(pooled), scene).mean()
        mean_loss = squared_error(mean_head(hidden.mean(1)), scene).mean()
        # Flux reads the tokens and the pooled vector, so these two count in full.
        return noun_loss + pooled_loss + 0.3 * mean_loss

    modules = nn.ModuleList([t5, clip, noun_head, mean_head, pooled_head])
    fit("text", modules, loss_fn, cfg, steps=600, lr=2e-3)
    modules.eval().requires_grad_(False)
    return clip, t5, Text(t5(t5_ids)[0], clip(clip_ids).pooler_output)


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).square().sum(-1)


def meanings() -> tuple[Tensor, Tensor, Tensor]:
    """What captions mean, as frequencies over 200 layouts of each.

    scene (p, 40): how often each cell is empty or has each shape, and the same for colors.
    noun (p, m, 17): for the token of a noun, how often its shape is in each cell (4), its color or none (5), its shape
    (4), and the count (4).
    is_noun (p, m): which tokens are nouns.
    """
    rng = default_rng((0, 2))
    scene = torch.zeros(len(PROMPTS), 2, 4, 5)  # (p, shape or color, cell, empty or which)
    noun = torch.zeros(len(PROMPTS), TEXT_LENGTH, 17)
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


def fit_flux(cfg: RecipeFlags, latents: TensorDict, table: Text) -> tuple[Flux, Flux]:
    """Flux on right captions, and the base: the same after a light finish on captions that are often wrong.

    The finish moves the weights by 3%, so alignment has little to undo.
    """
    torch.manual_seed(0)
    clean = Flux(TINY)
    init_weights(clean)  # adaLN-zero, as DiT
    loss_fn = partial(flow_loss, clean, latents, table, TEACH, 0.0)
    fit("clean", clean, loss_fn, cfg, steps=3500, lr=2e-3, average=0.998)

    base = copy.deepcopy(clean)
    weights = EVEN | dict(single=8)  # never wrong: keeps objects crisp while habits change
    loss_fn = partial(flow_loss, base, latents, table, weights, 0.5)
    fit("finish", base, loss_fn, cfg, steps=450, lr=1e-4)
    return clean, base


def flow_loss(
    flux: Flux,
    latents: TensorDict,
    table: Text,
    weights: dict[str, float],
    distorted: float,
    rng: Generator,
    step: int,
) -> Tensor:
    """Flow matching on scenes whose caption is wrong in a detail with probability `distorted`.

    The squared error of the velocity x_1 - x_0 at random noise levels.
    """
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
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    x = torch.lerp(x0, x1, sigma[:, None, None])
    velocity = caption_velocity(flux, table, numbers_of(captions))
    return F.mse_loss(velocity(x, sigma), x1 - x0)


def caption_velocity(flux: Flux, table: Text, caption: Tensor) -> Velocity:
    """The model's velocity for prompts by number, (n,)."""
    text = Text(table.txt[caption], table.vec[caption])
    return velocity_of(flux, text, GRID, GRID)
