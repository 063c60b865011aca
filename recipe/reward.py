"""The reward of the shapes world, a tiny CLIP that scores how well an image fits a prompt.

An image has a label for every prompt of the world, from the layout that it was rendered with or from the judge, so one
image trains 236 scores. Knowing right from wrong is not enough, because alignment follows the gradient to images that
the reward never saw. Hence three more losses: a head must read each cell off the features; the score must rise along a
fade that mends the scene; and images are attacked, in their pixels and, through the decoder, in their latents: latents
of the base's images walk up the reward's gradient, and the judge labels at once what they have become.

Legend: b images, p prompts of the world (236), c features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from families.common import padded_ids
from families.flux1 import Text, sigmas
from formats.folders import Pipeline
from leaps import rollout
from model import Flux
from recipe.fit import RecipeFlags, TensorDict, fit, generator
from recipe.lessons import CAPTIONS, EVEN, UNKNOWN, fades, judge_labels, numbers_of, random_prompts, training_scenes
from rewards import WEIGHTS
from sample import decode, encode, velocity_of
from scorers.clip import features
from scorers.common import normalize
from shapes.world import SIZE

SCORE_SCALE = 10.0  # logit_scale.exp() of the reward: reported scores are 10 cosines
# In units of the reported score: from -10 to 10.
OFFSET = 2.5  # a score above it says "right"
SHARPNESS = 2.0  # logits per unit of score, in the logistic losses
SLOPE = 1.5  # least change of a score along a whole fade of one edit
RADIUS = 1.5  # L2 in pixels: a right image becomes wrong within 1.5 to 2, so attacks of 3 contradict their own labels
N_WALKERS = 480  # latents that walk
N_MOVED = 48  # walkers that a training step moves
RESTART = 0.1  # chance of such a walker to start anew, so that the reward sees the first steps of a walk as well


def label_images(cfg: RecipeFlags, pipe: Pipeline, clean: Flux, latents: TensorDict) -> list[TensorDict]:
    """Images with the judge's label for every prompt: decoded scenes, then samples before and after the finish.

    Each set: x (n, 16, 32), latents; images (n, 3, 64, 64) uint8; caption (n,); fits (n, p).
    """
    table = encode(pipe, CAPTIONS)

    def label(x: Tensor, caption: Tensor) -> TensorDict:
        images = torch.cat([decode(pipe, batch, SIZE, SIZE) for batch in x.split(100)])
        return dict(
            x=x,
            images=images.mul(255).round().byte(),  # a quarter of the memory
            caption=caption,
            fits=judge_labels(images),
        )

    rows = generator("scenes").choice(len(latents["x"]), cfg.at_scale(2500))
    labels = [label(latents["x"][rows], latents["prompt"][rows])]
    # In few Euler steps and in many, because images of few steps have more defects.
    for name, flux, steps, n in (
        ("clean", clean, 5, 2000),
        ("clean", clean, 25, 1000),
        ("finish", pipe.flux, 5, 2500),
        ("finish", pipe.flux, 12, 4000),  # the preset's steps: alignment starts from these samples
    ):
        rng = generator(f"{name}-{steps}")
        caption = numbers_of(random_prompts(cfg.at_scale(n), rng, EVEN))
        torch.manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(len(caption), 16, 32)  # image tokens of 32 channels
        levels = sigmas(pipe.schedule, steps, 16)
        samples = []
        for numbers, x1 in zip(caption.split(250), noise.split(250)):
            text = Text(table.txt[numbers], table.vec[numbers])
            velocity = velocity_of(flux, text, 4, 4)  # rows and columns of image tokens
            samples.append(rollout(velocity, x1, levels).x[-1])
        labels.append(label(torch.cat(samples), caption))
    return labels


def concatenate(batches: list[TensorDict]) -> TensorDict:
    """The rows of all batches, which have the same keys."""
    result = {}
    for key in batches[0]:
        result[key] = torch.cat([batch[key] for batch in batches])
    return result


# ---------------------------------------------------------------------------------------- training


def fit_reward(cfg: RecipeFlags, pipe: Pipeline, labels: list[TensorDict]) -> CLIPModel:
    """The reward, on rendered scenes (`read`), and then on labelled images, fades and walkers as well (`reward`)."""
    ids, _ = padded_ids(pipe.clip_tokenizer, CAPTIONS, pipe.text_length)
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
        strength = min(1, max(0, 2 * progress - 0.8))
        text = features(model.get_text_features(input_ids=ids))
        return attacked_loss(model, cells, text, strength * RADIUS, rng, **training_scenes(96, rng))

    fit("read", modules, read_loss, cfg, steps=1500, lr=1e-3)

    data = concatenate(labels)
    starts = concatenate(labels[1:])  # from the model's samples, where alignment starts, too
    rows = default_rng((0, 3)).integers(len(starts["x"]), size=N_WALKERS)
    walkers = dict(x=starts["x"][rows], caption=starts["caption"][rows])

    def reward_loss(rng: Generator, step: int) -> Tensor:
        rows = rng.integers(len(data["x"]), size=32)
        labelled = dict(
            images=data["images"][rows] / 255,
            fits=data["fits"][rows],
            caption=data["caption"][rows],
            layout=torch.full((32, 2, 4), UNKNOWN),  # nobody knows what a model really drew
        )
        rendered = training_scenes(32, rng)  # they alone teach the head to read cells
        text = features(model.get_text_features(input_ids=ids))
        batch = concatenate([rendered, labelled])
        loss = attacked_loss(model, cells, text, RADIUS, rng, **batch)
        fading_loss = fade_loss(model, text, rng, **fades(24, rng))

        def walker_score(x: Tensor, caption: Tensor) -> Tensor:
            """The walk follows the current reward without training it."""
            score, _ = scores(model, decode(pipe, x, SIZE, SIZE), text)
            return of_caption(score, caption)

        # The images at the end of the walk train the reward, with the judge's labels for all prompts: the caption that
        # a walker follows plays no part in the loss.
        x = move_walkers(walkers, starts, walker_score, rng)
        images = decode(pipe, x, SIZE, SIZE)
        score, _ = scores(model, augment(images, rng), text)  # not attacked: the walk was the attack
        return loss + dense_loss(score, judge_labels(images)) + fading_loss

    fit("reward", modules, reward_loss, cfg, steps=1500, lr=7e-4)
    return model


def move_walkers(walkers: TensorDict, starts: TensorDict, score: Callable, rng: Generator) -> Tensor:
    """Move some of the walkers on, in place, up score(x, caption) -> (b,), and return these latents.

    One step or two, as long walks come from many calls, each with a newer reward. A step is 0.2 to 1 long (L2), of
    random length, so that no spot of the way stays unseen.
    """
    moving = rng.choice(len(walkers["x"]), N_MOVED, replace=False)
    restarts = moving[rng.random(N_MOVED) < RESTART]
    rows = rng.integers(len(starts["x"]), size=len(restarts))
    for key in walkers:
        walkers[key][restarts] = starts[key][rows]

    x = walkers["x"][moving]
    for _ in range(rng.integers(1, 3)):
        grad = gradient(score, x, walkers["caption"][moving])
        length = torch.empty(len(x), 1, 1).uniform_(0.2, 1.0)
        x = x + length * grad / sample_norm(grad)
    walkers["x"][moving] = x
    return x


# ------------------------------------------------------------------------------------------ losses


def scores(model: CLIPModel, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of images (b, 3, 64, 64) for text features (p, c): (b, p). Second, the pooled image features (b, c)."""
    pooled = model.vision_model(normalize(images)).pooler_output
    image = model.visual_projection(pooled)
    image = F.normalize(image, dim=-1)  # text features come normalised
    return SCORE_SCALE * image @ text.T, pooled


