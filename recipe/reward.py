"""The losses of the tiny reward, a CLIP that scores how well an image fits a prompt.

An image has a label for every prompt of the world, from the layout that it was rendered with or from the judge, so one
image trains 236 scores. Knowing right from wrong is not enough, because alignment follows the gradient to images that
the reward never saw. Hence three more losses: a head must read each cell off the features; the score must rise along a
fade that mends the scene; and images are attacked, in their pixels and, through the decoder, in their latents.

Legend: b images, p prompts of the world (236), c features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPModel

from recipe.fit import TensorDict
from recipe.lessons import UNKNOWN
from scorers.common import normalize

SCORE_SCALE = 10.0  # logit_scale.exp() of the reward: reported scores are 10 cosines
# In units of the reported score, which is 10 cosines: from -10 to 10.
OFFSET = 2.5  # a score above it says "right"
SHARPNESS = 2.0  # logits per unit of score, in the logistic losses
SLOPE = 1.5  # least change of a score along a whole fade of one edit


def scores(model: CLIPModel, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of images (b, 3, 64, 64) for text features (p, c): (b, p). Second, the pooled image features (b, c)."""
    pooled = model.vision_model(pixel_values=normalize(images)).pooler_output
    image = F.normalize(model.visual_projection(pooled), dim=-1)  # text features come normalised
    return SCORE_SCALE * image @ text.T, pooled


def of_caption(table: Tensor, caption: Tensor) -> Tensor:
    """Each image's entry of a table (b, p) for its own caption (b,): (b,)."""
    return table.gather(1, caption[:, None])[:, 0]


def dense_loss(score: Tensor, fits: Tensor) -> Tensor:
    """Loss of scores (b, p) given labels (b, p): a fitting prompt must beat all others, and OFFSET must separate them.

    `contrast` is a softmax over the prompts, a term for each fitting prompt. It only compares prompts of one image, so
    `calibration`, a logistic loss around OFFSET, makes scores of different images comparable. The other prompts count
    by their log-sum-exp: an image with one object too many fits no prompt and nearly fits one, which their mean would
    hide.
    """
    logits = SHARPNESS * score
    threshold = SHARPNESS * OFFSET
    others_logit = logits.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)  # (b, 1)
    contrast = F.softplus(others_logit - logits)[fits].mean()
    fitting_term = F.softplus(threshold - logits)[fits].mean()
    others_term = F.softplus(others_logit - threshold).mean()
    calibration = fitting_term + others_term
    return contrast + calibration


def attacked_loss(
    model: CLIPModel, cells: nn.Linear, text: Tensor, batch: TensorDict, radius: float, rng: Generator
) -> Tensor:
    """The loss on a batch of labelled images (see training_scenes) after augmentation and attack; radius 0: no attack.

    `cells` is a head that reads each cell off the features. `layout` may be UNKNOWN, but not for all images.
    """
    fits, layout = batch["fits"], batch["layout"]

    def error(images: Tensor) -> Tensor:
        """How wrong the score of an image's own caption is, (b,)."""
        score, _ = scores(model, images, text.detach())
        caption_score = of_caption(score, batch["caption"])
        return torch.where(of_caption(fits, batch["caption"]), -caption_score, caption_score)

    images = augment(batch["images"], rng)
    if radius > 0:
        images = attack(error, images, radius)  # the labels stay: see RADIUS
    score, pooled = scores(model, images, text)

    # Reading each cell off the features forces the image tower to see where things are.
    has_layout = layout[:, 0, 0] != UNKNOWN
    logits = cells(pooled).view(-1, 5, 2, 4)  # of empty and four shapes, or colors, for each cell
    read_loss = F.cross_entropy(logits[has_layout], layout[has_layout] + 1)
    return dense_loss(score, fits) + 2 * read_loss  # at weight 0.5 it did not: see recipe/README.md


def augment(images: Tensor, rng: Generator) -> Tensor:
    """Shifts by up to 3 pixels (edges repeated) and Gaussian noise of up to 0.04.

    On right and wrong images alike, so that the reward learns to see no defect in them.
    """
    dy, dx = rng.integers(7, size=2)
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")
    images = images[..., dy : dy + 64, dx : dx + 64]  # one shift for the whole batch, which is cheaper
    noise_level = 0.04 * torch.rand(len(images), 1, 1, 1)
    return images + noise_level * torch.randn_like(images)


def attack(error: Callable[[Tensor], Tensor], images: Tensor, radius: float) -> Tensor:
    """Images moved by 0.3 to 1 times the radius (L2) in the direction in which error(images) -> (b,) rises.

    Clipped to [0, 1].
    """
    # A random start, as in PGD: at the image itself the reward could learn to hide its gradient.
    noise = torch.randn_like(images)
    grad = gradient(error, images + noise * (0.3 * radius / sample_norm(noise)))
    # Half of the moves are smooth, since what alignment changes goes through the decoder and is smooth.
    smooth_grad = F.avg_pool2d(grad, 7, stride=1, padding=3)
    is_smooth = torch.rand(len(images), 1, 1, 1) < 0.5
    grad = torch.where(is_smooth, smooth_grad, grad)
    length = radius * torch.empty(len(images), 1, 1, 1).uniform_(0.3, 1)
    step = grad * (length / sample_norm(grad))
    return (images + step).clamp(0, 1)  # a decoder's images are in this range, too


def walk(score: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """Latents x (b, n, c) after steps up the gradient of score(x) -> (b,): the way to the reward's hacks.

    A step is 0.2 to 1 long (L2), of random length, so that no spot of the way stays unseen.
    """
    for _ in range(steps):
        grad = gradient(score, x)
        length = torch.empty(len(x), 1, 1).uniform_(0.2, 1.0)
        x = x + length * grad / sample_norm(grad)
    return x


def gradient(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of score(x) -> (b,), of each sample on its own."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(score(x).sum(), x)
    return grad


def sample_norm(x: Tensor) -> Tensor:
    """The L2 norm of each sample, for a division, with axes to broadcast over it: (b, ...) to (b, 1, ...)."""
    axes = tuple(range(1, x.ndim))
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True).clamp(min=1e-12)


def fade_loss(model: CLIPModel, text: Tensor, fade: TensorDict, rng: Generator) -> Tensor:
    """Along a fade (see lessons.fades) a score must change by SLOPE for each edit gained, and in its direction.

    The mean over all prompts with a gain, plus the mean over each fade's own caption, whose gradient alignment follows.
    """
    images = torch.cat([fade["start"], fade["end"]])
    score, _ = scores(model, augment(images, rng), text)
    start, end = score.chunk(2)  # (b, p) each
    gain, caption = fade["gain"], fade["caption"]
    change = (end - start) * gain.sign()
    # A soft hinge: more change than SLOPE is no error.
    missing_change = F.softplus(SHARPNESS * (SLOPE * gain.abs() - change))
    caption_gains = of_caption(gain, caption) != 0
    caption_loss = of_caption(missing_change, caption)[caption_gains].mean()
    return missing_change[gain != 0].mean() + caption_loss
