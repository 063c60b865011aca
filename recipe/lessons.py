"""Images that teach the reward what a caption means, and what only looks like it.

A rendered scene has a known layout, so it has a label for every prompt of the world, not only for its own. Besides
right and wrong scenes there are spoiled ones, which fit no prompt, and fades: a scene that turns into another one by
one edit. Along a fade the score must change steadily, because that is the way on which a gradient has to lead.

Legend: n scenes, p prompts of the world (236); layouts as in shapes/world.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.random import Generator, default_rng
from torch import Tensor

from recipe.fit import TensorDict
from recipe.prompts import distort
from shapes.judge import Object, fits_prompt, objects_in
from shapes.world import (
    CELL,
    COLOR_NAMES,
    NUMBER,
    PROMPTS,
    SHAPES,
    Prompt,
    cell_pairs,
    random_layout,
    random_layouts,
    render,
)

EDITS = dict(add=0.3, remove=0.15, repaint=0.2, reshape=0.1, move=0.25)  # and how often a fade makes each
UNKNOWN = -2  # in the layout of an image that is no rendered scene, or whose object has no one color

# ---------------------------------------------------------------------------------------- labels


def truth(objects: Sequence[Object]) -> Tensor:
    """The label of an image for every prompt: whether its objects fit the prompt, by the judge's rules; bool (p,)."""
    fits = torch.zeros(len(PROMPTS), dtype=torch.bool)
    shapes = sorted(o.shape for o in objects)
    for i in _BY_SHAPES.get(tuple(shapes), ()):
        fits[i] = fits_prompt(PROMPTS[i], objects)
    return fits


def truths(objects: Sequence[Sequence[Object]]) -> Tensor:
    """The labels of several images, bool (n, p)."""
    return torch.stack([truth(one_image) for one_image in objects])


def objects_of(layout: np.ndarray) -> list[Object]:
    """The objects of a scene by its layout (2, 4), as the judge would see them if each were centred in its cell."""
    objects = []
    for cell, (shape, color) in enumerate(layout.T):
        if shape >= 0:
            row, column = divmod(cell, 2)
            x = CELL * (column + 0.5)
            y = CELL * (row + 0.5)
            objects.append(Object(SHAPES[shape], COLOR_NAMES[color], x, y))
    return objects


def edit_distance(layouts: np.ndarray) -> np.ndarray:
    """How many edits each layout (n, 2, 4) is away from fitting each prompt: (n, p), 0 where it fits.

    An edit repaints an object, reshapes it, adds one, removes one, or mends a relation.
    """
    # Any object may stand for any of the prompt's: of the 24 assignments of the four cells the cheapest counts.
    distance = np.full((len(layouts), len(PROMPTS)), np.inf)  # (n, p)
    for order in permutations(range(4)):
        shape = layouts[:, None, 0, order]  # (n, 1, 4), against (p, 4) of the prompts
        color = layouts[:, None, 1, order]
        in_scene = shape >= 0
        in_prompt = _PROMPT_SHAPE >= 0
        reshape = shape != _PROMPT_SHAPE
        repaint = (color != _PROMPT_COLOR) & (_PROMPT_COLOR >= 0)
        # An object that is wrong in both shape and color is still one wrong object: 1.5 edits, not 2.
        change = np.minimum(1.0 * reshape + repaint, 1.5)
        add_or_remove = in_scene != in_prompt
        cost = np.where(in_scene & in_prompt, change, add_or_remove)
        distance = np.minimum(distance, cost.sum(-1))

    shape = layouts[:, 0]
    for i, prompt in enumerate(PROMPTS):
        if not prompt.relation:
            continue
        a, b = map(SHAPES.index, prompt.shapes)
        holds = np.zeros(len(layouts), dtype=bool)
        for cell_a, cell_b in cell_pairs(prompt.relation):
            holds |= (shape[:, cell_a] == a) & (shape[:, cell_b] == b)
        distance[:, i] += ~holds  # a move mends it
    return distance


