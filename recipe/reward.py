"""The tiny reward of the shapes world: a CLIP that scores how well a picture fits a prompt.

An image has a truth for every prompt of the world, from the layout it was rendered with or from what the judge
sees in it, so one image teaches 236 scores. Knowing right from wrong is not enough, for alignment follows the gradient
to where no picture was before. So an auxiliary head must read each cell; the score must rise along a fade by an edit
that mends the scene; and training is adversarial, in the pixels and, through the decoder, in the latents.

Legend: b images, p prompts of the world (236).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from recipe.lessons import UNKNOWN
from recipe.models import SCORE_SCALE
from scorers.common import preprocess

OFFSET = 2.5  # a reported score above it says "right"
SHARP = 2.0  # of the logistic losses, per unit of reported score
SLOPE = 1.5  # least change of a reported score over a fade by one edit


def scores(model: CLIPModel, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Reported scores of images (b, 3, 64, 64) for text features (p, c): (b, p), and pooled features (b, c)."""
    pooled = model.vision_model(pixel_values=preprocess(images, 64)).pooler_output
    image = F.normalize(model.visual_projection(pooled), dim=-1)
    return SCORE_SCALE * image @ text.T, pooled


def dense_loss(score: Tensor, fits: Tensor) -> Tensor:
    """Every fitting prompt must beat all that do not fit, and scores must mean the same for every prompt.

    score, fits: (b, p). The first is a softmax over prompts, a term a fitting one. The second is logistic around
    OFFSET, for fitting prompts one by one and for the others by their log-sum-exp: a picture with an object too many
    fits none of them and is nearly right for one, which a mean over them would hide.
    """
    z = SHARP * score
    others = z.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)
    contrast = F.softplus(others - z)[fits].mean()
    calibrated = F.softplus(SHARP * OFFSET - z)[fits].mean() + F.softplus(others - SHARP * OFFSET).mean()
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


def walk(score: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """Latents x (b, n, c) after steps of 0.2 to 1 each (L2) up the gradient of score(x) -> (b,): where hacks are."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(score(x).sum(), x)
        length = torch.empty(len(x), 1, 1).uniform_(0.2, 1.0)
        x = x + length * grad / grad.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)
    return x.detach()


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts of up to 3 pixels (edges repeated) and Gaussian noise, on all images: never a defect."""
    dy, dx = rng.integers(7, size=2)
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[..., dy : dy + 64, dx : dx + 64]
    return images + 0.04 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def attacked_loss(
    modules: nn.ModuleDict, text: Tensor, batch: dict[str, Tensor], radius: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The loss on one batch of labelled images, attacked. `layout` may be UNKNOWN, but not for all images."""
    model, caption, fits = modules["clip"], batch["caption"], batch["fits"]
    images = augment(batch["images"], rng)
    right = fits.gather(1, caption[:, None])[:, 0]
    if radius > 0:
        images = attack(model, images, text.detach(), caption, right, radius)
    score, pooled = scores(model, images, text)
    known = batch["layout"][:, 0, 0] != UNKNOWN
    cells = modules["cells"](pooled).view(-1, 5, 2, 4)  # scores of empty and of four shapes or colors, a cell
    read = F.cross_entropy(cells[known], batch["layout"][known] + 1)
    loss = dense_loss(score, fits) + 2 * read
    own = score.detach().gather(1, caption[:, None])[:, 0]
    error = ((own > OFFSET) != right).float().mean()
    return dict(loss=loss, read=read.detach(), right=own[right].mean(), wrong=own[~right].mean(), error=error)


def fade_loss(model: CLIPModel, text: Tensor, fade: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """A score must grow by SLOPE for an edit less to make, in proportion on the way (lessons.fades).

    Over all prompts that are near, and once more over each fade's own, which the gradient will be asked for.
    """
    images = augment(torch.cat([fade["start"], fade["end"]]), rng)
    start, end = scores(model, images, text)[0].chunk(2)
    gain, own = fade["gain"], fade["caption"][:, None]
    grown = (end - start) * gain.sign()
    missed = F.softplus(SHARP * (SLOPE * gain.abs() - grown))
    near, mine = fade["near"] & (gain != 0), gain.gather(1, own) != 0
    loss = missed[near].mean() + missed.gather(1, own)[mine].mean()
    return dict(loss=loss, order=(grown.gather(1, own)[mine] > 0).float().mean())
