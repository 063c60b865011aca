"""The judge of the shapes world against scenes whose content is known; labels and losses against the judge."""

from dataclasses import replace
from itertools import combinations, permutations, product
from time import process_time

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor

from recipe import reward
from recipe.lessons import (
    add_objects,
    edit,
    edit_distance,
    fades,
    numbers_of,
    objects_of,
    paint_halves,
    training_scenes,
    truth,
    truths,
    warp,
)
from recipe.models import make_reward, make_tokenizers, token_table
from recipe.prompts import distort
from recipe.reward import attack, dense_loss, of_caption, scores, walk
from rewards import open_reward
from scorers.clip import features
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
    random_layouts,
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
def test_judge_accepts_99_5_percent_of_rendered_scenes_at_under_10_ms_each(task):
    prompts = in_turn(task)
    images, _ = scenes(prompts, default_rng(3))
    start = process_time()
    assert share(judge_images(images, prompts)) >= 0.995
    assert process_time() - start < 0.010 * len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_judge_sees_the_rendered_objects_in_99_5_percent_of_scenes(task):
    images, layouts = scenes(in_turn(task), default_rng(4))
    n_same = 0
    for objects, layout in zip(objects_in(images), layouts, strict=True):
        truth_objects = objects_of(layout)
        objects = sorted(objects, key=lambda o: (o.y > 32, o.x > 32))  # cells in reading order, as in a layout
        if [(o.shape, o.color) for o in objects] == [(o.shape, o.color) for o in truth_objects]:
            pairs = zip(objects, truth_objects, strict=True)
            n_same += all(max(abs(a.x - b.x), abs(a.y - b.y)) < 6 for a, b in pairs)
    assert n_same >= 0.995 * len(images)


@pytest.mark.parametrize("task", ["two", "count", "color", "attr"])
def test_judge_rejects_scenes_of_distorted_prompts(task):
    prompts, rng = in_turn(task), default_rng(5)
    images, _ = scenes([distort(p, rng) for p in prompts], rng)
    assert not judge_images(images, prompts).any()


def test_judge_rejects_a_redrawn_relation_unless_the_scene_happens_to_have_both():
    """a above b may also be left of it, on a diagonal: 1 in 6 of the distorted scenes."""
    prompts, rng = in_turn("position", 4 * N_SCENES), default_rng(6)
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


def test_distort_changes_one_detail_and_only_that():
    rng = default_rng(7)
    detail = dict(count="count", color="colors", position="relation", attr="colors")
    for p in PROMPTS * 5:
        distorted = distort(p, rng)
        if p.task == "single":
            assert distorted == p
        elif p.task == "two":
            assert distorted.task == "single" and distorted.shapes[0] in p.shapes
        else:
            field = detail[p.task]
            assert distorted != p and replace(distorted, **{field: getattr(p, field)}) == p


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
    assert not truth(objects).any()


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


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("task", TASKS)
def test_labels_from_the_layout_are_those_of_the_judge_in_99_percent_of_scenes(task):
    prompts = in_turn(task)
    images, layouts = scenes(prompts, default_rng(8))
    fits = truths([objects_of(layout) for layout in layouts])
    fits_by_judge = truths(objects_in(images))
    assert share((fits == fits_by_judge).all(dim=1)) >= 0.99
    assert of_caption(fits, numbers_of(prompts)).all()


def test_truth_is_the_judges_rule_for_every_prompt():
    rng = default_rng(9)
    for _ in range(100):  # any four cells, fuller than those of prompts
        shape = rng.integers(-1, len(SHAPES), 4)
        color = np.where(shape < 0, -1, rng.integers(len(COLORS), size=4))
        objects = objects_of(np.stack([shape, color]))
        assert truth(objects).tolist() == [fits_prompt(p, objects) for p in PROMPTS]
    assert not truth([]).any()
    assert not truth([Object(UNKNOWN, "red", 16, 16)]).any()


def test_training_scenes_have_the_judges_labels_and_a_quarter_to_a_half_of_right_captions():
    """Right and wrong ones, half painted, warped, and with an object more."""
    batch = training_scenes(of_all_tasks(80), default_rng(13))
    fits_by_judge = truths(objects_in(batch["images"]))
    assert share((batch["fits"] == fits_by_judge).all(dim=1)) >= 0.99
    assert 0.2 < share(of_caption(batch["fits"], batch["caption"])) < 0.5


def test_a_half_painted_scene_has_one_object_without_a_color():
    prompts = in_turn("count", 60)
    layouts = np.stack([random_layout(p, default_rng(i)) for i, p in enumerate(prompts)])
    images = paint_halves(layouts, default_rng(14))
    for prompt, objects in zip(prompts, objects_in(images), strict=True):
        assert len(objects) == prompt.count
        assert sum(o.color == UNKNOWN for o in objects) == 1
    assert not judge_images(images, prompts).any()


