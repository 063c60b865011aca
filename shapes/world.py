"""The shapes world: prompts, scenes and a renderer; judge.py says what is right.

A scene is a 64x64 picture with one flat object in some of its four 32x32 cells.  A prompt belongs to
one of six tasks, named as GenEval names them:

    single    a photo of a circle                         position  a photo of a circle left of a square
    color     a photo of a red circle                     two       a photo of a circle and a square
    count     a photo of three circles                    attr      a photo of a red circle and a blue square

Where a caption names no color each shape has its usual one, as bananas are yellow; the judge takes any.

Legend: n images, cells in reading order (0 top left, 1 top right, 2 bottom left, 3 bottom right).
"""

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {  # far apart in RGB, so that a blend of two is nearest to neither
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.96, 0.82, 0.10),
}
USUAL = dict(circle="green", square="blue", triangle="yellow", cross="red")  # where the caption names no color
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "left of": (0, 1),
    "right of": (0, -1),
    "above": (1, 0),
    "below": (-1, 0),
}  # (rows, columns) a to b
TASKS = ("single", "two", "count", "color", "position", "attr")
SIZE, CELL = 64, 32


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for; `text` is the caption."""

    task: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...] = ()
    count: int = 1
    relation: str = ""

    @property
    def text(self) -> str:
        plural = "es" if self.shapes[0] == "cross" else "s"
        if self.task == "count":
            return f"a photo of {NUMBERS[self.count]} {self.shapes[0]}{plural}"
        things = [f"a {c} {s}" for c, s in zip(self.colors, self.shapes)] or [f"a {s}" for s in self.shapes]
        return "a photo of " + f" {self.relation or 'and'} ".join(things)


def all_prompts() -> list[Prompt]:
    """Every prompt of the world, 236 of them, task by task."""
    pairs = list(permutations(SHAPES, 2))
    return (
        [Prompt("single", (s,)) for s in SHAPES]
        + [Prompt("two", pair) for pair in pairs]
        + [Prompt("count", (s,), count=n) for s, n in product(SHAPES, NUMBERS)]
        + [Prompt("color", (s,), (c,)) for s, c in product(SHAPES, COLORS)]
        + [Prompt("position", pair, relation=r) for pair, r in product(pairs, RELATIONS)]
        + [Prompt("attr", pair, colors) for pair, colors in product(pairs, permutations(COLORS, 2))]
    )


PROMPTS = all_prompts()
NUMBER = {prompt: i for i, prompt in enumerate(PROMPTS)}
_BY_TEXT = {p.text: p for p in PROMPTS}


def is_held_out(prompt: Prompt) -> bool:
    """True for about a quarter of the combinations of count, color, position and attr: never aligned on.

    The rule is arithmetic, so every word is seen in alignment, and one of the scene, so that a prompt is held out
    together with the same scene worded the other way round.
    """
    a, *rest = [SHAPES.index(s) for s in prompt.shapes]
    color = [list(COLORS).index(c) for c in prompt.colors]
    match prompt.task:
        case "count":
            return (a + prompt.count) % 4 == 0
        case "color":
            return a == color[0]
        case "position":  # as if worded with "left of" or "above"
            relation = list(RELATIONS).index(prompt.relation)
            first, second = (a, rest[0]) if relation % 2 == 0 else (rest[0], a)
            return (first + 2 * second + relation // 2) % 4 == 0
        case "attr":
            (a, color_a), (b, color_b) = sorted(zip((a, *rest), color, strict=True))
            return (a + 2 * b + color_a + 3 * color_b) % 4 == 0
    return False


def by_task(prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts of each task, tasks in the order of TASKS."""
    return {task: [p for p in prompts if p.task == task] for task in TASKS}


def parse(text: str) -> Prompt:
    """The prompt whose caption is `text`. Raises ValueError for a caption outside the world."""
    found = _BY_TEXT.get(" ".join(text.split()))
    if found is None:
        raise ValueError(f"prompt {text!r} is not one of the shapes world, e.g. {next(iter(_BY_TEXT))!r}")
    return found


# ----------------------------------------------------------------------------------------- scenes


