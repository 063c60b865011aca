"""The judge of the shapes world: rules that read pixels only, so there is no gradient to exploit.

The rules are meant to reject what a person would reject: an object of two colors or of a blend, a circle with corners,
a faint shadow of an object beside the right ones. The reward learned from the judge's labels (recipe/reward.py) but
only approximates them: where reward and judge disagree during alignment, the reward is being hacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from einops import rearrange
from scipy import ndimage
from torch import Tensor

from shapes.world import CELL, COLOR_NAMES, COLORS, RELATIONS, SHAPES, TASKS, Prompt, signed_distance

UNKNOWN = "?"  # a shape or color that the judge cannot name; no prompt contains it

# Contrast is the largest difference from the background in a channel, in [0, 1]. Objects are read at a high threshold.
# A person also sees fainter things, so a component at the low threshold without an object in it counts as unknown.
_SOLID_CONTRAST = 0.25  # of an object
_VISIBLE_CONTRAST = 0.12  # of anything else that can be seen
_MIN_OBJECT_AREA = 80  # pixels; a rendered cross has at least 190
_MIN_VISIBLE_AREA = 24  # pixels; a smaller speck does not count
_MIN_BACKGROUND = 0.7  # every channel of the background; rendered ones are 0.88 to 0.98
_MAX_SIDE = CELL  # pixels, of an object's box; rendered ones are 15 to 25
_MAX_ASPECT = 1.5  # longer side of the box over the shorter; rendered ones reach 1.1
_MAX_COLOR_ERROR = 0.2  # Euclidean distance in RGB; the renderer moves a channel by 0.04 at most
_MIN_COLOR_SHARE = 0.9  # of an object's pixels within that distance of one palette color
# Least IoU with the outline of the shape. 1,120 rendered objects have at least 0.92, 1.00, 0.88 and 0.87, in the order
# below; the slack is for the softer edges of a decoder.
_MIN_IOU = {"circle": 0.9, "square": 0.88, "triangle": 0.75, "cross": 0.8}
_MIN_IOU_LEAD = 0.06  # over the second best shape: halfway from a circle to a square there is no shape
_MIN_OFFSET = 8.0  # pixels between two objects' centres along the relation; neighbouring cells are 32 apart

# The box of a shape of radius 1: half its width, half its height, y of its centre (see signed_distance).
_BOXES = {
    "circle": (1.0, 1.0, 0.0),
    "square": (0.88, 0.88, 0.0),
    "triangle": (1.0, 0.925, -0.075),
    "cross": (1.0, 1.0, 0.0),
}


@dataclass(frozen=True)
class Object:
    """A connected component as the judge sees it; shape or color is UNKNOWN if it has no clear one."""

    shape: str
    color: str
    x: float  # pixels from the left, of the centre
    y: float  # pixels from the top


def judge_images(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Which images show what their prompts say: (n, 3, 64, 64) in [0, 1] to bool (n,)."""
    pairs = zip(prompts, objects_in(images), strict=True)
    return torch.tensor([fits_prompt(prompt, objects) for prompt, objects in pairs])


def objects_in(images: Tensor) -> list[list[Object]]:
    """The objects that the judge sees in each image, (n, 3, 64, 64) in [0, 1]."""
    arrays = rearrange(images.detach().float().cpu().clamp(0, 1), "n c h w -> n h w c").numpy()
    return [look(array) for array in arrays]


def fits_prompt(prompt: Prompt, objects: Sequence[Object]) -> bool:
    """The rule of the prompt's task: exactly the objects that the caption names, and nothing unknown beside them."""
    shapes = sorted(o.shape for o in objects)
    if shapes != sorted(prompt.shapes * prompt.count):
        return False
    if any(o.color == UNKNOWN for o in objects):
        return False
    if prompt.colors:
        return sorted((o.shape, o.color) for o in objects) == sorted(zip(prompt.shapes, prompt.colors))
    if prompt.relation:
        a, b = sorted(objects, key=lambda o: prompt.shapes.index(o.shape))
        rows, columns = RELATIONS[prompt.relation]
        return rows * (b.y - a.y) + columns * (b.x - a.x) > _MIN_OFFSET
    return True