def prompt_tables() -> tuple[dict[tuple, list[int]], np.ndarray]:
    """The numbers of the prompts by their sorted shapes, and what they say of each object, (2, p, 4) as layouts.

    -1 stands for no object and, among colors, for any color.
    """
    by_shapes = defaultdict(list)
    table = np.full((2, len(PROMPTS), 4), -1)
    for i, prompt in enumerate(PROMPTS):
        shapes = prompt.shapes * prompt.count
        by_shapes[tuple(sorted(shapes))].append(i)
        for k, shape in enumerate(shapes):
            table[0, i, k] = SHAPES.index(shape)
        for k, color in enumerate(prompt.colors):
            table[1, i, k] = COLOR_NAMES.index(color)  # colors are named for single objects only, not for counts
    return by_shapes, table


_BY_SHAPES, (_PROMPT_SHAPE, _PROMPT_COLOR) = prompt_tables()  # only prompts with an image's shapes can fit it


# ---------------------------------------------------------------------------------------- scenes


def training_scenes(captions: Sequence[Prompt], rng: Generator) -> TensorDict:
    """A scene for each caption, right or wrong, with its labels.

    images (n, 3, 64, 64); fits, bool (n, p); caption (n,), numbers of prompts; layout (n, 2, 4).
    Of eight scenes one has a half-painted object, one is warped, and two have an object more than the prompt.
    """
    prompts = []
    for prompt in captions:
        u = rng.random()
        if u < 0.45:  # nearly right: the hard negatives
            prompt = distort(prompt, rng)
        elif u < 0.57:  # most likely all wrong
            prompt = PROMPTS[rng.integers(len(PROMPTS))]
        prompts.append(prompt)
    layouts = random_layouts(prompts, rng)

    turn = np.arange(len(prompts)) % 8  # fixed places, so that every batch has all kinds
    half = turn == 0
    warped = turn == 1
    crowded = (turn == 2) | (turn == 3)
    layouts[crowded] = add_objects(layouts[crowded], rng)
    images = render(layouts, rng)
    images[half] = paint_halves(layouts[half], rng)
    images[warped] = warp(images[warped], rng)

    fits = truths([objects_of(layout) for layout in layouts])
    fits[half] = False  # whatever the layout says
    fits[warped] = truths(objects_in(images[warped]))  # a slight warp is still right: the judge decides
    cells = torch.from_numpy(layouts)
    cells[half] = UNKNOWN  # a half-painted object has no color to read
    return dict(
        images=images,
        fits=fits,
        caption=numbers_of(captions),
        layout=cells,
    )


