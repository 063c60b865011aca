"""The prompts of the shapes world, and its judge against scenes whose content is known."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor

import shapes
from recipe.lessons import distort
from shapes.judge import UNKNOWN, Object, accuracy, fits_prompt, judge_images, objects_in
from shapes.world import (
    COLOR_NAMES,
    COLORS,
    PROMPTS,
    SHAPES,
    TASKS,
    Prompt,
    by_task,
    is_held_out,
    parse_caption,
    random_layout,
    render,
    scenes,
)

OF_TASK = by_task(PROMPTS)
N_SCENES = 300  # of a task
Cells = dict[int, tuple[str, str]]  # shape and color of the object in a cell
CELLS_OF_RELATION = {  # cells of the first and of the second object
    "left of": [(0, 1), (0, 3), (2, 1), (2, 3)],
    "right of": [(1, 0), (3, 0), (1, 2), (3, 2)],
    "above": [(0, 2), (0, 3), (1, 2), (1, 3)],
    "below": [(2, 0), (3, 0), (2, 1), (3, 1)],
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def in_turn(task: str, n: int = N_SCENES) -> list[Prompt]:
    """n prompts of a task: all of them, again and again."""
    prompts = OF_TASK[task]
    return [prompts[i % len(prompts)] for i in range(n)]


def of_all_tasks(n: int) -> list[Prompt]:
    """n prompts of each task."""
    prompts = []
    for task in TASKS:
        prompts += in_turn(task, n)
    return prompts


def layout_of(cells: Cells) -> np.ndarray:
    """A layout, (2, 4)."""
    layout = np.full((2, 4), -1)
    for cell, (shape, color) in cells.items():
        layout[:, cell] = SHAPES.index(shape), COLOR_NAMES.index(color)
    return layout


def draw(cells: Cells, seed: int = 0) -> Tensor:
    """One image, (1, 3, 64, 64), by the world's own renderer."""
    return render(layout_of(cells)[None], default_rng(seed))


def judge_accepts(text: str, image: Tensor) -> bool:
    return judge_images(image, [parse_caption(text)]).item()


def cells_of(prompt: Prompt, layout: np.ndarray) -> tuple[int, ...]:
    """The cell of each shape of the prompt."""
    return tuple(int(np.argmax(layout[0] == SHAPES.index(shape))) for shape in prompt.shapes)


def share(condition: Tensor) -> float:
    return condition.float().mean().item()


# ----------------------------------------------------------------------------------------- prompts


def test_there_are_236_distinct_captions_of_six_tasks():
    captions = {p.text for p in PROMPTS}
    assert len(PROMPTS) == len(set(PROMPTS)) == len(captions) == 236
    sizes = {task: len(prompts) for task, prompts in OF_TASK.items()}
    assert sizes == dict(single=4, two=12, count=12, color=16, position=48, attr=144)
    assert tuple(OF_TASK) == TASKS


def test_captions_read_as_in_GenEval():
    assert Prompt("single", ("cross",)).text == "a photo of a cross"
    assert Prompt("two", ("circle", "square")).text == "a photo of a circle and a square"
    assert Prompt("count", ("cross",), count=3).text == "a photo of three crosses"
    assert Prompt("count", ("triangle",), count=2).text == "a photo of two triangles"
    assert Prompt("color", ("circle",), ("red",)).text == "a photo of a red circle"
    assert Prompt("position", ("circle", "square"), relation="left of").text == "a photo of a circle left of a square"
    attr = Prompt("attr", ("circle", "square"), ("red", "blue"))
    assert attr.text == "a photo of a red circle and a blue square"


def test_parse_caption_inverts_text_whatever_the_spaces():
    for p in PROMPTS:
        spaced = p.text.replace(" ", "  ")
        assert parse_caption(p.text) == parse_caption(f"  {spaced}\n") == p


@pytest.mark.parametrize(
    "text",
    ["a photo of a dog", "", "a circle", "a photo of one circle", "a photo of a red circle and a red square"],
)
def test_parse_caption_names_a_caption_outside_the_world_and_gives_an_example(text):
    with pytest.raises(ValueError, match=f"'{text}' is not one of the shapes world, e.g. 'a photo of a circle'"):
        parse_caption(text)


def test_a_quarter_of_each_compositional_task_is_held_out_and_nothing_of_single_and_two():
    for task, prompts in OF_TASK.items():
        held_out = sum(map(is_held_out, prompts)) / len(prompts)
        if task in ("single", "two"):
            assert held_out == 0
        else:
            assert 0.22 < held_out < 0.26


