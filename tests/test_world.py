"""The judge of the shapes world against scenes whose content is known; truth and the loss against the judge."""

from dataclasses import replace
from itertools import combinations, product
from time import process_time

import numpy as np
import pytest
import torch
from torch import Tensor

from recipe import reward
from recipe.lessons import (
    bent,
    edited,
    edits,
    fades,
    half_painted,
    objects_of,
    rendered,
    truth,
    with_one_more,
)
from recipe.models import make_reward, make_tokenizers, token_table
from recipe.reward import attack, dense_loss, scores, walk
from rewards import open_reward
from scorers.clip import features
from shapes.judge import Object, accuracy, is_right, judge, objects_in
from shapes.world import (
    COLORS,
    NUMBER,
    PROMPTS,
    SHAPES,
    TASKS,
    Prompt,
    all_prompts,
    by_task,
    distort,
    is_held_out,
    layout,
    parse,
    render,
    scenes,
)

OF_TASK = by_task(all_prompts())
EACH = 300  # scenes a task
Cells = dict[int, tuple[str, str]]  # what is drawn in a cell: shape, color
LEFT, ABOVE = [(0, 1), (0, 3), (2, 1), (2, 3)], [(0, 2), (0, 3), (1, 2), (1, 3)]  # cells of a, b
PLACES = {
    "left of": LEFT,
    "right of": [(b, a) for a, b in LEFT],
    "above": ABOVE,
    "below": [(b, a) for a, b in ABOVE],
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spread(task: str, n: int = EACH) -> list[Prompt]:
    """n prompts of a task, all of them in turn."""
    return [OF_TASK[task][i % len(OF_TASK[task])] for i in range(n)]


def draw(cells: Cells, seed: int = 0) -> Tensor:
    """One image, (1, 3, 64, 64), by the world's own renderer."""
    shape, color = np.full((1, 4), -1), np.full((1, 4), -1)
    for cell, (s, c) in cells.items():
        shape[0, cell], color[0, cell] = SHAPES.index(s), list(COLORS).index(c)
    return render(shape, color, generator(seed))


def says(text: str, cells: Cells, seed: int = 0) -> bool:
    """What the judge says of a picture of these cells."""
    return judge(draw(cells, seed), [parse(text)]).item()


# ----------------------------------------------------------------------------------------- prompts


def test_there_are_236_distinct_captions_of_six_tasks():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == len({p.text for p in prompts}) == 236
    sizes = dict(single=4, two=12, count=12, color=16, position=48, attr=144)
    assert {t: len(ps) for t, ps in OF_TASK.items()} == sizes and tuple(OF_TASK) == TASKS


def test_captions_read_as_in_GenEval():
    assert Prompt("single", ("cross",)).text == "a photo of a cross"
    assert Prompt("two", ("circle", "square")).text == "a photo of a circle and a square"
    assert Prompt("count", ("cross",), count=3).text == "a photo of three crosses"
    assert Prompt("count", ("triangle",), count=2).text == "a photo of two triangles"
    assert Prompt("color", ("circle",), ("red",)).text == "a photo of a red circle"
    assert Prompt("position", ("circle", "square"), relation="left of").text == "a photo of a circle left of a square"
    two = Prompt("attr", ("circle", "square"), ("red", "blue"))
    assert two.text == "a photo of a red circle and a blue square"


def test_parse_inverts_text_whatever_the_spaces():
    for p in all_prompts():
        assert parse(p.text) == parse(f"  {p.text.replace(' ', '  ')}\n") == p


@pytest.mark.parametrize(
    "text",
    ["a photo of a dog", "", "a circle", "a photo of one circle", "a photo of a red circle and a red square"],
)
def test_parse_rejects_other_captions_naming_them_and_an_example(text):
    with pytest.raises(ValueError, match=f"'{text}' is not one of the shapes world, e.g. 'a photo of a circle'"):
        parse(text)


def test_a_quarter_of_each_compositional_task_is_held_out_and_nothing_of_the_others():
    for task, prompts in OF_TASK.items():
        share = sum(map(is_held_out, prompts)) / len(prompts)
        assert share == 0 if task in ("single", "two") else 0.22 < share < 0.26


def test_a_scene_is_held_out_in_both_of_its_wordings():
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "": ""}
    for p in OF_TASK["position"] + OF_TASK["attr"]:
        other = Prompt(p.task, p.shapes[::-1], p.colors[::-1], relation=mirror[p.relation])
        assert is_held_out(p) == is_held_out(other)