def of_caption(table: Tensor, caption: Tensor) -> Tensor:
    """Each image's entry of a table (b, p) for its own caption (b,): (b,)."""
    return table.gather(1, caption[:, None])[:, 0]


def dense_loss(score: Tensor, fits: Tensor) -> Tensor:
    """Loss of scores (b, p) given labels (b, p): a fitting prompt must beat all others, and OFFSET must separate them.

    `contrast` is a softmax over the prompts, a term for each fitting prompt. It only compares prompts of one image, so
    a logistic loss around OFFSET makes scores of different images comparable. The other prompts count
    by their log-sum-exp: an image with one object too many fits no prompt and nearly fits one, which their mean would
    hide.
    """
    logits = SHARPNESS * score
    threshold = SHARPNESS * OFFSET
    others_logit = logits.masked_fill(fits, -torch.inf).logsumexp(-1, keepdim=True)  # (b, 1)
    contrast = F.softplus(others_logit - logits)[fits].mean()
    fitting_term = F.softplus(threshold - logits)[fits].mean()
    others_term = F.softplus(others_logit - threshold).mean()
    return contrast + (fitting_term + others_term)


def attacked_loss(
    model: CLIPModel,
    cells: nn.Linear,
    text: Tensor,
    radius: float,
    rng: Generator,
    images: Tensor,
    fits: Tensor,
    caption: Tensor,
    layout: Tensor,
) -> Tensor:
    """The loss on a batch of labelled images (see training_scenes) after augmentation and attack; radius 0: no attack.

    `cells` is a head that reads each cell off the features. `layout` may be UNKNOWN, but not for all images.
    """

    def error(images: Tensor) -> Tensor:
        """How wrong the score of an image's own caption is, (b,)."""
        score, _ = scores(model, images, text)
        score = of_caption(score, caption)
        return torch.where(of_caption(fits, caption), -score, score)

    images = augment(images, rng)
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
    return images + 0.04 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def attack(error: Callable, images: Tensor, radius: float) -> Tensor:
    """Images moved by 0.3 to 1 times the radius (L2) in the direction in which error(images) -> (b,) rises.

    Clipped to [0, 1].
    """
    # A random start, as in PGD: at the image itself the reward could learn to hide its gradient.
    noise = torch.randn_like(images)
    noise = noise * (0.3 * radius / sample_norm(noise))
    grad = gradient(error, images + noise)
    # Half of the moves are smooth, since what alignment changes goes through the decoder and is smooth.
    smooth_grad = F.avg_pool2d(grad, 7, stride=1, padding=3)
    is_smooth = torch.rand(len(images), 1, 1, 1) < 0.5
    grad = torch.where(is_smooth, smooth_grad, grad)
    length = torch.empty(len(images), 1, 1, 1).uniform_(0.3, 1)  # in radii
    step = grad * (radius * length / sample_norm(grad))
    return (images + step).clamp(0, 1)  # a decoder's images are in this range, too


def gradient(score: Callable, x: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient in x of score(x, ...) -> (b,), of each sample on its own."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(score(x, *inputs).sum(), x)[0]


def sample_norm(x: Tensor) -> Tensor:
    """The L2 norm of each sample, for a division, with axes to broadcast over it: (b, ...) to (b, 1, ...)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True).clamp(min=1e-12)


def fade_loss(
    model: CLIPModel,
    text: Tensor,
    rng: Generator,
    images: Tensor,
    gain: Tensor,
    caption: Tensor,
) -> Tensor:
    """Along a fade (see lessons.fades) a score must change by SLOPE for each edit gained, and in its direction.

    The mean over all prompts with a gain, plus the mean over each fade's own caption, whose gradient alignment follows.
    """
    score, _ = scores(model, augment(images, rng), text)
    start, end = score.chunk(2)  # (b, p) each
    change = (end - start) * gain.sign()
    # A soft hinge: more change than SLOPE is no error.
    missing_change = F.softplus(SHARPNESS * (SLOPE * gain.abs() - change))
    caption_gains = of_caption(gain, caption) != 0
    caption_loss = of_caption(missing_change, caption)[caption_gains].mean()
    return missing_change[gain != 0].mean() + caption_loss
