"""The shapes world: prompts, scenes and a renderer. judge.py decides whether a picture shows what its prompt says.

A scene is a 64x64 picture with one flat object in some of its four 32x32 cells. A prompt belongs to one of six tasks,
named as GenEval names them:

    single    a photo of a circle                         position  a photo of a circle left of a square
    color     a photo of a red circle                     two       a photo of a circle and a square
    count     a photo of three circles                    attr      a photo of a red circle and a blue square

A shape whose color the caption does not name is drawn in its usual color, as bananas are yellow; the judge takes any.

Legend: n scenes. A layout is an integer array (2, 4): the shape and the color of each cell, -1 where the cell is empty.
Cells are in reading order: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
from einops import rearrange
from numpy.random import Generator
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {  # far apart in RGB, so that a blend of two is nearest to neither
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.96, 0.82, 0.10),
}
COLOR_NAMES = list(COLORS)
# With random colors in their place, more than a fifth of the base's images blend two colors: see recipe/README.md.
USUAL = dict(circle="green", square="blue", triangle="yellow", cross="red")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {  # the step from the first object to the second: rows down, columns to the right
    "left of": (0, 1),
    "right of": (0, -1),
    "above": (1, 0),
    "below": (-1, 0),
}
TASKS = ("single", "two", "count", "color", "position", "attr")
SIZE = 64  # pixels, height and width of an image
CELL = 32  # pixels, height and width of a cell


@dataclass(frozen=True)
class Prompt:
    """What a caption says; `text` is the caption."""

    task: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...] = ()  # of the shapes, in their order; empty if the caption names no color
    count: int = 1  # objects of each shape
    relation: str = ""  # of the first shape to the second

    @property
    def text(self) -> str:
        if self.task == "count":
            plural = "es" if self.shapes[0] == "cross" else "s"
            return f"a photo of {NUMBERS[self.count]} {self.shapes[0]}{plural}"
        nouns = self.shapes
        if self.colors:
            nouns = map(" ".join, zip(self.colors, self.shapes))
        conjunction = self.relation or "and"
        return "a photo of a " + f" {conjunction} a ".join(nouns)


def all_prompts() -> Iterator[Prompt]:
    """The 236 prompts of the world, task by task."""
    pairs = list(permutations(SHAPES, 2))
    color_pairs = list(permutations(COLORS, 2))
    for shape in SHAPES:
        yield Prompt("single", (shape,))
    for pair in pairs:
        yield Prompt("two", pair)
    for shape, count in product(SHAPES, NUMBERS):
        yield Prompt("count", (shape,), count=count)
    for shape, color in product(SHAPES, COLORS):
        yield Prompt("color", (shape,), (color,))
    for pair, relation in product(pairs, RELATIONS):
        yield Prompt("position", pair, relation=relation)
    for pair, colors in product(pairs, color_pairs):
        yield Prompt("attr", pair, colors)


PROMPTS = list(all_prompts())
PROMPT_INDEX = {prompt: i for i, prompt in enumerate(PROMPTS)}  # its index on an axis p, in recipe/
BY_CAPTION = {prompt.text: prompt for prompt in PROMPTS}


def by_task(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts of each task, tasks in the order of TASKS."""
    groups = {task: [] for task in TASKS}
    for prompt in prompts:
        groups[prompt.task].append(prompt)
    return groups


def parse_caption(text: str) -> Prompt:
    """The prompt whose caption is `text`. Raises ValueError for a caption outside the world."""
    prompt = BY_CAPTION.get(" ".join(text.split()))
    if prompt is None:
        raise ValueError(f"prompt {text!r} is not one of the shapes world, e.g. {PROMPTS[0].text!r}")
    return prompt