def test_every_word_of_a_held_out_prompt_occurs_among_the_aligned_of_its_task():
    for prompts in OF_TASK.values():
        aligned = {word for p in prompts if not is_held_out(p) for word in p.text.split()}
        assert {word for p in prompts for word in p.text.split()} == aligned


# ------------------------------------------------------------------------------------------ scenes


def test_each_layout_obeys_its_prompt():
    rng = generator()
    for p in all_prompts():
        places = set()
        for _ in range(40):
            shape, color = layout(p, rng)
            full = shape >= 0
            assert ((color >= 0) == full).all()
            assert sorted(SHAPES[s] for s in shape[full]) == sorted(p.shapes * p.count)
            if p.task == "count":
                assert len(set(color[full])) == 1
            where = [int(np.argmax(shape == SHAPES.index(s))) for s in p.shapes]
            if p.colors:
                assert [list(COLORS)[color[w]] for w in where] == list(p.colors)
            if p.relation:
                assert tuple(where) in PLACES[p.relation]
            places.add(tuple(np.flatnonzero(full)))
        assert len(places) > 1 or p.count == 4  # objects are not always in the same cells


def test_rendering_depends_on_the_generator_alone_and_stays_in_0_1():
    prompts = [p for t in TASKS for p in spread(t, 50)]
    first, *cells = scenes(prompts, generator(1))
    again, *same_cells = scenes(prompts, generator(1))
    other, *_ = scenes(prompts, generator(2))
    assert torch.equal(first, again) and np.array_equal(cells, same_cells) and not torch.equal(first, other)
    assert first.shape == (300, 3, 64, 64) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1


# ------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("task", TASKS)
def test_judge_accepts_99_5_percent_of_rendered_scenes_at_under_10_ms_each(task):
    prompts = spread(task)
    images, *_ = scenes(prompts, generator(3))
    start = process_time()
    right = judge(images, prompts).float().mean().item()
    assert right >= 0.995
    assert process_time() - start < 0.010 * len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_judge_sees_what_was_drawn_in_99_5_percent_of_rendered_scenes(task):
    images, shape, color = scenes(spread(task), generator(4))
    same = 0
    for seen, s, c in zip(objects_in(images), shape, color, strict=True):
        drawn = objects_of(s, c)
        seen = sorted(seen, key=lambda o: (o.y > 32, o.x > 32))  # cells in reading order, as drawn
        same += [(o.shape, o.color) for o in seen] == [(o.shape, o.color) for o in drawn] and all(
            max(abs(a.x - b.x), abs(a.y - b.y)) < 6 for a, b in zip(seen, drawn, strict=True)
        )
    assert same >= 0.995 * len(images)


@pytest.mark.parametrize("task", ["two", "count", "color", "attr"])
def test_judge_rejects_what_distort_changes(task):
    prompts, rng = spread(task), generator(5)
    images, *_ = scenes([distort(p, rng) for p in prompts], rng)
    assert not judge(images, prompts).any()


def test_judge_rejects_a_redrawn_relation_unless_the_scene_happens_to_have_both():
    """a above b may also be left of it, on a diagonal: 1 in 6 of the distorted scenes."""
    prompts, rng = spread("position", 4 * EACH), generator(6)
    distorted = [distort(p, rng) for p in prompts]
    images, shape, _ = scenes(distorted, rng)
    where = [tuple(int(np.argmax(s == SHAPES.index(name))) for name in p.shapes) for p, s in zip(prompts, shape)]
    fits = torch.tensor([w in PLACES[p.relation] for p, w in zip(prompts, where, strict=True)])
    right = judge(images, prompts)
    assert (right == fits).float().mean() >= 0.995
    opposite = torch.tensor([d.relation == OPPOSITE[p.relation] for p, d in zip(prompts, distorted, strict=True)])
    assert opposite.any() and not right[opposite].any()
    assert fits.float().mean().item() == pytest.approx(1 / 6, abs=0.04)