def test_add_objects_fills_one_empty_cell_if_there_is_one_and_changes_no_other():
    rng = default_rng(15)
    layouts = random_layouts(PROMPTS, rng)
    crowded = add_objects(layouts, rng)
    full, full_after = layouts[:, 0] >= 0, crowded[:, 0] >= 0
    n_added = full_after.sum(1) - full.sum(1)
    assert (n_added == ~full.all(1)).all()
    assert (full_after == (crowded[:, 1] >= 0)).all()
    for i in range(2):
        assert (crowded[:, i][full] == layouts[:, i][full]).all()


def test_warp_moves_pixels_and_keeps_the_range_of_colors():
    prompts = in_turn("attr", 40)
    images, _ = scenes(prompts, default_rng(16))
    warped = warp(images, default_rng(17))
    assert warped.shape == images.shape and not torch.equal(warped, images)
    assert (warped.amin((2, 3)) >= images.amin((2, 3)) - 1e-5).all()
    assert (warped.amax((2, 3)) <= images.amax((2, 3)) + 1e-5).all()
    assert 0.1 < share(judge_images(warped, prompts)) < 0.9


# ------------------------------------------------------------------------------------ edits and fades


def test_a_scene_is_no_edit_away_from_the_prompts_that_it_fits_and_an_edit_or_more_from_the_rest():
    layouts = random_layouts(PROMPTS, default_rng(18))
    distance = edit_distance(layouts)
    fits = truths([objects_of(layout) for layout in layouts]).numpy()
    assert ((distance == 0) == fits).all()
    assert distance[~fits].min() == 1


@pytest.mark.parametrize(
    ("cells", "text", "distance"),
    [
        ({0: RED_CIRCLE}, "two circles", 1),
        ({0: RED_CIRCLE}, "four circles", 3),
        ({0: RED_CIRCLE}, "a blue circle", 1),
        ({0: RED_CIRCLE, 1: BLUE_SQUARE}, "a blue circle and a red square", 2),
        ({0: RED_CIRCLE, 1: BLUE_SQUARE}, "a circle right of a square", 1),
        ({0: RED_CIRCLE, 3: RED_CIRCLE}, "a circle", 1),
        ({0: RED_CROSS}, "a blue circle", 1.5),
    ],
)
def test_edits_are_counted_as_on_fingers(cells, text, distance):
    prompt = parse_caption(f"a photo of {text}")
    distances = edit_distance(layout_of(cells)[None])
    assert distances[0, PROMPTS.index(prompt)] == distance


def test_an_edit_changes_a_layout_and_its_distance_to_any_prompt_by_two_at_most():
    rng = default_rng(19)
    layouts = random_layouts(PROMPTS, rng)
    edited_layouts = np.stack([edit(layout, rng) for layout in layouts])
    assert (edited_layouts != layouts).any((1, 2)).all()
    shape, color = edited_layouts[:, 0], edited_layouts[:, 1]
    assert ((shape >= 0) == (color >= 0)).all()
    assert (shape >= 0).any(1).all()
    assert np.abs(edit_distance(edited_layouts) - edit_distance(layouts)).max() <= 2


def test_a_fade_differs_in_two_cells_at_most_and_gains_no_more_than_its_edit():
    fade = fades(of_all_tasks(40), default_rng(20))
    difference = (fade["end"] - fade["start"]).abs().amax(1)  # (n, 64, 64)
    cells = difference.unflatten(1, (2, 32)).unflatten(3, (2, 32)).amax((2, 4))  # (n, 2, 2)
    assert ((cells > 1e-4).sum((1, 2)) <= 2).all()
    gain = of_caption(fade["gain"], fade["caption"])
    assert 0.25 < share(gain > 0) < 0.5
    assert 0.25 < share(gain < 0) < 0.5
    assert fade["gain"].abs().max() <= 2


def test_the_loss_of_fades_is_its_closed_form(monkeypatch):
    """Of two fades and three prompts: the mean over near prompts with a gain, plus that over each fade's caption."""
    start = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    end = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 1.0]])
    monkeypatch.setattr(reward, "scores", lambda model, images, text: (torch.cat([start, end]), None))
    fade = dict(
        start=torch.zeros(2, 3, 64, 64),
        end=torch.zeros(2, 3, 64, 64),
        caption=torch.tensor([0, 1]),
        gain=torch.tensor([[0.5, -1.0, 0.0], [1.0, -0.4, 0.8]]),
        near=torch.tensor([[True, True, True], [False, True, True]]),
    )
    loss = reward.fade_loss(None, None, fade, default_rng(0))

    def expected(gain: float, change: float) -> float:
        return float(np.log1p(np.exp(2.0 * (1.5 * abs(gain) - np.sign(gain) * change))))

    caption_terms = [expected(0.5, 1.0), expected(-0.4, -2.0)]
    near_terms = [*caption_terms, expected(-1.0, 0.5), expected(0.8, 0.0)]
    assert loss["loss"].item() == pytest.approx(np.mean(near_terms) + np.mean(caption_terms), rel=1e-5)
    assert loss["order"] == 1


