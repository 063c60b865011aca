"""How the tiny reward is taught: what words mean, what the models of the world really draw, and its own hacks.

A reward is hacked where it has seen nothing. So while it is taught, pictures walk up its gradient: latents of the
base's images, moved step by step to where the reward likes them more. The judge says at once what they have become.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from config import Config as TrainConfig
from infra.files import replacing
from model import Flux
from recipe.base import decoder, generate, latents, pictures, stage_clean, stage_finish, tokens
from recipe.fit import EVEN, TEACH, Config, draw_prompts, fit
from recipe.lessons import UNKNOWN, fades, rendered, truth
from recipe.models import VISION_WIDTH, make_reward
from recipe.reward import attacked_loss, augment, dense_loss, fade_loss, scores, walk
from scorers.clip import features
from shapes.judge import accuracy, objects_in
from shapes.world import NUMBER, PROMPTS, Prompt

RADIUS = 1.5  # of attacks, in pixel space: far enough to be seen, and not so far that right images become wrong
STEPS = TrainConfig().rollout_steps  # of train.py's default
WALKERS, WALKED, FRESH = 480, 48, 0.1  # images that walk, how many a step, and how often one starts anew


def stage_read(cfg: Config) -> nn.ModuleDict:
    """The reward on rendered scenes, first plain and then attacked, by a radius that grows to RADIUS."""
    ids = tokens(cfg)[1]
    torch.manual_seed(cfg.seed)
    modules = nn.ModuleDict(dict(clip=make_reward(cfg.work / "tokenizer"), cells=nn.Linear(VISION_WIDTH, 40)))
    modules["clip"].logit_scale.requires_grad_(False)

    def loss_fn(rng, step):
        radius = RADIUS * min(1, max(0, 2 * step / cfg.some(1500) - 0.8))
        text = features(modules["clip"].get_text_features(input_ids=ids))
        return attacked_loss(modules, text, rendered(draw_prompts(96, rng, TEACH), rng), radius, rng)

    fit("read", modules, loss_fn, cfg, steps=1500, lr=1e-3)
    return modules


def labelled(cfg: Config, name: str, make: Callable[[np.random.Generator], tuple[list[Prompt], Tensor]]) -> dict:
    """Images with the judge's word on every prompt: x (n, 16, 32), images uint8, caption (n,), fits (n, p).

    `make(rng)` gives prompts and latents. The result is kept in the work folder.
    """
    done = cfg.work / f"{name}.labels.pt"
    if not done.exists():
        prompts, x = make(np.random.default_rng((cfg.seed, sum(map(ord, name)))))
        images, caption = pictures(cfg, x), torch.tensor([NUMBER[p] for p in prompts])
        fits = torch.stack([truth(objects) for objects in objects_in(images)])
        scores = accuracy(fits[range(len(x)), caption], prompts)
        print("labelled", name, len(x), *(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
        with replacing(done) as part:
            torch.save(dict(x=x, images=images.mul(255).round().byte(), caption=caption, fits=fits), part)
    return torch.load(done, weights_only=True)


def labels_of_model(cfg: Config, name: str, flux: Flux, steps: int, n: int) -> dict[str, Tensor]:
    """The model's samples in `steps` steps, labelled."""

    def make(rng):
        prompts = draw_prompts(cfg.some(n, least=64), rng, EVEN)
        caption = torch.tensor([NUMBER[p] for p in prompts])
        return prompts, generate(cfg, flux, caption, steps, seed=int(rng.integers(2**31)))

    return labelled(cfg, f"{name}-{steps}", make)


def stage_labels(cfg: Config) -> list[dict[str, Tensor]]:
    """Decoded scenes, and images of the base before and after it was finished."""

    def decoded(rng):
        data = latents(cfg)
        chosen = torch.from_numpy(rng.choice(len(data["x"]), cfg.some(2500, least=64)))
        return [PROMPTS[i] for i in data["prompt"][chosen]], data["x"][chosen]

    parts = [labelled(cfg, "scenes", decoded)]
    models = ((stage_clean, 5, 2000), (stage_clean, 25, 1000), (stage_finish, 5, 2500), (stage_finish, STEPS, 4000))
    for stage, steps, n in models:
        parts.append(labels_of_model(cfg, stage.__name__.removeprefix("stage_"), stage(cfg), steps, n))
    return parts


def walkers(cfg: Config, starts: dict[str, Tensor]) -> Callable[[Callable, np.random.Generator], tuple]:
    """A function that moves some of the walkers on and gives their images, captions (n,) and truths (n, p).

    They are in no checkpoint: a stage that was interrupted goes on with walkers that start anew.
    """
    decode = decoder(cfg)
    first = np.random.default_rng((cfg.seed, 3)).integers(len(starts["x"]), size=WALKERS)
    x, caption = starts["x"][first], starts["caption"][first]

    def move(scores_of: Callable[[Tensor], Tensor], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.from_numpy(rng.choice(WALKERS, WALKED, replace=False))
        fresh = chosen[torch.from_numpy(rng.random(WALKED) < FRESH)]
        start = rng.integers(len(starts["x"]), size=len(fresh))
        x[fresh], caption[fresh] = starts["x"][start], starts["caption"][start]
        own = caption[chosen, None]
        x[chosen] = walk(lambda x: scores_of(decode(x)).gather(1, own), x[chosen], steps=int(rng.integers(1, 3)))
        with torch.no_grad():
            images = decode(x[chosen])
        return images, own[:, 0], torch.stack([truth(objects) for objects in objects_in(images)])

    return move


def stage_reward(cfg: Config) -> nn.ModuleDict:
    """The reward on labelled and rendered images, attacked; on fades; and on walkers."""
    modules, parts, ids = stage_read(cfg), stage_labels(cfg), tokens(cfg)[1]
    labels = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    move = walkers(cfg, {k: torch.cat([part[k] for part in parts[1:]]) for k in ("x", "caption")})
    model = modules["clip"]

    def loss_fn(rng, step):
        i = torch.from_numpy(rng.integers(len(labels["caption"]), size=32))
        seen = dict(images=labels["images"][i] / 255, layout=torch.full((32, 2, 4), UNKNOWN))
        seen |= {k: labels[k][i] for k in ("caption", "fits")}
        made = rendered(draw_prompts(32, rng, TEACH), rng)
        text = features(model.get_text_features(input_ids=ids))
        parts = attacked_loss(modules, text, {k: torch.cat([made[k], seen[k]]) for k in made}, RADIUS, rng)
        fade = fade_loss(model, text, fades(draw_prompts(24, rng, TEACH), rng), rng)

        images, caption, fits = move(lambda images: scores(model, images, text.detach())[0], rng)
        score = scores(model, augment(images, rng), text)[0]
        walked = dense_loss(score, fits)
        parts["loss"] = parts["loss"] + walked + fade.pop("loss")
        right = fits.gather(1, caption[:, None])[:, 0]
        own = score.detach().gather(1, caption[:, None])[:, 0]
        of_walk = dict(walked=walked.detach(), still_right=right.float().mean())
        of_walk |= dict(walked_right=own[right].sum() / right.sum().clamp(min=1), walked_wrong=own[~right].mean())
        return parts | fade | of_walk

    fit("reward", modules, loss_fn, cfg, steps=1500, lr=7e-4)
    return modules