def test_distort_changes_one_detail_and_only_that():
    rng = generator(7)
    for p in all_prompts() * 5:
        seen = distort(p, rng)
        if p.task == "single":
            assert seen == p
        elif p.task == "two":
            assert seen.task == "single" and seen.shapes[0] in p.shapes
        else:
            detail = dict(count="count", color="colors", position="relation", attr="colors")[p.task]
            assert seen != p and replace(seen, **{detail: getattr(p, detail)}) == p


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("a photo of a circle", {1: ("circle", "red")}, {1: ("square", "red")}),
        ("a photo of a circle", {1: ("circle", "red")}, {}),
        ("a photo of a circle", {1: ("circle", "red")}, {1: ("circle", "red"), 2: ("circle", "red")}),
        ("a photo of a circle", {3: ("circle", "red")}, {3: ("circle", "red"), 0: ("cross", "blue")}),
        ("a photo of a red circle", {0: ("circle", "red")}, {0: ("circle", "yellow")}),
        ("a photo of a red circle", {0: ("circle", "red")}, {0: ("circle", "red"), 3: ("square", "red")}),
        (
            "a photo of a circle and a square",
            {0: ("circle", "red"), 3: ("square", "red")},
            {0: ("circle", "red")},
        ),
        (
            "a photo of a circle and a square",
            {0: ("circle", "red"), 3: ("square", "red")},
            {0: ("circle", "red"), 3: ("square", "red"), 1: ("square", "blue")},
        ),
        (
            "a photo of three crosses",
            {0: ("cross", "red"), 1: ("cross", "red"), 3: ("cross", "red")},
            {0: ("cross", "red"), 1: ("cross", "red")},
        ),
        (
            "a photo of three crosses",
            {0: ("cross", "red"), 1: ("cross", "red"), 3: ("cross", "red")},
            dict.fromkeys(range(4), ("cross", "red")),
        ),
        (
            "a photo of three crosses",
            {0: ("cross", "red"), 1: ("cross", "red"), 3: ("cross", "red")},
            {0: ("cross", "red"), 1: ("cross", "red"), 3: ("circle", "red")},
        ),
        (
            "a photo of a circle left of a square",
            {0: ("circle", "red"), 3: ("square", "red")},
            {1: ("circle", "red"), 2: ("square", "red")},
        ),
        (
            "a photo of a circle left of a square",
            {2: ("circle", "red"), 3: ("square", "red")},
            {0: ("circle", "red"), 2: ("square", "red")},  # in one column: neither left nor right
        ),
        (
            "a photo of a circle below a square",
            {3: ("circle", "red"), 1: ("square", "red")},
            {1: ("circle", "red"), 3: ("square", "red")},
        ),
        (
            "a photo of a red circle and a blue square",
            {0: ("circle", "red"), 1: ("square", "blue")},
            {0: ("circle", "blue"), 1: ("square", "red")},
        ),
        (
            "a photo of a red circle and a blue square",
            {0: ("circle", "red"), 1: ("square", "blue")},
            {0: ("circle", "red"), 1: ("square", "red")},
        ),
    ],
)
def test_judge_accepts_the_scene_asked_for_and_rejects_a_near_miss(text, right, wrong):
    for seed in range(10):
        assert says(text, right, seed) and not says(text, wrong, seed)


@pytest.mark.parametrize(("one", "other"), list(combinations(COLORS, 2)))
def test_judge_knows_no_color_in_a_blend_of_two(one, other):
    for seed, shape in product(range(5), SHAPES):
        blend = (draw({0: (shape, one)}, seed) + draw({0: (shape, other)}, seed)) / 2
        assert [o.color for o in objects_in(blend)[0]] == ["?"]
        assert not judge(blend, [parse(f"a photo of a {shape}")]).item()


def painted(mask: Tensor) -> Tensor:
    """A light picture with the mask in red, (1, 3, 64, 64)."""
    red = torch.tensor(COLORS["red"])[:, None, None]
    return torch.where(mask, red, torch.full((3, 64, 64), 0.93))[None]


