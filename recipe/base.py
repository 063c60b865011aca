"""The base model of the shapes world: an autoencoder, text encoders that know what captions mean, and a tiny Flux.

The text encoders are trained alone and then frozen, as FLUX's are, so a caption's embeddings are a row of a table.
Flux first learns on right captions (`clean`) and then briefly on captions that are often wrong in a detail (`finish`):
it knows what to draw, and does not always do so. Trained on wrong captions from the start it would know less: colors
blend, and the relations of two shapes are never learned.

Each stage puts a network into the pipeline: of the same sizes, but with new weights.

Legend: p prompts of the world (236), n latents or images, m text tokens.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from families.common import pack, padded_ids
from families.flux1 import Text
from formats.folders import Pipeline
from model import Flux, init_weights
from recipe.fit import RecipeFlags, TensorDict, fit
from recipe.lessons import CAPTIONS, EVEN, TEACH, distort, numbers_of, random_prompts
from sample import encode, velocity_of
from shapes.world import COLOR_NAMES, PROMPTS, SHAPES, random_layouts, render, scenes

SCENES = {  # for each prompt of a task; attr has 144 prompts
    "single": 250,
    "two": 300,
    "count": 300,
    "color": 250,
    "position": 250,
    "attr": 90,
}


def fit_vae(cfg: RecipeFlags, pipe: Pipeline) -> None:
    torch.manual_seed(0)  # of the initial weights; each step of training sets a seed of its own
    config = AutoencoderKL.load_config(pipe.location.folder / "vae")
    vae = AutoencoderKL.from_config(config)

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
    counts = [cfg.at_scale(SCENES[prompt.task]) for prompt in PROMPTS]
    numbers = torch.arange(len(PROMPTS)).repeat_interleave(torch.tensor(counts))
    means = []
    for batch in numbers.split(200):  # all at once would not fit into memory
        images, _ = scenes([PROMPTS[i] for i in batch], rng)
        posterior = pipe.vae.encode(images * 2 - 1).latent_dist
        means.append(posterior.mean)  # no noise: the base adds its own
    z = torch.cat(means)  # (n, 8, 8, 8)
    shift = z.mean()
    scale = 1 / z.std()
    pipe.vae.register_to_config(shift_factor=shift.item(), scaling_factor=scale.item())
    return dict(x=pack((z - shift) * scale), prompt=numbers)


# -------------------------------------------------------------------------------------------- text


def fit_text_encoders(cfg: RecipeFlags, pipe: Pipeline) -> None:
    """T5 and CLIP, trained so that linear heads can read a caption's meaning off their embeddings.

    The heads are thrown away. Trained together with Flux instead, the encoders never learned relations.
    """
    torch.manual_seed(0)
    clip, t5 = pipe.encoders
    t5 = T5EncoderModel(t5.config)
    clip = CLIPTextModel(clip.config)
    # New ones, as random as their libraries make them.
    pipe.encoders = [clip, t5]
    noun_head = nn.Linear(96, 17)  # of T5's token of a noun: see `meanings`
    mean_head = nn.Linear(96, 40)  # of the mean over T5's tokens
    pooled_head = nn.Linear(64, 40)  # of CLIP's embedding
    length = pipe.text_length
    t5_ids, _ = padded_ids(pipe.tokenizers[1], CAPTIONS, length)
    clip_ids, _ = padded_ids(pipe.tokenizers[0], CAPTIONS, length)
    scene, noun = meanings(length)
    is_noun = noun.any(-1)  # (p, m)

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


def meanings(length: int) -> tuple[Tensor, Tensor]:
    """What captions mean, as frequencies over 200 layouts of each.

    scene (p, 40): how often each cell is empty or has each shape, and the same for colors.
    noun (p, m, 17): for the token of a noun, how often its shape is in each cell (4), its color or none (5), its shape
    (4), and the count (4). It is 0 for all other tokens.
    """
    rng = default_rng((0, 2))
    scene = torch.zeros(len(PROMPTS), 2, 4, 5)  # (p, shape or color, cell, empty or which)
    noun = torch.zeros(len(PROMPTS), length, 17)
    for i, prompt in enumerate(PROMPTS):
        layouts = random_layouts([prompt] * 200, rng)
        cells = F.one_hot(torch.from_numpy(layouts) + 1, 5)  # index 0 is empty
        scene[i] = cells.float().mean(0)
        words = enumerate(prompt.text.split())  # each is a token
        tokens = [j for j, word in words if word.startswith(SHAPES)]
        for k, j in enumerate(tokens):  # in the order of the prompt's shapes
            shape = SHAPES.index(prompt.shapes[k])
            color = COLOR_NAMES.index(prompt.colors[k]) + 1 if prompt.colors else 0
            noun[i, j, :4] = scene[i, 0, :, shape + 1]
            noun[i, j, [4 + color, 9 + shape, 12 + prompt.count]] = 1
    return scene.flatten(1), noun


# -------------------------------------------------------------------------------------------- flux


def fit_flux(cfg: RecipeFlags, pipe: Pipeline, latents: TensorDict) -> Flux:
    """The base, and what it was before its finish, which is returned."""
    table = encode(pipe, CAPTIONS)

    def flow_loss(flux: Flux, weights: dict, distorted: float) -> Callable:
        """Flow matching on scenes whose caption is wrong in a detail with probability `distorted`."""

        def loss_fn(rng: Generator, step: int) -> Tensor:
            captions = random_prompts(128, rng, weights)
            scene_prompts = []  # the scene is distorted, not the caption, so that the captions keep their weights
            for prompt in captions:
                if rng.random() < distorted:
                    prompt = distort(prompt, rng)
                scene_prompts.append(prompt)
            rows = []
            for number in numbers_of(scene_prompts):
                of_prompt = torch.nonzero(latents["prompt"] == number)
                rows.append(rng.choice(of_prompt[:, 0]))
            x0 = latents["x"][rows]  # the image; x_1 is the noise, as in leaps.py
            x1 = torch.randn_like(x0)
            sigma = torch.randn(len(x0)).sigmoid()  # logit-normal, as in SD3
            shift = pipe.schedule["shift"]  # in training as in sampling
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            x = torch.lerp(x0, x1, sigma[:, None, None])
            caption = numbers_of(captions)
            text = Text(table.txt[caption], table.vec[caption])
            velocity = velocity_of(flux, text, 4, 4)  # rows and columns of image tokens
            return F.mse_loss(velocity(x, sigma), x1 - x0)

        return loss_fn

    torch.manual_seed(0)
    clean = Flux(pipe.flux.config)
    init_weights(clean)  # adaLN-zero, as DiT
    loss_fn = flow_loss(clean, TEACH, distorted=0.0)
    fit("clean", clean, loss_fn, cfg, steps=3500, lr=2e-3, average=0.998)
    # A light finish moves the weights by 3%, so alignment has little to undo.
    pipe.flux = copy.deepcopy(clean)
    weights = EVEN | dict(single=8)  # never wrong: keeps objects crisp while habits change
    loss_fn = flow_loss(pipe.flux, weights, distorted=0.5)
    fit("finish", pipe.flux, loss_fn, cfg, steps=450, lr=1e-4)
    return clean
