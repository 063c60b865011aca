"""Pictures that teach the reward what a caption means, and what only looks like it.

A rendered scene knows its layout, so it has a truth for every prompt of the world. Besides right and wrong scenes there
are spoiled ones, which fit nothing, and fades: a scene that turns into another by one edit, along which the score must
change steadily, because that is the way on which a gradient has to lead.

Legend: n scenes, p prompts of the world (236).
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from shapes.judge import Object, is_right, objects_in
from shapes.world import (
    CELL,
    COLORS,
    NUMBER,
    PROMPTS,
    RELATIONS,
    SHAPES,
    Prompt,
    distort,
    layout,
    render,
)

UNKNOWN = -2  # in a layout

# ---------------------------------------------------------------------------------------- truth

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


_WANTED = np.full((2, len(PROMPTS), 4), -1)  # shapes and colors that a prompt asks for; -1: nothing, or any color
for _i, _p in enumerate(PROMPTS):
    for _k, _s in enumerate(_p.shapes * _p.count):
        _WANTED[:, _i, _k] = SHAPES.index(_s), list(COLORS).index(_p.colors[_k]) if _p.colors else -1


def edits(shape: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How many edits each layout (n, 4) is away from each prompt, (n, p): 0 where it fits.

    An edit paints an object anew, gives it another shape, adds one, takes one away, or mends a relation.
    """
    total = []
    for order in permutations(range(4)):  # which object stands for which of the wanted ones
        s, c = shape[:, None, order], color[:, None, order]
        both = (s >= 0) & (_WANTED[0] >= 0)
        other = both * (1.0 * (s != _WANTED[0]) + ((c != _WANTED[1]) & (_WANTED[1] >= 0)))
        total.append((np.where(both, np.minimum(other, 1.5), (s >= 0) != (_WANTED[0] >= 0))).sum(-1))
    away = np.min(total, 0)
    for i, p in enumerate(PROMPTS):
        if p.relation:
            rows, columns = RELATIONS[p.relation]
            a, b = (shape == SHAPES.index(s) for s in p.shapes)
            place = rows * (np.arange(4) // 2) + columns * (np.arange(4) % 2)  # of a cell, along the relation
            away[:, i] += ~(a[:, :, None] & b[:, None] & (place > place[:, None])).any((1, 2))
    return away


# ---------------------------------------------------------------------------------------- scenes


def half_painted(shape: np.ndarray, color: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Scenes (n, 3, 64, 64) in which one object is of two colors, in halves, fading or blended: no prompt fits."""
    other, seed = color.copy(), rng.integers(2**31)
    for s, c in zip(shape, other, strict=True):
        c[rng.choice(np.flatnonzero(s >= 0))] += rng.integers(1, len(COLORS))
    one, two = (render(shape, c, np.random.default_rng(seed)) for c in (color, other % len(COLORS)))
    angle = torch.from_numpy(rng.uniform(0, 2 * np.pi, (len(shape), 1, 1, 1))).float()
    sharp = torch.from_numpy(rng.choice([0.0, 0.3, 3.0], (len(shape), 1, 1, 1))).float()
    pixel = torch.arange(2 * CELL) % CELL + 0.5 - CELL / 2  # from the middle of the pixel's cell
    return torch.lerp(one, two, torch.sigmoid(sharp * (angle.cos() * pixel + angle.sin() * pixel[:, None])))


def bent(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (n, 3, 64, 64) drawn on rubber that was pulled smoothly, by up to a few pixels: shapes that are none."""
    n, size = len(images), images.shape[-1]
    pull = torch.from_numpy(rng.normal(0, 1, (n, 2, 7, 7)) * rng.uniform(0.5, 3, (n, 1, 1, 1))).float()
    pull = F.interpolate(pull, size=(size, size), mode="bicubic", align_corners=True) * 2 / size
    there = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, there + rearrange(pull, "n xy h w -> n h w xy"), "bilinear", "border", False)


def with_one_more(shape: np.ndarray, color: np.ndarray, rng: np.random.Generator) -> None:
    """Put into an empty cell of each layout (n, 4) another object.

    Half of the time it is like one that is there, a quarter like it in shape, a quarter like none on purpose.
    """
    for s, c in zip(shape, color, strict=True):
        empty, full = np.flatnonzero(s < 0), np.flatnonzero(s >= 0)
        if len(empty):
            cell, like, kind = rng.choice(empty), rng.choice(full), rng.integers(4)
            s[cell] = s[like] if kind < 3 else rng.integers(len(SHAPES))
            c[cell] = c[like] if kind < 2 else rng.integers(len(COLORS))


def rendered(captions: Sequence[Prompt], rng: np.random.Generator) -> dict[str, Tensor]:
    """Scenes for captions, right or wrong: with another detail, another caption's, with an object more, or spoiled.

    Of eight in turn, one is half painted, one bent, and two have an object more.
    """
    seen = []
    for p in captions:
        u = rng.random()
        seen.append(distort(p, rng) if u < 0.45 else PROMPTS[rng.integers(len(PROMPTS))] if u < 0.57 else p)
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in seen), strict=True))
    turn = np.arange(len(seen)) % 8
    half, pulled, fuller = turn == 0, turn == 1, turn // 2 == 1
    more = shape[fuller], color[fuller]
    with_one_more(*more, rng)
    shape[fuller], color[fuller] = more
    images = render(shape, color, rng)
    images[half] = half_painted(shape[half], color[half], rng)
    images[pulled] = bent(images[pulled], rng)
    fits = torch.stack([truth(objects_of(s, c)) for s, c in zip(shape, color, strict=True)])
    fits[half] = False
    fits[pulled] = torch.stack([truth(objects) for objects in objects_in(images[pulled])])
    cells = torch.from_numpy(np.stack([shape, color], 1))
    cells[half] = UNKNOWN
    return dict(images=images, fits=fits, caption=torch.tensor([NUMBER[p] for p in captions]), layout=cells)