def look(image: np.ndarray) -> list[Object]:
    """The objects in an image, (64, 64, 3) in [0, 1], in no particular order."""
    unknown = Object(UNKNOWN, UNKNOWN, 0.0, 0.0)
    background = np.median(image.reshape(-1, 3), axis=0)
    if background.min() < _MIN_BACKGROUND:  # no picture of this world: one object would cover most of it
        return [unknown]
    contrast = np.abs(image - background).max(-1)
    solid, _ = ndimage.label(contrast > _SOLID_CONTRAST)
    visible, _ = ndimage.label(contrast > _VISIBLE_CONTRAST)

    objects = []
    explained = {0}  # visible components that belong to an object; 0 is the background
    for i, box in enumerate(ndimage.find_objects(solid), start=1):
        mask = solid[box] == i
        if mask.sum() < _MIN_OBJECT_AREA:
            continue
        interior = ndimage.binary_erosion(mask)  # pixels at the rim are half background
        paint = image[box][interior if interior.any() else mask]
        rows, columns = box
        x = (columns.start + columns.stop) / 2
        y = (rows.start + rows.stop) / 2
        objects.append(Object(shape_of(mask), color_of(paint), x, y))
        explained.update(visible[box][mask])

    areas = np.bincount(visible.ravel())
    for i in np.flatnonzero(areas >= _MIN_VISIBLE_AREA):
        if i not in explained:
            objects.append(unknown)
    return objects


def shape_of(mask: np.ndarray) -> str:
    """The shape of a component, given its mask within its own box, (h, w) bool."""
    height, width = mask.shape
    short, long = sorted((height, width))
    if long > _MAX_SIDE or long > _MAX_ASPECT * short:
        return UNKNOWN
    outlines = shape_masks(height, width)
    iou = (outlines & mask).sum((1, 2)) / (outlines | mask).sum((1, 2))
    *_, second, best = np.sort(iou)
    name = SHAPES[iou.argmax()]
    is_clear = best >= _MIN_IOU[name] and best - second >= _MIN_IOU_LEAD
    return name if is_clear else UNKNOWN


@cache  # few boxes differ: a side has at most _MAX_SIDE pixels
def shape_masks(height: int, width: int) -> np.ndarray:
    """Masks of the four shapes, each filling a box of this size: (4, height, width) bool."""
    x = torch.linspace(-1, 1, 2 * width + 1)[1::2]  # centres of pixels
    y = torch.linspace(-1, 1, 2 * height + 1)[1::2, None]
    radius = torch.tensor(1.0)
    masks = []
    for name in SHAPES:
        half_width, half_height, centre = _BOXES[name]
        masks.append(signed_distance(name, x * half_width, y * half_height + centre, radius) <= 0)
    return torch.stack(masks).numpy()


def color_of(paint: np.ndarray) -> str:
    """The color of an object, given its pixels, (n, 3)."""
    palette = np.array(list(COLORS.values()))
    error = np.linalg.norm(paint[:, None] - palette, axis=-1)  # (n, colors)
    share = (error <= _MAX_COLOR_ERROR).mean(0)
    return COLOR_NAMES[share.argmax()] if share.max() >= _MIN_COLOR_SHARE else UNKNOWN


def accuracy(correct: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The share of correct images of each task, and `overall`, the mean over the tasks that occur (as in GenEval)."""
    shares = {}
    for task in TASKS:
        verdicts = [bool(c) for c, prompt in zip(correct, prompts, strict=True) if prompt.task == task]
        if verdicts:
            shares[task] = sum(verdicts) / len(verdicts)
    return {"overall": sum(shares.values()) / len(shares), **shares}