def test_the_shipped_reward_changes_along_a_fade_in_the_direction_of_its_gain():
    prompts = of_all_tasks(40)
    fade = fades(prompts, default_rng(21))
    tiny, texts = open_reward("tiny"), [p.text for p in prompts]
    with torch.no_grad():
        change = tiny.score(fade["end"], texts) - tiny.score(fade["start"], texts)
    gain = of_caption(fade["gain"], fade["caption"])
    is_clear = gain.abs() > 0.2  # of an edit
    assert is_clear.sum() > 60
    assert share((change * gain > 0)[is_clear]) > 0.85


# ------------------------------------------------------------------------------------------- reward


def test_a_walk_goes_up_a_score_by_steps_of_0_2_to_1():
    goal, x = torch.randn(2, 5, 16, 32)

    def distance(x: Tensor) -> Tensor:
        return (x - goal).flatten(1).norm(dim=1)

    torch.manual_seed(0)
    end = walk(lambda x: -distance(x), x, steps=3)
    progress = distance(x) - distance(end)
    assert ((progress > 3 * 0.2) & (progress < 3 * 1.0)).all()
    torch.testing.assert_close(progress, (end - x).flatten(1).norm(dim=1))  # straight at the goal


@pytest.fixture(scope="module")
def fits() -> Tensor:
    """Which prompts each of 12 scenes fits, (12, 236)."""
    layouts = random_layouts(of_all_tasks(2), default_rng(10))
    return truths([objects_of(layout) for layout in layouts])


def test_dense_loss_falls_with_every_fitting_score_and_rises_with_every_other(fits):
    score = torch.from_numpy(default_rng(11).normal(2, 2, fits.shape)).requires_grad_()
    loss = dense_loss(score, fits)
    (grad,) = torch.autograd.grad(loss, score)
    assert (grad[fits] < 0).all() and (grad[~fits] > 0).all()
    for i in range(len(fits)):  # and so for whole steps, not only for small ones
        step = torch.zeros(fits.shape)
        step[i] = torch.where(fits[i], 1.0, -1.0)
        assert dense_loss(score + step, fits) < loss < dense_loss(score - step, fits)


def test_dense_loss_of_the_truth_is_nearly_zero_and_of_its_opposite_large(fits):
    truthful = torch.where(fits, 8.0, -8.0)
    assert dense_loss(truthful, fits) < 1e-3
    assert dense_loss(-truthful, fits) > 20


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """An untrained reward, 24 scenes, half of the captions wrong, and the captions' features."""
    folder = tmp_path_factory.mktemp("attack")
    make_tokenizers(folder)
    torch.manual_seed(0)
    model = make_reward(folder / "tokenizer").eval()
    with torch.no_grad():
        text = features(model.get_text_features(input_ids=token_table(folder / "tokenizer")))
    prompts = in_turn("color", 24)
    images, _ = scenes(prompts, default_rng(12))
    correct = torch.arange(24) % 2 == 0
    for i in range(1, 24, 2):
        prompts[i] = distort(prompts[i], default_rng(i))
    return model, images, text, numbers_of(prompts), correct


@pytest.mark.parametrize("radius", [0.03, 1.0, 3.0])
def test_attack_moves_each_image_by_at_most_the_radius_and_most_of_them_far(attacked, radius):
    model, images, text, caption, correct = attacked
    torch.manual_seed(1)
    moved_images = attack(model, images, text, caption, correct, radius)
    length = (moved_images - images).flatten(1).norm(dim=1)
    assert length.max() <= radius * (1 + 1e-5) and length.min() > 0
    assert length.mean() > 0.4 * radius and length.std() > 0.05 * radius  # 0.3 to 1, less what the clip removes
    assert moved_images.min() >= 0 and moved_images.max() <= 1
    assert not moved_images.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_attack_lowers_the_score_of_right_captions_and_raises_that_of_wrong_ones(attacked):
    model, images, text, caption, correct = attacked
    torch.manual_seed(2)
    moved_images = attack(model, images, text, caption, correct, 0.5)

    def caption_score(images: Tensor) -> Tensor:
        return of_caption(scores(model, images, text)[0], caption)

    with torch.no_grad():
        is_lower = caption_score(moved_images) < caption_score(images)
    assert share(is_lower == correct) > 0.9