def is_held_out(prompt: Prompt) -> bool:
    """True for about a quarter of the prompts of count, color, position and attr: evaluated, never aligned on.

    The rule is arithmetic on indices, so that every word still occurs in alignment. The rule looks at the scene, so
    that both wordings of a scene ("a left of b", "b right of a") are held out together.
    """
    shapes = [SHAPES.index(shape) for shape in prompt.shapes]
    colors = [COLOR_NAMES.index(color) for color in prompt.colors]
    match prompt.task:
        case "count":
            return (shapes[0] + prompt.count) % 4 == 0
        case "color":
            return shapes[0] == colors[0]
        case "position":
            # Relations 1 and 3 are 0 and 2 with the objects in the opposite order.
            relation = list(RELATIONS).index(prompt.relation)
            if relation % 2 == 1:
                shapes.reverse()
            return (shapes[0] + 2 * shapes[1] + relation // 2) % 4 == 0
        case "attr":
            (a, color_a), (b, color_b) = sorted(zip(shapes, colors))  # the order of the nouns does not matter
            return (a + 2 * b + color_a + 3 * color_b) % 4 == 0
    return False


# ----------------------------------------------------------------------------------------- scenes


def scenes(prompts: Iterable[Prompt], rng: Generator) -> tuple[Tensor, np.ndarray]:
    """A rendered scene for each prompt: images (n, 3, 64, 64) in [0, 1] and their layouts (n, 2, 4)."""
    layouts = random_layouts(prompts, rng)
    return render(layouts, rng), layouts


def random_layouts(prompts: Iterable[Prompt], rng: Generator) -> np.ndarray:
    """A random layout for each prompt, (n, 2, 4)."""
    return np.stack([random_layout(prompt, rng) for prompt in prompts])


def random_layout(prompt: Prompt, rng: Generator) -> np.ndarray:
    """A random layout that fits the prompt, (2, 4)."""
    cells = rng.permutation(4)  # drawn even where unused, or other scenes would come from the same seed
    if prompt.relation:
        pairs = cell_pairs(prompt.relation)
        cells = pairs[rng.integers(len(pairs))]
    result = np.full((2, 4), -1)
    for i, shape in enumerate(prompt.shapes * prompt.count):
        color = prompt.colors[i] if prompt.colors else USUAL[shape]
        result[:, cells[i]] = SHAPES.index(shape), COLOR_NAMES.index(color)
    return result


def cell_pairs(relation: str) -> list[tuple[int, int]]:
    """The cells (a, b) in which two objects are in the relation. A relation fixes one axis, the other is free."""
    rows, columns = RELATIONS[relation]
    pairs = []
    for a, b in permutations(range(4), 2):
        down, across = b // 2 - a // 2, b % 2 - a % 2
        if rows * down + columns * across == 1:
            pairs.append((a, b))
    return pairs


def render(layouts: np.ndarray, rng: Generator) -> Tensor:
    """Draw layouts (n, 2, 4) as images (n, 3, 64, 64) in [0, 1].

    Place, size, background and color of each object vary a little, so that no network can learn pixels by heart.
    """
    n = len(layouts)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size)).float()

    centre = CELL / 2 + uniform(-3.5, 3.5, 2, n, 4, 1, 1)
    radius = uniform(9, 12, n, 4, 1, 1)  # 12 + 3.5 < 16: an object stays inside its cell
    pixel = torch.arange(CELL) + 0.5
    x = pixel - centre[0]  # (n, 4, 1, 32)
    y = pixel[:, None] - centre[1]  # (n, 4, 32, 1)
    shape, color = torch.from_numpy(layouts).unbind(1)  # (n, 4) each

    distance = torch.full((n, 4, CELL, CELL), float(CELL))  # far outside, which an empty cell keeps
    for i, name in enumerate(SHAPES):
        cells = shape == i
        distance[cells] = signed_distance(name, x[cells], y[cells], radius[cells])
    cover = (0.5 - distance).clamp(0, 1)[:, :, None]  # share of each pixel inside the object: anti-aliased

    palette = torch.tensor(list(COLORS.values()))
    paint = palette[color] + uniform(-0.04, 0.04, n, 4, 3)  # of an empty cell any color, as it has no cover
    background = uniform(0.88, 0.98, n, 1, 3)
    image = paint[..., None, None] * cover + background[..., None, None] * (1 - cover)
    return rearrange(image, "n (row column) c h w -> n c (row h) (column w)", row=2).clamp(0, 1)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Pixels from points to the outline of a shape at the origin, negative inside; y points down.

    At corners the distance is only a lower bound, which anti-aliasing does not notice.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":  # about the area of the circle
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":  # corners (0, -r), (r, 0.85 r), (-r, 0.85 r)
        normal = (1.85**2 + 1) ** 0.5
        return torch.maximum((1.85 * x.abs() - (y + radius)) / normal, y - 0.85 * radius)
    bar = 0.36 * radius  # half the width of a cross's bars
    horizontal = torch.maximum(x.abs() - radius, y.abs() - bar)
    vertical = torch.maximum(x.abs() - bar, y.abs() - radius)
    return torch.minimum(horizontal, vertical)