Y, X = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
BLOBS = {
    "diagonal stroke": ((Y - X).abs() < 4) & (X > 4) & (X < 26),
    "ring": ((Y - 16).hypot(X - 16) < 12) & ((Y - 16).hypot(X - 16) > 8),
    "frame": ((Y - 16).abs().maximum((X - 16).abs()) < 12) & ((Y - 16).abs().maximum((X - 16).abs()) > 8),
    "L": (X > 4) & (Y > 4) & (X < 28) & (Y < 28) & ((X < 9) | (Y > 23)),
    "bar": ((Y - 16).abs() < 5) & ((X - 32).abs() < 26),
    "slab": ((Y - 32).abs() < 22) & ((X - 32).abs() < 22),
    "everything but a circle": (Y - 48).hypot(X - 48) > 10,
    "nothing": X < 0,
}


@pytest.mark.parametrize("name", BLOBS)
def test_judge_finds_no_prompt_that_a_blob_fits(name):
    seen = objects_in(painted(BLOBS[name]))[0]
    assert not any(is_right(p, seen) for p in PROMPTS)
    assert not truth(seen).any()


def test_a_faint_or_a_small_thing_beside_the_object_asked_for_is_seen():
    image, prompt = draw({3: ("circle", "red")}), parse("a photo of a red circle")
    for other, strength in (({0: ("cross", "blue")}, 0.3), ({0: ("square", "yellow")}, 0.2)):
        faint = torch.lerp(image, draw({3: ("circle", "red")} | other), strength)
        assert not judge(faint, [prompt]).item()
    small = torch.zeros(64, 64, dtype=torch.bool)
    small[5:11, 5:11] = True
    assert not judge(torch.where(small, torch.tensor(COLORS["blue"])[:, None, None], image), [prompt]).item()


@pytest.mark.parametrize(("one", "other"), list(combinations(COLORS, 2)))
def test_an_object_of_two_colors_has_none_unless_the_second_is_a_rim(one, other):
    for seed, shape in product(range(5), SHAPES):
        half = draw({0: (shape, one)}, seed)
        half[..., :16, :] = draw({0: (shape, other)}, seed)[..., :16, :]
        assert [o.color for o in objects_in(half)[0]] == ["?"]
        assert [o.shape for o in objects_in(half)[0]] == [shape]


def test_halfway_from_a_circle_to_a_square_there_is_no_shape():
    """|x|^p + |y|^p = r^p is a circle for p = 2 and a square for infinity."""

    def seen(p: float) -> str:
        return objects_in(painted(((X - 15.5).abs() ** p + (Y - 15.5).abs() ** p) <= 11.0**p))[0][0].shape

    assert [seen(p) for p in (2, 2.75, 3.0, 3.25, 16.0)] == ["circle", "?", "?", "?", "square"]


def test_two_objects_that_touch_are_not_two():
    circles = ((Y - 16).hypot(X - 16) < 10) | ((Y - 16).hypot(X - 48) < 10)
    bridge = (Y - 16).abs().lt(3) & (X > 16) & (X < 48)
    two = [parse("a photo of two circles")]
    assert judge(painted(circles), two).item() and not judge(painted(circles | bridge), two).item()


def test_a_blob_beside_the_object_asked_for_is_wrong_and_a_speck_is_not():
    image = draw({3: ("circle", "red")})
    blob, speck = (torch.zeros(64, 64, dtype=torch.bool) for _ in range(2))
    blob[5:25, 5:8] = blob[22:25, 5:25] = True
    speck[5:9, 5:9] = True  # 16 pixels
    for mask, right in ((blob, False), (speck, True)):
        marked = torch.where(mask, torch.tensor(COLORS["blue"])[:, None, None], image)
        assert judge(marked, [parse("a photo of a red circle")]).item() is right


def test_is_right_needs_a_clear_offset_along_the_relations_own_axis():
    prompt = parse("a photo of a circle left of a square")
    a = Object("circle", "red", 20.0, 20.0)
    for x, y, right in [(29, 20, True), (27, 20, False), (20, 60, False), (29, 60, True), (11, 20, False)]:
        for objects in ([a, Object("square", "red", x, y)], [Object("square", "red", x, y), a]):
            assert is_right(prompt, objects) is right


