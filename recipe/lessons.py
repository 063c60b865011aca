"""What the models learn from: random prompts, prompts with a wrong detail, and scenes with labels for the reward.

A rendered scene has a known layout, so it has a label for every prompt of the world, not only for its own. Besides
right and wrong scenes there are spoiled ones, which fit no prompt, and fades: a scene that turns into another one by
one edit. Along a fade the score must change steadily, because that is the way on which a gradient has to lead.

Legend: n scenes, p prompts of the world (236); layouts as in shapes/world.py.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.random import Generator, default_rng
from torch import Tensor

from recipe.fit import TensorDict
from shapes.judge import fits_prompt, objects_in
from shapes.world import (
    BY_CAPTION,
    CELL,
    COLOR_NAMES,
    NUMBERS,
    PROMPT_INDEX,
    PROMPTS,
    RELATIONS,
    SHAPES,
    SIZE,
    TASKS,
    USUAL,
    Prompt,
    by_task,
    cell_pairs,
    random_layout,
    random_layouts,
    render,
)

CAPTIONS = list(BY_CAPTION)
OF_TASK = by_task(PROMPTS)
# Weights of the tasks. A model that learns what captions mean sees more of what is harder to learn ...
TEACH = {"single": 0.5, "two": 1, "count": 1, "color": 0.7, "position": 1.5, "attr": 2}
# ... and otherwise sees all tasks alike, but for `single`: it has the fewest prompts, and must stay clean.
EVEN = dict.fromkeys(TASKS, 1) | {"single": 1.5}
EDITS = dict(add=0.3, remove=0.15, repaint=0.2, reshape=0.1, move=0.25)  # and how often a fade makes each
UNKNOWN = -2  # in the layout of an image that is no rendered scene, or whose object has no one color

# --------------------------------------------------------------------------------------- prompts


def random_prompts(n: int, rng: Generator, weights: dict[str, float] = TEACH) -> list[Prompt]:
    """n prompts: a task by its weight, then any of the task's prompts."""
    shares = np.array(list(weights.values()))
    # A task first, or `attr`, which has 144 of the 236 prompts, would crowd out the others.
    tasks = rng.choice(list(weights), size=n, p=shares / shares.sum())
    return [choice(OF_TASK[task], rng) for task in tasks]


def choice(options: Iterable, rng: Generator, excluded: Iterable = ()) -> object:
    """Any of the options but the excluded ones."""
    options = [option for option in options if option not in excluded]
    return options[rng.integers(len(options))]


def numbers_of(prompts: list[Prompt]) -> Tensor:
    return torch.tensor([PROMPT_INDEX[prompt] for prompt in prompts])


def distort(prompt: Prompt, rng: Generator) -> Prompt:
    """The prompt with one detail wrong, as a careless captioner would have it.

    count     another number                        position  another relation
    color     the usual color, or a random one      attr      the two colors swapped, or one of them replaced
    two       one of the two objects alone          single    unchanged
    """
    match prompt.task:
        case "count":
            return replace(prompt, count=choice(NUMBERS, rng, [prompt.count]))
        case "two":  # the task changes, as a scene of one object is no scene of two
            return Prompt("single", (choice(prompt.shapes, rng),))
        case "position":
            return replace(prompt, relation=choice(RELATIONS, rng, [prompt.relation]))
        case "color" | "attr":
            i = int(prompt.task == "attr" and rng.random() >= 0.5)
            color = USUAL[prompt.shapes[i]]
            if color in prompt.colors:
                color = choice(COLOR_NAMES, rng, prompt.colors)
            colors = list(prompt.colors)
            colors[i] = color
            if prompt.task == "attr" and rng.random() < 0.5:  # what a base model confuses most
                colors = prompt.colors[::-1]
            return replace(prompt, colors=tuple(colors))
    return prompt  # single: there is no detail to get wrong


# ---------------------------------------------------------------------------------------- labels


def judge_labels(images: Tensor) -> Tensor:
    """Whether the judge accepts each image for each prompt: (n, 3, 64, 64) to bool (n, p)."""
    labels = []
    for objects in objects_in(images):
        labels.append([fits_prompt(prompt, objects) for prompt in PROMPTS])
    return torch.tensor(labels)


def edit_distance(layouts: np.ndarray) -> np.ndarray:
    """How many edits each layout (n, 2, 4) is away from fitting each prompt: (n, p), 0 where it fits.

    An edit repaints an object, reshapes it, adds one, removes one, or mends a relation.
    """
    # Any object may stand for any of the prompt's: of the 24 orders of the four cells the cheapest counts.
    orders = list(permutations(range(4)))
    scene_shape = layouts[:, 0, orders]  # (n, 24, 4)
    scene_color = layouts[:, 1, orders]
    in_scene = scene_shape >= 0
    distances = []
    for prompt in PROMPTS:
        shape, color = np.full((2, 4), -1)  # no object; among colors also any color
        for i, name in enumerate(prompt.shapes * prompt.count):
            shape[i] = SHAPES.index(name)
        for i, name in enumerate(prompt.colors):
            color[i] = COLOR_NAMES.index(name)
        reshape = scene_shape != shape
        repaint = (scene_color != color) & (color >= 0)
        # An object that is wrong in both shape and color is still one wrong object: 1.5 edits, not 2.
        change = np.minimum(1.0 * reshape + repaint, 1.5)
        add_or_remove = in_scene != (shape >= 0)
        cost = np.where(add_or_remove, 1, in_scene * change)
        distance = cost.sum(-1).min(1)  # (n,)
        if prompt.relation:
            first, second = np.array(cell_pairs(prompt.relation)).T
            holds = (layouts[:, 0, first] == shape[0]) & (layouts[:, 0, second] == shape[1])
            distance += ~holds.any(1)  # a move mends it
        distances.append(distance)
    return np.stack(distances, axis=1)


