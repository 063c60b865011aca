"""The base model of the shapes world: an autoencoder, text encoders that know what captions mean, and a tiny Flux.

The text encoders are trained alone and then frozen, as FLUX's are: the captions' embeddings are a table of 236 rows.
Flux learns to draw on right captions first (`clean`: what the base knows) and is finished on captions that are often
wrong in a detail (`finish`: it knows, but does not always obey). Trained on wrong captions from the start, it would
know less: colors blend, and relations of two shapes are never learned.

Legend: p prompts of the world (236), n latents or images.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AutoTokenizer

from infra.files import replacing
from infra.pictures import contact_sheet
from leaps import rollout
from model import Flux, init_weights
from recipe.fit import EVEN, OF_TASK, TEACH, Config, draw_prompts, fit
from recipe.models import TINY, make_text_encoders, make_tokenizers, make_vae, token_table
from sample import Text, pack, sigmas, unpack, velocity_of
from shapes.judge import accuracy, judge
from shapes.world import COLORS, NUMBER, PROMPTS, SHAPES, TASKS, distort, layout, render, scenes

SCHEDULE = dict(use_dynamic_shifting=False, shift=3.0)  # of the noise levels, in training and in sampling
GRID = 4  # tokens each way


# ------------------------------------------------------------------------------- vae and its latents


def stage_vae(cfg: Config) -> AutoencoderKL:
    vae = make_vae()

    def loss_fn(rng, step):
        shape = rng.integers(-1, len(SHAPES), (40, 4))  # fuller than prompts ask for: more to learn an image
        images = render(shape, rng.integers(len(COLORS), size=shape.shape), rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse, l1 = error.square().mean(), error.abs().mean()
        return dict(loss=mse + 0.5 * l1 + 3e-5 * kl, mse=mse / 4, kl=kl)

    fit("vae", nn.ModuleDict({"vae": vae}), loss_fn, cfg, steps=1700, lr=3e-3)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def latents(cfg: Config) -> dict[str, Tensor]:
    """Encoded scenes, so that training the base need not: x (n, 16, 32), and the prompt of each, (n,).

    Shifted and scaled to mean 0 and standard deviation 1, by the numbers that go into the VAE's config.
    """
    done = cfg.work / "latents.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    vae, rng = stage_vae(cfg), np.random.default_rng((cfg.seed, 1))
    each = dict(single=250, two=300, count=300, color=250, position=250, attr=90)  # scenes a prompt
    index = torch.tensor([NUMBER[p] for p in PROMPTS for _ in range(cfg.some(each[p.task]))])
    z = torch.cat(
        [vae.encode(scenes([PROMPTS[i] for i in part], rng)[0] * 2 - 1).latent_dist.mean for part in index.split(200)]
    )
    shift, scale = z.mean(), 1 / z.std()
    data = dict(x=pack((z - shift) * scale), prompt=index, shift_factor=shift, scaling_factor=scale)
    with replacing(done) as part:
        torch.save(data, part)
    print(f"latents: {len(z)} scenes, shift {shift.item():.4f}, scale {scale.item():.4f}", flush=True)
    return data


def decoder(cfg: Config) -> Callable[[Tensor], Tensor]:
    """Packed latents to images in [0, 1]; gradients pass."""
    data, vae = latents(cfg), stage_vae(cfg)

    def decode(x: Tensor) -> Tensor:
        z = unpack(x, GRID, GRID) / data["scaling_factor"] + data["shift_factor"]
        return (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    return decode


@torch.no_grad()
def pictures(cfg: Config, x: Tensor) -> Tensor:
    """Packed latents to images in [0, 1], in pieces."""
    decode = decoder(cfg)
    return torch.cat([decode(part) for part in x.split(100)])


# -------------------------------------------------------------------------------------------- text


def tokens(cfg: Config) -> tuple[Tensor, Tensor]:
    """Every prompt's T5 and CLIP ids; makes the tokenizers the first time."""
    if not (cfg.work / "tokenizer" / "vocab.json").exists():
        make_tokenizers(cfg.work)
    return token_table(cfg.work / "tokenizer_2"), token_table(cfg.work / "tokenizer")