def test_a_scene_is_held_out_in_both_of_its_wordings():
    for p in OF_TASK["position"] + OF_TASK["attr"]:
        relation = OPPOSITE.get(p.relation, "")
        reworded = Prompt(p.task, p.shapes[::-1], p.colors[::-1], relation=relation)
        assert is_held_out(p) == is_held_out(reworded)


def test_alignment_has_no_held_out_prompts_and_evaluation_only_those_of_the_tasks_that_hold_some_out():
    shares = dict(single=2, two=3, count=3, color=2, position=3, attr=3)
    folder = Path(shapes.__file__).parent
    for name, is_evaluation in (("train-prompts.txt", False), ("eval-prompts.txt", True)):
        lines = Counter((folder / name).read_text().splitlines())
        for task, prompts in OF_TASK.items():
            expected = [p.text for p in prompts if is_held_out(p) == is_evaluation or task in ("single", "two")]
            counts = [lines.pop(caption) for caption in expected]
            assert sum(counts) == (60 if is_evaluation else 144 * shares[task])
            assert max(counts) - min(counts) <= 1
        assert not lines


def test_every_word_of_a_held_out_prompt_occurs_in_the_aligned_prompts_of_its_task():
    for prompts in OF_TASK.values():
        words, aligned_words = set(), set()
        for p in prompts:
            words |= set(p.text.split())
            if not is_held_out(p):
                aligned_words |= set(p.text.split())
        assert words == aligned_words


# ------------------------------------------------------------------------------------------ scenes


def test_each_layout_obeys_its_prompt():
    rng = default_rng(0)
    for p in PROMPTS:
        occupied = set()
        for _ in range(40):
            layout = random_layout(p, rng)
            shape, color = layout
            full = shape >= 0
            assert ((color >= 0) == full).all()
            assert sorted(SHAPES[s] for s in shape[full]) == sorted(p.shapes * p.count)
            if p.task == "count":
                assert len(set(color[full])) == 1
            cells = cells_of(p, layout)
            if p.colors:
                assert [COLOR_NAMES[color[cell]] for cell in cells] == list(p.colors)
            if p.relation:
                assert cells in CELLS_OF_RELATION[p.relation]
            occupied.add(tuple(np.flatnonzero(full)))
        assert len(occupied) > 1 or p.count == 4  # objects are not always in the same cells