def numbers_of(prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([NUMBER[prompt] for prompt in prompts])


def paint_halves(layouts: np.ndarray, rng: Generator) -> Tensor:
    """Scenes (n, 3, 64, 64) in which one object has two colors, in halves, fading or blended; they fit no prompt.

    A quarter of the base's own images have an object of no one color, so the reward must know that they are wrong.
    """
    seed = rng.integers(2**31)
    repainted = layouts.copy()  # the second color of one object
    for shape, color in repainted:
        i = rng.choice(np.flatnonzero(shape >= 0))
        color[i] = other_index(color[i], len(COLOR_NAMES), rng)
    # The same seed twice: the two images differ in that color alone.
    one = render(layouts, default_rng(seed))
    two = render(repainted, default_rng(seed))
    size = (len(layouts), 1, 1, 1)
    angle = rng.uniform(0, 2 * np.pi, size)
    angle = torch.from_numpy(angle).float()
    sharpness = rng.choice([0.0, 0.3, 3.0], size)  # of the border: an even blend, fading, halves
    sharpness = torch.from_numpy(sharpness).float()
    pixel = torch.arange(2 * CELL) % CELL + 0.5 - CELL / 2  # from the middle of the pixel's cell
    across = angle.cos() * pixel + angle.sin() * pixel[:, None]
    return torch.lerp(one, two, torch.sigmoid(sharpness * across))


def warp(images: Tensor, rng: Generator) -> Tensor:
    """Images (n, 3, 64, 64) with their pixels moved smoothly, by up to a few pixels: outlines that are no clear shape.

    Long alignment bends outlines (see recipe/README.md), so the reward must have seen bent ones.
    """
    n, size = len(images), images.shape[-1]
    shift = rng.normal(0, 1, (n, 2, 7, 7))  # at 7x7 knots, in x and y
    strength = rng.uniform(0.5, 3, (n, 1, 1, 1))  # pixels
    shift = torch.from_numpy(shift * strength).float()
    shift = F.interpolate(shift, size=(size, size), mode="bicubic", align_corners=True)
    shift = shift * 2 / size  # grid_sample's units: 2 is the width of the image
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid + rearrange(shift, "n xy h w -> n h w xy")
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def add_objects(layouts: np.ndarray, rng: Generator) -> np.ndarray:
    """The layouts (n, 2, 4) with an object more in an empty cell, where there is one.

    Half of the new objects copy one of the scene, a quarter copy the shape only, a quarter are random.
    """
    layouts = layouts.copy()
    for shape, color in layouts:
        empty = np.flatnonzero(shape < 0)
        full = np.flatnonzero(shape >= 0)
        if len(empty) == 0:
            continue
        cell = rng.choice(empty)
        model = rng.choice(full)
        kind = rng.integers(4)
        shape[cell] = shape[model] if kind < 3 else rng.integers(len(SHAPES))
        color[cell] = color[model] if kind < 2 else rng.integers(len(COLOR_NAMES))
    return layouts


# ----------------------------------------------------------------------------------------- fades


def fades(captions: Sequence[Prompt], rng: Generator) -> TensorDict:
    """Two images on the way between two scenes that are one edit apart. One scene fits the caption or nearly does.

    start, end (n, 3, 64, 64); gain (n, p), the edits by which the end is nearer to a prompt than the start; near
    (n, p), prompts at most two edits away from one of the scenes; caption (n,).
    """
    pairs = []
    for prompt in captions:
        scene = random_layout(prompt, rng)
        if rng.random() < 0.4:
            scene = edit(scene, rng)  # not only fades that start or end at a right scene
        pair = [scene, edit(scene, rng)]
        if rng.random() >= 0.5:  # as many fades away from the caption as towards it
            pair.reverse()
        pairs.append(pair)
    first, second = np.stack(pairs, axis=1)  # (n, 2, 4) each
    seed = rng.integers(2**31)  # the same for both: only the edited object differs
    first_image = render(first, default_rng(seed))
    second_image = render(second, default_rng(seed))

    # Two random points of the way, in order: the score must rise between any two, not only from end to end.
    points = rng.uniform(0, 1, (2, len(captions)))
    t = torch.from_numpy(np.sort(points, axis=0)).float()
    weight = rearrange(t, "two n -> two n 1 1 1")
    start, end = torch.lerp(first_image, second_image, weight)

    first_distance = torch.from_numpy(edit_distance(first)).float()
    second_distance = torch.from_numpy(edit_distance(second)).float()
    share = t[1] - t[0]  # of the whole way, and so of the edit
    gain = (first_distance - second_distance) * share[:, None]
    is_near = torch.minimum(first_distance, second_distance) <= 2  # far from a prompt its score may do as it likes
    return dict(
        start=start,
        end=end,
        gain=gain,
        near=is_near,
        caption=numbers_of(captions),
    )


def edit(layout: np.ndarray, rng: Generator) -> np.ndarray:
    """The layout (2, 4) after one random edit: an object added, removed, repainted, reshaped or moved."""
    layout = layout.copy()
    shape, color = layout  # views
    empty = np.flatnonzero(shape < 0)
    full = np.flatnonzero(shape >= 0)
    i = rng.choice(full)
    kind = rng.choice(list(EDITS), p=list(EDITS.values()))
    if kind == "repaint":
        color[i] = other_index(color[i], len(COLOR_NAMES), rng)
    elif kind == "reshape":
        shape[i] = other_index(shape[i], len(SHAPES), rng)
    elif len(empty) == 0 or (kind == "remove" and len(full) > 1):  # a full scene has no cell to add or move to
        layout[:, i] = -1
    elif kind == "move":
        layout[:, rng.choice(empty)] = layout[:, i]
        layout[:, i] = -1
    else:  # also where "remove" would leave nothing
        layout = add_objects(layout[None], rng)[0]
    return layout


def other_index(index: int, n: int, rng: Generator) -> int:
    """Any index below n but this one."""
    return (index + rng.integers(1, n)) % n