def edited(shape: np.ndarray, color: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The layouts (n, 4) after one edit each: an object added, taken away, painted anew, reshaped or moved."""
    shape, color = shape.copy(), color.copy()
    for s, c in zip(shape, color, strict=True):
        empty, full = np.flatnonzero(s < 0), np.flatnonzero(s >= 0)
        i, kind = rng.choice(full), rng.choice(5, p=(0.3, 0.15, 0.2, 0.1, 0.25))
        if kind == 2:
            c[i] = (c[i] + rng.integers(1, len(COLORS))) % len(COLORS)
        elif kind == 3:
            s[i] = (s[i] + rng.integers(1, len(SHAPES))) % len(SHAPES)
        elif (kind == 1 and len(full) > 1) or not len(empty):
            s[i] = c[i] = -1
        elif kind == 4:
            cell = rng.choice(empty)
            s[cell], c[cell] = s[i], c[i]
            s[i] = c[i] = -1
        else:
            with_one_more(s[None], c[None], rng)
    return shape, color


def fades(captions: Sequence[Prompt], rng: np.random.Generator) -> dict[str, Tensor]:
    """Two pictures on the way between two scenes an edit apart, of which one fits the caption or is an edit away.

    start, end (n, 3, 64, 64); gain (n, p): how many edits nearer to a prompt the way between the two leads; near
    (n, p): prompts at most two edits away; caption (n,).
    """
    pairs = []
    for p in captions:
        scene = [a[None] for a in layout(p, rng)]
        if rng.random() < 0.4:
            scene = edited(*scene, rng)
        pair = [scene, edited(*scene, rng)]
        pairs.append(sum(map(tuple, pair if rng.random() < 0.5 else pair[::-1]), ()))
    shape, color, new_shape, new_color = (np.concatenate(a) for a in zip(*pairs, strict=True))
    seed = rng.integers(2**31)
    before, after = (render(*scene, np.random.default_rng(seed)) for scene in ((shape, color), (new_shape, new_color)))
    place = torch.from_numpy(np.sort(rng.uniform(0, 1, (2, len(captions))), axis=0)).float()
    start, end = (torch.lerp(before, after, t[:, None, None, None]) for t in place)
    was, now = (torch.from_numpy(edits(*scene)).float() for scene in ((shape, color), (new_shape, new_color)))
    gain = (was - now) * (place[1] - place[0])[:, None]
    caption = torch.tensor([NUMBER[p] for p in captions])
    return dict(start=start, end=end, gain=gain, near=torch.minimum(was, now) <= 2, caption=caption)