def test_rendering_depends_on_the_generator_alone_and_stays_in_0_1():
    prompts = of_all_tasks(50)
    images, layouts = scenes(prompts, default_rng(1))
    repeated_images, repeated_layouts = scenes(prompts, default_rng(1))
    assert torch.equal(images, repeated_images) and np.array_equal(layouts, repeated_layouts)
    assert not torch.equal(images, scenes(prompts, default_rng(2))[0])
    assert images.shape == (300, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


# ------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("task", TASKS)
def test_judge_sees_the_rendered_objects_and_accepts_99_5_percent_of_scenes_at_under_10_ms_each(task):
    prompts = in_turn(task)
    images, layouts = scenes(prompts, default_rng(3))
    start = process_time()
    objects_of_images = objects_in(images)
    assert process_time() - start < 0.010 * len(prompts)
    n_seen, n_accepted = 0, 0
    for prompt, objects, layout in zip(prompts, objects_of_images, layouts, strict=True):
        expected = []
        for cell, (shape, color) in enumerate(layout.T):
            if shape >= 0:
                expected.append((cell, SHAPES[shape], COLOR_NAMES[color]))
        seen = sorted((2 * (o.y > 32) + (o.x > 32), o.shape, o.color) for o in objects)
        is_central = all(max(abs(o.x % 32 - 16), abs(o.y % 32 - 16)) < 6 for o in objects)
        n_seen += is_central and seen == expected
        n_accepted += fits_prompt(prompt, objects)
    assert min(n_seen, n_accepted) >= 0.995 * len(prompts)


@pytest.mark.parametrize("task", ["two", "count", "color", "attr"])
def test_judge_rejects_scenes_of_distorted_prompts(task):
    prompts, rng = in_turn(task), default_rng(5)
    images, _ = scenes([distort(p, rng) for p in prompts], rng)
    assert not judge_images(images, prompts).any()


def test_judge_rejects_a_redrawn_relation_unless_the_scene_happens_to_have_both():
    """a above b may also be left of it, on a diagonal: 1 in 6 of the distorted scenes."""
    prompts, rng = in_turn("position", 2 * N_SCENES), default_rng(6)
    distorted = [distort(p, rng) for p in prompts]
    images, layouts = scenes(distorted, rng)
    accepted = judge_images(images, prompts)
    fits, opposite = [], []
    for prompt, distorted_prompt, layout in zip(prompts, distorted, layouts, strict=True):
        fits.append(cells_of(prompt, layout) in CELLS_OF_RELATION[prompt.relation])
        opposite.append(distorted_prompt.relation == OPPOSITE[prompt.relation])
    fits, opposite = torch.tensor(fits), torch.tensor(opposite)
    assert share(accepted == fits) >= 0.995
    assert opposite.any() and not accepted[opposite].any()
    assert share(fits) == pytest.approx(1 / 6, abs=0.04)


RED_CIRCLE, RED_SQUARE, RED_CROSS = ("circle", "red"), ("square", "red"), ("cross", "red")
BLUE_CIRCLE, BLUE_SQUARE, BLUE_CROSS = ("circle", "blue"), ("square", "blue"), ("cross", "blue")


@pytest.mark.parametrize(
    ("text", "scene", "near_miss"),
    [
        ("a circle", {1: RED_CIRCLE}, {1: RED_SQUARE}),
        ("a circle", {1: RED_CIRCLE}, {}),
        ("a circle", {1: RED_CIRCLE}, {1: RED_CIRCLE, 2: RED_CIRCLE}),
        ("a circle", {3: RED_CIRCLE}, {3: RED_CIRCLE, 0: BLUE_CROSS}),
        ("a red circle", {0: RED_CIRCLE}, {0: ("circle", "yellow")}),
        ("a red circle", {0: RED_CIRCLE}, {0: RED_CIRCLE, 3: RED_SQUARE}),
        ("a circle and a square", {0: RED_CIRCLE, 3: RED_SQUARE}, {0: RED_CIRCLE}),
        ("a circle and a square", {0: RED_CIRCLE, 3: RED_SQUARE}, {0: RED_CIRCLE, 3: RED_SQUARE, 1: BLUE_SQUARE}),
        ("three crosses", dict.fromkeys((0, 1, 3), RED_CROSS), dict.fromkeys((0, 1), RED_CROSS)),
        ("three crosses", dict.fromkeys((0, 1, 3), RED_CROSS), dict.fromkeys(range(4), RED_CROSS)),
        ("three crosses", dict.fromkeys((0, 1, 3), RED_CROSS), {0: RED_CROSS, 1: RED_CROSS, 3: RED_CIRCLE}),
        ("a circle left of a square", {0: RED_CIRCLE, 3: RED_SQUARE}, {1: RED_CIRCLE, 2: RED_SQUARE}),
        # In one column: neither left nor right.
        ("a circle left of a square", {2: RED_CIRCLE, 3: RED_SQUARE}, {0: RED_CIRCLE, 2: RED_SQUARE}),
        ("a circle below a square", {3: RED_CIRCLE, 1: RED_SQUARE}, {1: RED_CIRCLE, 3: RED_SQUARE}),
        ("a red circle and a blue square", {0: RED_CIRCLE, 1: BLUE_SQUARE}, {0: BLUE_CIRCLE, 1: RED_SQUARE}),
        ("a red circle and a blue square", {0: RED_CIRCLE, 1: BLUE_SQUARE}, {0: RED_CIRCLE, 1: RED_SQUARE}),
    ],
)
def test_judge_accepts_the_scene_of_the_caption_and_rejects_a_near_miss(text, scene, near_miss):
    for seed in range(10):
        assert judge_accepts(f"a photo of {text}", draw(scene, seed))
        assert not judge_accepts(f"a photo of {text}", draw(near_miss, seed))


@pytest.mark.parametrize("colors", list(combinations(COLORS, 2)))
def test_judge_sees_no_color_in_a_blend_of_two(colors):
    for seed, shape in product(range(5), SHAPES):
        a, b = (draw({0: (shape, color)}, seed) for color in colors)
        blend = (a + b) / 2
        assert [o.color for o in objects_in(blend)[0]] == [UNKNOWN]
        assert not judge_accepts(f"a photo of a {shape}", blend)


@pytest.mark.parametrize("colors", list(combinations(COLORS, 2)))
def test_judge_sees_the_shape_but_no_color_in_an_object_of_two_halves(colors):
    for seed, shape in product(range(5), SHAPES):
        a, b = (draw({0: (shape, color)}, seed) for color in colors)
        a[..., :16, :] = b[..., :16, :]
        (halved,) = objects_in(a)[0]
        assert (halved.shape, halved.color) == (shape, UNKNOWN)


def painted(mask: Tensor) -> Tensor:
    """A light picture with the mask in red, (1, 3, 64, 64)."""
    background = torch.full((1, 3, 64, 64), 0.93)
    return paint_over(background, mask, "red")


def paint_over(image: Tensor, mask: Tensor, color: str) -> Tensor:
    return torch.where(mask, torch.tensor(COLORS[color])[:, None, None], image)


Y, X = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
CIRCLE_DISTANCE = (Y - 16).hypot(X - 16)
SQUARE_DISTANCE = (Y - 16).abs().maximum((X - 16).abs())
BLOBS = {
    "diagonal stroke": ((Y - X).abs() < 4) & (X > 4) & (X < 26),
    "ring": (CIRCLE_DISTANCE < 12) & (CIRCLE_DISTANCE > 8),
    "frame": (SQUARE_DISTANCE < 12) & (SQUARE_DISTANCE > 8),
    "L": (X > 4) & (Y > 4) & (X < 28) & (Y < 28) & ((X < 9) | (Y > 23)),
    "bar": ((Y - 16).abs() < 5) & ((X - 32).abs() < 26),
    "slab": ((Y - 32).abs() < 22) & ((X - 32).abs() < 22),
    "everything but a circle": (Y - 48).hypot(X - 48) > 10,
    "nothing": X < 0,
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_fits_no_prompt(name):
    objects = objects_in(painted(BLOBS[name]))[0]
    assert not any(fits_prompt(p, objects) for p in PROMPTS)


@pytest.mark.parametrize(("shape", "color", "strength"), [("cross", "blue", 0.3), ("square", "yellow", 0.2)])
def test_judge_rejects_a_faint_object_beside_the_right_one(shape, color, strength):
    crowded = draw({3: RED_CIRCLE, 0: (shape, color)})
    faint = torch.lerp(draw({3: RED_CIRCLE}), crowded, strength)
    assert not judge_accepts("a photo of a red circle", faint)


def test_judge_rejects_a_blob_beside_the_right_object_and_overlooks_a_speck():
    square, corner, speck = torch.zeros(3, 64, 64, dtype=torch.bool)
    square[5:11, 5:11] = True  # 36 pixels
    corner[5:25, 5:8] = corner[22:25, 5:25] = True
    speck[5:9, 5:9] = True  # 16 pixels
    for mask, is_accepted in ((square, False), (corner, False), (speck, True)):
        image = paint_over(draw({3: RED_CIRCLE}), mask, "blue")
        assert judge_accepts("a photo of a red circle", image) is is_accepted


@pytest.mark.parametrize(
    ("p", "shape"), [(2, "circle"), (2.75, UNKNOWN), (3.0, UNKNOWN), (3.25, UNKNOWN), (16.0, "square")]
)
def test_halfway_from_a_circle_to_a_square_there_is_no_shape(p, shape):
    """|x|^p + |y|^p = r^p is a circle for p = 2 and a square for infinity."""
    mask = (X - 15.5).abs() ** p + (Y - 15.5).abs() ** p <= 11.0**p
    assert objects_in(painted(mask))[0][0].shape == shape


def test_two_objects_that_touch_are_not_two():
    circles = ((Y - 16).hypot(X - 16) < 10) | ((Y - 16).hypot(X - 48) < 10)
    bridge = (Y - 16).abs().lt(3) & (X > 16) & (X < 48)
    assert judge_accepts("a photo of two circles", painted(circles))
    assert not judge_accepts("a photo of two circles", painted(circles | bridge))


@pytest.mark.parametrize(
    ("x", "y", "fits"),
    [(29, 20, True), (27, 20, False), (20, 60, False), (29, 60, True), (11, 20, False)],
)
def test_a_relation_needs_a_clear_offset_along_its_own_axis(x, y, fits):
    prompt = parse_caption("a photo of a circle left of a square")
    objects = [Object("circle", "red", 20.0, 20.0), Object("square", "red", x, y)]
    for order in permutations(objects):
        assert fits_prompt(prompt, order) is fits


def test_an_object_of_unknown_shape_or_color_fits_no_prompt():
    prompt = parse_caption("a photo of a circle")
    circle = Object("circle", "red", 20.0, 20.0)
    assert fits_prompt(prompt, [circle])
    for unknown in (replace(circle, shape=UNKNOWN), replace(circle, color=UNKNOWN)):
        assert not fits_prompt(prompt, [unknown])
        assert not fits_prompt(prompt, [circle, unknown])


def test_overall_accuracy_is_the_mean_of_the_tasks_as_in_GenEval_not_of_the_images():
    prompts = [*in_turn("single", 1), *in_turn("two", 4), *in_turn("attr", 5)]
    correct = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    expected = dict(overall=(1 + 1 / 4 + 2 / 5) / 3, single=1, two=1 / 4, attr=2 / 5)
    assert accuracy(correct, prompts) == pytest.approx(expected)


def test_judge_refuses_another_number_of_prompts_than_of_images():
    with pytest.raises(ValueError, match="zip"):
        judge_images(draw({}), PROMPTS[:2])