def meanings(t5_ids: Tensor, names: list[str], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What captions mean, from 200 layouts of each.

    Of a scene (p, 40): how often each cell is empty or has each shape, and so for colors. Of a noun (p, tokens, 17):
    how often its shape is in each cell, the color asked for or none, its shape, the count; and where nouns are
    (p, tokens). `names` are the tokenizer's pieces by id.
    """
    scene = torch.zeros(len(PROMPTS), 2, 4, 5)
    noun, is_noun = torch.zeros(*t5_ids.shape, 17), torch.zeros(t5_ids.shape, dtype=torch.bool)
    for i, p in enumerate(PROMPTS):
        cells = torch.from_numpy(np.stack([np.stack(layout(p, rng)) for _ in range(200)])) + 1  # (200, 2, 4)
        scene[i] = F.one_hot(cells, 5).float().mean(0)
        words = [names[token].strip("\u2581") for token in t5_ids[i].tolist()]
        places = [
            j for j, word in enumerate(words) if {word, word.removesuffix("s"), word.removesuffix("es")} & set(SHAPES)
        ]
        for k, (j, shape) in enumerate(zip(places, p.shapes, strict=True)):
            color = list(COLORS).index(p.colors[k]) + 1 if p.colors else 0
            kinds = [F.one_hot(torch.tensor(a), n) for a, n in ((color, 5), (SHAPES.index(shape), 4), (p.count - 1, 4))]
            noun[i, j] = torch.cat([scene[i, 0, :, SHAPES.index(shape) + 1], *kinds])
            is_noun[i, j] = True
    return scene.flatten(1), noun, is_noun


def stage_text(cfg: Config) -> nn.ModuleDict:
    """T5 and CLIP text encoders, taught by linear heads that read a caption's meaning off them and are thrown away."""
    t5_ids, clip_ids = tokens(cfg)
    torch.manual_seed(cfg.seed)
    text = make_text_encoders(cfg.work)
    t5_width, clip_width = TINY.context_in_dim, TINY.vec_in_dim
    heads = nn.ModuleDict(
        dict(noun=nn.Linear(t5_width, 17), mean=nn.Linear(t5_width, 40), pooled=nn.Linear(clip_width, 40))
    )
    pieces = AutoTokenizer.from_pretrained(cfg.work / "tokenizer_2")
    names = pieces.convert_ids_to_tokens(range(len(pieces)))
    scene, noun, is_noun = meanings(t5_ids, names, np.random.default_rng((cfg.seed, 2)))

    def loss_fn(rng, step):
        hidden, pooled = text["t5"](t5_ids)[0], text["clip"](clip_ids).pooler_output
        of_noun = (heads["noun"](hidden) - noun)[is_noun].square().sum(-1).mean()
        of_pooled = (heads["pooled"](pooled) - scene).square().sum(-1).mean()
        of_mean = (heads["mean"](hidden.mean(1)) - scene).square().sum(-1).mean()
        return dict(loss=of_noun + of_pooled + 0.3 * of_mean, noun=of_noun, pooled=of_pooled, mean=of_mean)

    fit("text", nn.ModuleDict(dict(text=text, heads=heads)), loss_fn, cfg, steps=600, lr=2e-3)
    return text.eval().requires_grad_(False)


@torch.no_grad()
def captions(cfg: Config) -> Text:
    """What Flux is given for every prompt of the world: (p, tokens, 96) and (p, 64)."""
    done = cfg.work / "captions.pt"
    if not done.exists():
        (t5_ids, clip_ids), text = tokens(cfg), stage_text(cfg)
        with replacing(done) as part:
            torch.save([text["t5"](t5_ids)[0], text["clip"](clip_ids).pooler_output], part)
    return Text(*torch.load(done, weights_only=True))


# -------------------------------------------------------------------------------------------- flux


def velocity(flux: Flux, table: Text, caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's velocity for prompts by number."""
    return velocity_of(flux, Text(table.txt[caption], table.vec[caption]), GRID, GRID)


def times(n: int) -> Tensor:
    """Logit-normal noise levels (n,), shifted by 3."""
    t = torch.sigmoid(torch.randn(n))
    return 3 * t / (1 + 2 * t)


def flow_loss(v: Callable[[Tensor, Tensor], Tensor], x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
    """Flow matching: the squared error of the velocity x_1 - x_0 at random times."""
    t = times(len(x0))
    return dict(loss=F.mse_loss(v(torch.lerp(x0, x1, t[:, None, None]), t), x1 - x0))


def fit_captions(
    cfg: Config, name: str, flux: Flux, weights: dict[str, float], wrong: float, steps: int, lr: float, average: float
) -> None:
    """Flow matching on scenes whose caption is wrong in a detail with probability `wrong`."""
    data, table = latents(cfg), captions(cfg)
    rows = [torch.nonzero(data["prompt"] == i)[:, 0].numpy() for i in range(len(PROMPTS))]

    def loss_fn(rng, step):
        asked = draw_prompts(128, rng, weights)
        seen = [distort(p, rng) if rng.random() < wrong else p for p in asked]
        x0 = data["x"][[rng.choice(rows[NUMBER[p]]) for p in seen]]
        caption = torch.tensor([NUMBER[p] for p in asked])
        return flow_loss(velocity(flux, table, caption), x0, torch.randn_like(x0))

    if fit(name, flux, loss_fn, cfg, steps, lr, average):
        for levels in (5, 8, 25):
            show(cfg, name, flux, levels)


def stage_clean(cfg: Config) -> Flux:
    torch.manual_seed(cfg.seed)
    flux = Flux(TINY)
    init_weights(flux)
    fit_captions(cfg, "clean", flux, TEACH, wrong=0.0, steps=3500, lr=2e-3, average=0.998)
    return flux


def stage_finish(cfg: Config) -> Flux:
    flux = stage_clean(cfg)
    weights = EVEN | dict(single=8)  # never wrong: keeps what is drawn crisp while habits change
    fit_captions(cfg, "finish", flux, weights, wrong=0.5, steps=450, lr=1e-4, average=0.0)
    return flux


@torch.no_grad()
def generate(cfg: Config, flux: Flux, caption: Tensor, steps: int, seed: int) -> Tensor:
    """The model's own sample for each caption, (n, 16, 32)."""
    table, ends = captions(cfg), []
    noise = torch.randn(len(caption), GRID**2, TINY.in_channels, generator=torch.Generator().manual_seed(seed))
    for ids, x1 in zip(caption.split(250), noise.split(250), strict=True):
        ends.append(rollout(velocity(flux, table, ids), x1, sigmas(SCHEDULE, steps, GRID**2)).x[-1])
    return torch.cat(ends)


def show(cfg: Config, name: str, flux: Flux, steps: int) -> None:
    """Print the judge's accuracy, 100 images a task, and write a picture of some of them."""
    rng, each = np.random.default_rng(7), cfg.some(100, least=8)
    prompts = [OF_TASK[t][i] for t in TASKS for i in rng.integers(len(OF_TASK[t]), size=each)]
    images = pictures(cfg, generate(cfg, flux, torch.tensor([NUMBER[p] for p in prompts]), steps, seed=7))
    scores = accuracy(judge(images, prompts), prompts)
    print(f"{name}, {steps} steps:", *(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    sheet = cfg.work / f"{name}-{steps}.png"
    contact_sheet(images[:: each // 8], [p.text for p in prompts[:: each // 8]], sheet, columns=8)