def test_is_right_rejects_whatever_it_cannot_recognise():
    circle = Object("circle", "red", 20.0, 20.0)
    assert is_right(parse("a photo of a circle"), [circle])
    for unknown in (replace(circle, shape="?"), replace(circle, color="?")):
        assert not is_right(parse("a photo of a circle"), [unknown])
        assert not is_right(parse("a photo of a circle"), [circle, unknown])


def test_accuracy_is_the_mean_of_the_tasks_as_in_GenEval_not_of_the_images():
    prompts = [*spread("single", 1), *spread("two", 4), *spread("attr", 5)]
    right = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    expected = dict(overall=(1 + 1 / 4 + 2 / 5) / 3, single=1, two=1 / 4, attr=2 / 5)
    assert accuracy(right, prompts) == pytest.approx(expected)


def test_judge_refuses_as_many_prompts_as_there_are_not_images():
    with pytest.raises(ValueError, match="zip"):
        judge(draw({}), PROMPTS[:2])


# ------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("task", TASKS)
def test_truth_of_the_layout_is_truth_of_what_the_judge_sees_in_99_percent(task):
    prompts = spread(task)
    images, shape, color = scenes(prompts, generator(8))
    drawn = torch.stack([truth(objects_of(s, c)) for s, c in zip(shape, color, strict=True)])
    seen = torch.stack([truth(objects) for objects in objects_in(images)])
    assert (drawn == seen).all(dim=1).float().mean() >= 0.99
    assert drawn[range(len(prompts)), [NUMBER[p] for p in prompts]].all()


def test_truth_is_the_judges_rule_for_every_prompt():
    rng = generator(9)
    for _ in range(100):  # any four cells, more than prompts ask for
        shape = rng.integers(-1, len(SHAPES), 4)
        objects = objects_of(shape, np.where(shape < 0, -1, rng.integers(len(COLORS), size=4)))
        assert truth(objects).tolist() == [is_right(p, objects) for p in PROMPTS]
    assert not truth([]).any() and not truth([Object("?", "red", 16, 16)]).any()


# ------------------------------------------------------------------------------------------ reward


def test_what_the_reward_is_taught_of_rendered_scenes_is_what_the_judge_says():
    """Right and wrong ones, half painted, bent, and with an object more."""
    made = rendered([p for t in TASKS for p in spread(t, 80)], generator(13))
    seen = torch.stack([truth(objects) for objects in objects_in(made["images"])])
    assert (made["fits"] == seen).all(dim=1).float().mean() >= 0.99
    right = made["fits"][torch.arange(480), made["caption"]]
    assert 0.2 < right.float().mean() < 0.5


def test_a_half_painted_scene_differs_in_one_object_which_has_no_color():
    prompts = spread("count", 60)
    shape, color = (np.stack(a) for a in zip(*(layout(p, generator(i)) for i, p in enumerate(prompts)), strict=True))
    images = half_painted(shape, color, generator(14))
    for prompt, objects in zip(prompts, objects_in(images), strict=True):
        assert sorted(o.color == "?" for o in objects) == [False] * (prompt.count - 1) + [True]
    assert not judge(images, prompts).any()


def test_with_one_more_fills_an_empty_cell_if_there_is_one():
    rng = generator(15)
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in all_prompts()), strict=True))
    more = shape.copy(), color.copy()
    with_one_more(*more, rng)
    added = (more[0] >= 0).sum(1) - (shape >= 0).sum(1)
    assert (added == ((shape < 0).any(1))).all() and ((more[0] >= 0) == (more[1] >= 0)).all()
    assert (more[0][shape >= 0] == shape[shape >= 0]).all() and (more[1][shape >= 0] == color[shape >= 0]).all()


def test_bent_pulls_by_pixels_and_keeps_colors():
    images, *_ = scenes(spread("attr", 40), generator(16))
    pulled = bent(images, generator(17))
    assert pulled.shape == images.shape and not torch.equal(pulled, images)
    assert (pulled.amin((2, 3)) >= images.amin((2, 3)) - 1e-5).all()
    assert (pulled.amax((2, 3)) <= images.amax((2, 3)) + 1e-5).all()
    assert 0.1 < judge(pulled, spread("attr", 40)).float().mean() < 0.9