# ---------------------------------------------------------------------------------------- scenes


def training_scenes(n: int, rng: Generator) -> TensorDict:
    """Scenes for n random captions, right or wrong, with their labels.

    images (n, 3, 64, 64); fits, bool (n, p); caption (n,), numbers of prompts; layout (n, 2, 4).
    Of eight scenes one has a half-painted object, one is warped, and two have an object more than the prompt.
    """
    captions = random_prompts(n, rng)
    prompts = []
    for prompt in captions:
        u = rng.random()
        if u < 0.45:  # nearly right: the hard negatives
            prompt = distort(prompt, rng)
        elif u < 0.57:  # most likely all wrong
            prompt = PROMPTS[rng.integers(len(PROMPTS))]
        prompts.append(prompt)
    layouts = random_layouts(prompts, rng)

    half, warped = slice(0, None, 8), slice(1, None, 8)  # fixed rows, so that every batch has all kinds
    for i in range(n):
        if i % 8 in (2, 3):
            layouts[i] = add_object(layouts[i], rng)
    images = render(layouts, rng)
    images[half] = paint_halves(layouts[half], rng)
    images[warped] = warp(images[warped], rng)

    fits = torch.from_numpy(edit_distance(layouts) == 0)
    fits[half] = False  # whatever the layout says
    fits[warped] = judge_labels(images[warped])  # a slight warp is still right: the judge decides
    layouts[half] = UNKNOWN  # a half-painted object has no color to read
    return dict(
        images=images,
        fits=fits,
        caption=numbers_of(captions),
        layout=torch.from_numpy(layouts),
    )


def paint_halves(layouts: np.ndarray, rng: Generator) -> Tensor:
    """Scenes (n, 3, 64, 64) in which one object has two colors, in halves, fading or blended; they fit no prompt.

    A quarter of the base's own images have an object of no one color, so the reward must know that they are wrong.
    """
    seed = rng.integers(2**31)
    repainted = layouts.copy()  # the second color of one object
    for shape, color in repainted:
        i = rng.choice(np.flatnonzero(shape >= 0))
        color[i] = other_index(color[i], rng)
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
    n = len(images)
    shift = rng.standard_normal((n, 2, 7, 7))  # at 7x7 knots, in x and y
    strength = rng.uniform(0.5, 3, (n, 1, 1, 1))  # pixels
    shift = torch.from_numpy(shift * strength).float()
    shift = F.interpolate(shift, SIZE, mode="bicubic", align_corners=True)
    shift = shift * 2 / SIZE  # grid_sample's units: 2 is the width of the image
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, images.shape, align_corners=False)
    grid = grid + rearrange(shift, "n xy h w -> n h w xy")
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def add_object(layout: np.ndarray, rng: Generator) -> np.ndarray:
    """The layout (2, 4) with an object more in an empty cell, if there is one.

    Half of the new objects copy one of the scene, a quarter copy the shape only, a quarter are random.
    """
    layout = layout.copy()
    shape, color = layout  # views
    empty = np.flatnonzero(shape < 0)
    if len(empty) == 0:
        return layout
    cell = rng.choice(empty)
    model = rng.choice(np.flatnonzero(shape >= 0))
    kind = rng.integers(4)
    shape[cell] = shape[model] if kind < 3 else rng.integers(len(SHAPES))
    color[cell] = color[model] if kind < 2 else rng.integers(len(COLOR_NAMES))
    return layout


# ----------------------------------------------------------------------------------------- fades


def fades(n: int, rng: Generator) -> TensorDict:
    """For n random captions two images each, on the way between two scenes that are one edit apart.

    One of the scenes fits the caption or nearly does. images (2 n, 3, 64, 64), the starts and then the ends; gain
    (n, p), the edits by which the end is nearer to a prompt than the start, 0 for prompts that are more than two edits
    away from both scenes; caption (n,).
    """
    captions = random_prompts(n, rng)
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
    points = np.sort(rng.random((2, n)), axis=0)
    t = torch.from_numpy(points).float()
    images = torch.lerp(first_image, second_image, rearrange(t, "two n -> two n 1 1 1"))  # (2, n, 3, 64, 64)

    distances = edit_distance(np.concatenate([first, second]))
    first_distance, second_distance = torch.from_numpy(distances).float().chunk(2)
    share = t[1] - t[0]  # of the whole way, and so of the edit
    gain = (first_distance - second_distance) * share[:, None]
    gain[torch.minimum(first_distance, second_distance) > 2] = 0  # far from a prompt its score may do as it likes
    return dict(images=images.flatten(0, 1), gain=gain, caption=numbers_of(captions))


def edit(layout: np.ndarray, rng: Generator) -> np.ndarray:
    """The layout (2, 4) after one random edit: an object added, removed, repainted, reshaped or moved."""
    layout = layout.copy()
    shape, color = layout
    empty = np.flatnonzero(shape < 0)
    full = np.flatnonzero(shape >= 0)
    i = rng.choice(full)
    kind = rng.choice(list(EDITS), p=list(EDITS.values()))
    if kind == "repaint":
        color[i] = other_index(color[i], rng)
    elif kind == "reshape":
        shape[i] = other_index(shape[i], rng)
    elif len(empty) == 0 or (kind == "remove" and len(full) > 1):  # a full scene has no cell to add or move to
        layout[:, i] = -1
    elif kind == "move":
        layout[:, rng.choice(empty)] = layout[:, i]
        layout[:, i] = -1
    else:  # also where "remove" would leave nothing
        return add_object(layout, rng)
    return layout


def other_index(index: int, rng: Generator) -> int:
    """Any other of the four shapes, or of the four colors."""
    return (index + rng.integers(1, 4)) % 4