def distort(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """What a careless captioner may really have seen: the same scene type with one detail changed.

    Count or relation is redrawn; of two objects one is missing; a color is the shape's usual one, or redrawn where
    that was asked for; of attr the colors are swapped, or one is so changed. A single comes back as it is.
    """

    def other(options, *not_these):
        return str(rng.choice([o for o in options if o not in not_these]))

    def repainted(i):
        usual = USUAL[prompt.shapes[i]]
        return usual if usual not in prompt.colors else other(COLORS, *prompt.colors)

    a = prompt.shapes[0]
    match prompt.task:
        case "count":
            return Prompt("count", (a,), count=int(rng.choice([n for n in NUMBERS if n != prompt.count])))
        case "color":
            return Prompt("color", (a,), (repainted(0),))
        case "two":
            return Prompt("single", (str(rng.choice(prompt.shapes)),))
        case "position":
            return Prompt("position", prompt.shapes, relation=other(RELATIONS, prompt.relation))
        case "attr":
            swapped = prompt.colors[::-1]
            one = (repainted(0), prompt.colors[1]) if rng.random() < 0.5 else (prompt.colors[0], repainted(1))
            return Prompt("attr", prompt.shapes, swapped if rng.random() < 0.5 else one)
    return prompt


def layout(prompt: Prompt, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene that fits the prompt: shape and color index of each cell, (4,) and (4,), -1 where empty."""
    shape, color = np.full(4, -1), np.full(4, -1)
    cells = rng.permutation(4)
    if prompt.relation:
        rows, columns = RELATIONS[prompt.relation]
        a_to_b = [  # the relation holds along its own axis; along the other one anything goes
            (a, b)
            for a, b in permutations(range(4), 2)
            if (rows and b // 2 - a // 2 == rows) or (columns and b % 2 - a % 2 == columns)
        ]
        cells = a_to_b[rng.integers(len(a_to_b))]
    for i, s in enumerate(prompt.shapes * prompt.count):
        shape[cells[i]] = SHAPES.index(s)
        color[cells[i]] = list(COLORS).index(prompt.colors[i] if prompt.colors else USUAL[s])
    return shape, color


def signed_distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels (up to rounding at corners) to a shape of radius r at the origin, y down."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * r
    if shape == "triangle":  # corners (0, -r), (r, 0.85 r), (-r, 0.85 r)
        slope = (1.85**2 + 1) ** 0.5
        return torch.maximum((1.85 * x.abs() - (y + r)) / slope, y - 0.85 * r)
    bar = 0.36 * r
    horizontal = torch.maximum(x.abs() - r, y.abs() - bar)
    vertical = torch.maximum(x.abs() - bar, y.abs() - r)
    return torch.minimum(horizontal, vertical)


def render(shape: np.ndarray, color: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw scenes with random jitter, size, background and slight color changes.

    shape, color: (n, 4) indices, -1 where empty.  Returns images in [0, 1], (n, 3, 64, 64).
    """
    n = len(shape)

    def uniform(low, high, *size):
        return torch.from_numpy(rng.uniform(low, high, size)).float()

    centre = CELL / 2 + uniform(-3.5, 3.5, 2, n, 4, 1, 1)
    r = uniform(9, 12, n, 4, 1, 1)
    pixel = torch.arange(CELL) + 0.5
    x, y = pixel - centre[0], pixel[:, None] - centre[1]  # (n, 4, 1, 32), (n, 4, 32, 1)
    distance = torch.full((n, 4, CELL, CELL), float(CELL))
    kind = torch.from_numpy(shape)
    for i, name in enumerate(SHAPES):
        here = kind == i
        distance[here] = signed_distance(name, x[here], y[here], r[here])
    cover = (0.5 - distance).clamp(0, 1)[:, :, None]  # anti-aliased over one pixel
    palette = torch.tensor(list(COLORS.values()))[torch.from_numpy(color)]  # (n, 4, 3)
    paint = (palette + uniform(-0.04, 0.04, n, 4, 3))[..., None, None]
    background = uniform(0.88, 0.98, n, 1, 3)[..., None, None]
    image = paint * cover + background * (1 - cover)
    return rearrange(image, "n (row column) c h w -> n c (row h) (column w)", row=2).clamp(0, 1)


def scenes(prompts: list[Prompt], rng: np.random.Generator) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A rendered scene for each prompt: images (n, 3, 64, 64) and their cells' shapes and colors (n, 4)."""
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in prompts)))
    return render(shape, color, rng), shape, color