def test_a_scene_is_no_edit_away_from_the_prompts_that_it_fits_and_an_edit_or_more_from_others():
    rng = generator(18)
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in all_prompts()), strict=True))
    away = edits(shape, color)
    fits = torch.stack([truth(objects_of(s, c)) for s, c in zip(shape, color, strict=True)]).numpy()
    assert ((away == 0) == fits).all() and away[~fits].min() == 1


@pytest.mark.parametrize(
    ("cells", "text", "away"),
    [
        ({0: ("circle", "red")}, "two circles", 1),
        ({0: ("circle", "red")}, "four circles", 3),
        ({0: ("circle", "red")}, "a blue circle", 1),
        ({0: ("circle", "red"), 1: ("square", "blue")}, "a blue circle and a red square", 2),
        ({0: ("circle", "red"), 1: ("square", "blue")}, "a circle right of a square", 1),
        ({0: ("circle", "red"), 3: ("circle", "red")}, "a circle", 1),
        ({0: ("cross", "red")}, "a blue circle", 1.5),
    ],
)
def test_edits_are_counted_as_one_would_on_fingers(cells, text, away):
    shape, color = np.full((1, 4), -1), np.full((1, 4), -1)
    for cell, (s, c) in cells.items():
        shape[0, cell], color[0, cell] = SHAPES.index(s), list(COLORS).index(c)
    assert edits(shape, color)[0, NUMBER[parse(f"a photo of {text}")]] == away


def test_one_edit_changes_what_a_scene_is_away_from_any_prompt_by_two_at_most():
    rng = generator(19)
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in all_prompts()), strict=True))
    after = edited(shape, color, rng)
    assert ((after[0] != shape) | (after[1] != color)).any(1).all()
    assert (((after[0] >= 0) == (after[1] >= 0)) & ((after[0] >= 0).sum(1) >= 1)[:, None]).all()
    assert np.abs(edits(*after) - edits(shape, color)).max() <= 2


def test_a_fade_differs_in_a_cell_or_two_and_gains_no_more_than_its_edit():
    asked = [p for t in TASKS for p in spread(t, 40)]
    fade = fades(asked, generator(20))
    differ = (fade["end"] - fade["start"]).abs().amax(1).unflatten(1, (2, 32)).unflatten(3, (2, 32)).amax((2, 4))
    assert set((differ > 1e-4).sum((1, 2)).tolist()) <= {0, 1, 2}
    gain = fade["gain"].gather(1, fade["caption"][:, None])
    assert 0.25 < (gain > 0).float().mean() < 0.5 and 0.25 < (gain < 0).float().mean() < 0.5
    assert fade["gain"].abs().max() <= 2


def test_the_loss_of_fades_is_its_closed_form(monkeypatch):
    """Of two fades and three prompts: what counts is near and gains, and once more each fade's own caption."""
    start = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    end = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 1.0]])
    monkeypatch.setattr(reward, "scores", lambda model, images, text: (torch.cat([start, end]), None))
    fade = dict(start=torch.zeros(2, 3, 64, 64), end=torch.zeros(2, 3, 64, 64), caption=torch.tensor([0, 1]),
                gain=torch.tensor([[0.5, -1.0, 0.0], [1.0, -0.4, 0.8]]),
                near=torch.tensor([[True, True, True], [False, True, True]]))  # fmt: skip
    loss = reward.fade_loss(None, None, fade, generator(0))

    def missed(gain: float, change: float) -> float:
        return float(np.log1p(np.exp(2.0 * (1.5 * abs(gain) - np.sign(gain) * change))))

    own = [missed(0.5, 1.0), missed(-0.4, -2.0)]
    near = [*own, missed(-1.0, 0.5), missed(0.8, 0.0)]
    assert loss["loss"].item() == pytest.approx(np.mean(near) + np.mean(own), rel=1e-5)
    assert loss["order"] == 1


