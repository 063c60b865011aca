"""The tiny reward of the shapes world: a CLIP that scores how well a picture fits a prompt.

An image has a truth for every prompt of the world, from the layout it was rendered with or from what the judge
sees in it, so one image teaches 236 scores. Three things are added to that: an auxiliary head that must read each
cell, images of the base model itself, and adversarial training, which turns the gradient in the pixels into something
one would call a change of the scene.

Legend: b images, p prompts of the world (236).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from scorers.clip import features
from scorers.common import preprocess
from shapes.models import SCORE_SCALE
from shapes.world import COLORS, SHAPES, Object, Prompt, all_prompts, distort, is_right, scenes

OFFSET = 2.5  # a reported score above it says "right"
SHARP = 2.0  # of the logistic losses, per unit of reported score


# ---------------------------------------------------------------------------------------- truth

PROMPTS = all_prompts()
NUMBER = {prompt: i for i, prompt in enumerate(PROMPTS)}
_BY_SHAPES: dict[tuple[str, ...], list[int]] = {}
for _i, _p in enumerate(PROMPTS):
    _BY_SHAPES.setdefault(tuple(sorted(_p.shapes * _p.count)), []).append(_i)


def truth(objects: Sequence[Object]) -> Tensor:
    """Which prompts a picture with these objects fits, by the judge's rules: bool (p,)."""
    fits = torch.zeros(len(PROMPTS), dtype=torch.bool)
    for i in _BY_SHAPES.get(tuple(sorted(o.shape for o in objects)), ()):
        fits[i] = is_right(PROMPTS[i], list(objects))
    return fits


def objects_of(shape: np.ndarray, color: np.ndarray) -> list[Object]:
    """What is in a rendered scene, from its layout: (4,) shapes and (4,) colors, -1 where empty."""
    names = list(COLORS)
    return [
        Object(SHAPES[s], names[c], x=16 + 32 * (cell % 2), y=16 + 32 * (cell // 2))
        for cell, (s, c) in enumerate(zip(shape, color, strict=True))
        if s >= 0
    ]


# ------------------------------------------------------------------------------------- training


def scores(model: CLIPModel, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Reported scores of images (b, 3, 64, 64) for text features (p, c): (b, p), and pooled features (b, c)."""
    pooled = model.vision_model(pixel_values=preprocess(images, 64)).pooler_output
    image = F.normalize(model.visual_projection(pooled), dim=-1)
    return SCORE_SCALE * image @ text.T, pooled


def dense_loss(score: Tensor, fits: Tensor) -> Tensor:
    """Every fitting prompt must beat all that do not fit, and scores must mean the same for every prompt.

    score, fits: (b, p). The first is a softmax over prompts, a term a fitting one; the second is logistic around
    OFFSET, where the mean over the other prompts, most of them easy, counts four times.
    """
    z = SHARP * score
    others = z.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)
    contrast = F.softplus(others - z)[fits].mean()
    z = z - SHARP * OFFSET
    calibrated = F.softplus(-z)[fits].mean() + F.softplus(z)[~fits].mean() * 4
    return contrast + calibrated


def attack(model: CLIPModel, images: Tensor, text: Tensor, caption: Tensor, right: Tensor, radius: float) -> Tensor:
    """Images moved by 0.3 to 1 times radius (L2) along the gradient that makes the score of their caption wrong.

    The gradient is taken at a random point 0.3 radius away; half of the moves are smoothed with a 7x7 box, as what a
    decoder can change is smooth. The result is clipped to [0, 1].
    """
    delta = torch.randn_like(images)
    delta = (delta * (0.3 * radius / delta.flatten(1).norm(dim=1))[:, None, None, None]).requires_grad_()
    score = scores(model, images + delta, text)[0].gather(1, caption[:, None])[:, 0]
    (grad,) = torch.autograd.grad(torch.where(right, -score, score).sum(), delta)
    smooth = F.avg_pool2d(grad, 7, stride=1, padding=3)
    grad = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, smooth, grad)
    length = radius * torch.empty(len(images)).uniform_(0.3, 1)
    step = grad * (length / grad.flatten(1).norm(dim=1).clamp(min=1e-12))[:, None, None, None]
    return (images + step).clamp(0, 1)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts of up to 3 pixels (edges repeated) and Gaussian noise, on all images: never a defect."""
    dy, dx = rng.integers(7, size=2)
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[..., dy : dy + 64, dx : dx + 64]
    return images + 0.04 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def rendered(captions: Sequence[Prompt], rng: np.random.Generator) -> dict[str, Tensor]:
    """Scenes for captions, right or wrong in a detail, and for one in eight a scene of another caption."""
    seen = []
    for p in captions:
        u = rng.random()
        seen.append(distort(p, rng) if u < 0.45 else PROMPTS[rng.integers(len(PROMPTS))] if u < 0.57 else p)
    images, shape, color = scenes(seen, rng)
    fits = torch.stack([truth(objects_of(s, c)) for s, c in zip(shape, color, strict=True)])
    caption = torch.tensor([NUMBER[p] for p in captions])
    layout = torch.from_numpy(np.stack([shape, color], 1))
    return dict(images=images, fits=fits, caption=caption, layout=layout)


def reward_loss(
    modules: nn.ModuleDict, tokens: Tensor, batch: dict[str, Tensor], radius: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The loss on one batch of labelled images, attacked. `layout` is -2 where unknown, but not for all images."""
    model, caption, fits = modules["clip"], batch["caption"], batch["fits"]
    text = features(model.get_text_features(input_ids=tokens))
    images = augment(batch["images"], rng)
    right = fits.gather(1, caption[:, None])[:, 0]
    if radius > 0:
        images = attack(model, images, text.detach(), caption, right, radius)
    score, pooled = scores(model, images, text)
    known = batch["layout"][:, 0, 0] > -2
    cells = modules["cells"](pooled).view(-1, 5, 2, 4)  # scores of empty and of four shapes or colors, a cell
    read = F.cross_entropy(cells[known], batch["layout"][known] + 1)
    loss = dense_loss(score, fits) + 2 * read
    own = score.detach().gather(1, caption[:, None])[:, 0]
    error = ((own > OFFSET) != right).float().mean()
    return dict(loss=loss, read=read.detach(), right=own[right].mean(), wrong=own[~right].mean(), error=error)