def test_the_shipped_reward_changes_along_a_fade_as_it_should():
    asked = [p for t in TASKS for p in spread(t, 40)]
    fade = fades(asked, generator(21))
    tiny, texts = open_reward("tiny"), [p.text for p in asked]
    with torch.no_grad():
        start, end = (tiny.score(fade[place], texts) for place in ("start", "end"))
    gain = fade["gain"].gather(1, fade["caption"][:, None])[:, 0]
    clear = gain.abs() > 0.2  # of an edit
    assert clear.sum() > 60 and ((end - start) * gain > 0)[clear].float().mean() > 0.85


def test_a_walk_goes_up_a_score_by_its_steps():
    goal, x = torch.randn(2, 5, 16, 32)
    torch.manual_seed(0)
    after = walk(lambda x: -(x - goal).flatten(1).norm(dim=1), x, steps=3)
    nearer = (x - goal).flatten(1).norm(dim=1) - (after - goal).flatten(1).norm(dim=1)
    assert ((nearer > 3 * 0.2) & (nearer < 3 * 1.0)).all()
    torch.testing.assert_close(nearer, (after - x).flatten(1).norm(dim=1))  # straight at the goal


@pytest.fixture(scope="module")
def fits() -> Tensor:
    """Which prompts each of 12 scenes fits, (12, 236)."""
    _, shape, color = scenes([p for t in TASKS for p in spread(t, 2)], generator(10))
    return torch.stack([truth(objects_of(s, c)) for s, c in zip(shape, color, strict=True)])


def test_dense_loss_falls_with_every_fitting_score_and_rises_with_every_other(fits):
    score = torch.from_numpy(generator(11).normal(2, 2, fits.shape)).requires_grad_()
    (grad,) = torch.autograd.grad(dense_loss(score, fits), score)
    assert (grad[fits] < 0).all() and (grad[~fits] > 0).all()
    for i in range(len(fits)):  # and so it is for whole steps, not only for small ones
        best, worst = score.detach().clone(), score.detach().clone()
        best[i] += torch.where(fits[i], 1.0, -1.0)
        worst[i] -= torch.where(fits[i], 1.0, -1.0)
        assert dense_loss(best, fits) < dense_loss(score, fits) < dense_loss(worst, fits)


def test_dense_loss_of_the_truth_is_nearly_zero_and_of_its_opposite_large(fits):
    truthful = torch.where(fits, 8.0, -8.0)
    assert dense_loss(truthful, fits) < 1e-3 and dense_loss(-truthful, fits) > 20


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A fresh reward, 24 scenes, half of the captions wrong, and the captions' features."""
    root = tmp_path_factory.mktemp("attack")
    make_tokenizers(root)
    torch.manual_seed(0)
    model = make_reward(root / "tokenizer").eval()
    with torch.no_grad():
        text = features(model.get_text_features(input_ids=token_table(root / "tokenizer")))
    prompts = spread("color", 24)
    images, *_ = scenes(prompts, generator(12))
    right = torch.arange(24) % 2 == 0
    caption = torch.tensor(
        [NUMBER[p if r else distort(p, generator(i))] for i, (p, r) in enumerate(zip(prompts, right))]
    )
    return model, images, text, caption, right


@pytest.mark.parametrize("radius", [0.03, 1.0, 3.0])
def test_attack_moves_each_image_by_at_most_the_radius_and_most_of_them_far(attacked, radius):
    model, images, text, caption, right = attacked
    torch.manual_seed(1)
    moved = attack(model, images, text, caption, right, radius)
    length = (moved - images).flatten(1).norm(dim=1)
    assert length.max() <= radius * (1 + 1e-5) and length.min() > 0
    assert length.mean() > 0.4 * radius and length.std() > 0.05 * radius  # 0.3 to 1, less what the clip takes
    assert moved.min() >= 0 and moved.max() <= 1
    assert not moved.requires_grad and all(p.grad is None for p in model.parameters())


def test_attack_lowers_the_score_of_right_captions_and_raises_that_of_wrong_ones(attacked):
    model, images, text, caption, right = attacked
    torch.manual_seed(2)
    moved = attack(model, images, text, caption, right, 0.5)
    with torch.no_grad():
        before, after = (scores(model, x, text)[0].gather(1, caption[:, None])[:, 0] for x in (images, moved))
    assert ((after < before) == right).float().mean() > 0.9
