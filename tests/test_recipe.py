"""The recipe of the shapes world: all its stages at a thousandth of their length; its labels, scenes and losses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator, default_rng
from safetensors.torch import load_file
from torch import Tensor

from config import SHAPES as PRESET
from formats.folders import load_pipeline
from recipe import base, fit, prepare, reward
from recipe.fit import RecipeFlags
from recipe.lessons import (
    CAPTIONS,
    add_object,
    distort,
    edit,
    edit_distance,
    fades,
    judge_labels,
    numbers_of,
    paint_halves,
    random_prompts,
    training_scenes,
    warp,
)
from recipe.reward import attack, dense_loss, fade_loss, move_walkers, of_caption, scores
from rewards import WEIGHTS, open_reward
from sample import sample
from scorers.clip import clip, features, load_clip
from shapes.judge import UNKNOWN, judge_images, objects_in
from shapes.world import COLOR_NAMES, PROMPTS, SHAPES, random_layouts, scenes

SHIPPED = {"tiny-flux": Path(PRESET.model), "tiny-reward": Path(WEIGHTS["tiny"])}
RED_CIRCLE, RED_CROSS, BLUE_SQUARE = ("circle", "red"), ("cross", "red"), ("square", "blue")


def share(condition: Tensor) -> float:
    return condition.float().mean().item()


def layout_of(cells: dict[int, tuple[str, str]]) -> np.ndarray:
    """A layout, (2, 4), from the shape and the color of the object in each cell."""
    layout = np.full((2, 4), -1)
    for cell, (shape, color) in cells.items():
        layout[:, cell] = SHAPES.index(shape), COLOR_NAMES.index(color)
    return layout


# ------------------------------------------------------------------------------------- the whole recipe


def in_eights(draw: Callable) -> Callable:
    """The same, but eight at a time, whatever number is asked for."""
    return lambda n, *options: draw(8, *options)


@pytest.fixture(scope="module")
def short_recipe(tmp_path_factory) -> Path:
    """A folder with what the recipe makes."""
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "random_prompts", in_eights(random_prompts))
        patch.setattr(reward, "training_scenes", in_eights(training_scenes))
        patch.setattr(reward, "fades", in_eights(fades))
        patch.setattr(reward, "N_MOVED", 8)
        prepare.main(RecipeFlags(out=folder, scale=0.001))
    return folder


def test_the_recipe_makes_a_model_and_a_reward_that_load(short_recipe):
    pipe = load_pipeline(short_recipe / "tiny-flux")
    prompts = ["a photo of a circle"] * 2
    images = sample(pipe, prompts, [0, 1], steps=2, height=64, width=64)
    assert images.shape == (2, 3, 64, 64)
    assert clip(short_recipe / "tiny-reward").score(images, prompts).abs().max() <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_writes_the_files_that_are_shipped_and_no_weight_of_theirs(short_recipe, name):
    """It begins with the shipped pipeline, so a network that it forgot would be the shipped one."""
    files = [file.relative_to(SHIPPED[name]) for file in SHIPPED[name].rglob("*") if file.is_file()]
    assert {file.relative_to(short_recipe / name) for file in (short_recipe / name).rglob("*.*")} == set(files)
    for file in files:
        if file.suffix != ".safetensors":
            continue
        shipped, made = load_file(SHIPPED[name] / file), load_file(short_recipe / name / file)
        assert shipped.keys() == made.keys()
        for key, tensor in shipped.items():
            assert tensor.shape == made[key].shape
            assert key == "logit_scale" or not torch.equal(tensor, made[key])


def test_the_vae_gives_latents_of_mean_0_and_variance_1(short_recipe):
    pipe = load_pipeline(short_recipe / "tiny-flux")
    images, _ = scenes(PROMPTS, default_rng(0))
    z = pipe.vae.encode(images * 2 - 1).latent_dist.mean
    z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert z.mean().abs() < 0.1
    assert z.std() == pytest.approx(1, abs=0.1)


def test_a_finished_stage_is_loaded_not_trained_again(short_recipe, monkeypatch):
    file = short_recipe / "tiny-reward" / "model.safetensors"
    weights = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(torch.optim, "AdamW", None)
    prepare.main(RecipeFlags(out=short_recipe, scale=0.001))
    assert file.read_bytes() == weights


def test_a_stage_ends_alike_whatever_was_drawn_before(short_recipe, tmp_path):
    pipe = load_pipeline(PRESET.model)
    torch.seed()
    base.fit_text_encoders(RecipeFlags(out=tmp_path, scale=0.001), pipe)
    made = load_pipeline(short_recipe / "tiny-flux")
    assert torch.equal(pipe.encoders[1].shared.weight, made.encoders[1].shared.weight)


def test_stages_of_another_scale_are_not_taken_for_finished(tmp_path):
    steps = []

    def count_steps(scale: float) -> int:
        steps.clear()
        module = torch.nn.Linear(1, 1)

        def loss_fn(rng: Generator, step: int) -> Tensor:
            steps.append(step)
            return module(torch.ones(1))

        fit.fit("line", module, loss_fn, RecipeFlags(out=tmp_path, scale=scale), steps=8, lr=0.1)
        return len(steps)

    assert [count_steps(scale) for scale in (0.5, 1, 1)] == [4, 8, 0]


def test_a_stage_ends_with_the_running_average_of_its_weights(tmp_path):
    def weights_of(average: float) -> list[Tensor]:
        """Before each step, and at the end."""
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        history = []

        def loss_fn(rng: Generator, step: int) -> Tensor:
            history.append(module.weight.detach().double())
            return module(torch.randn(4, 3)).square().mean()

        fit.fit("line", module, loss_fn, RecipeFlags(out=tmp_path / str(average)), steps=12, lr=0.1, average=average)
        return [*history, module.weight.detach().double()]

    expected, *later = weights_of(0.0)
    for step, weight in enumerate(later):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    averaged = weights_of(0.5)[-1]
    assert not torch.allclose(averaged, later[-1])
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- prompts and labels


def test_distort_changes_one_detail_and_only_that():
    rng = default_rng(7)
    detail = dict(count="count", color="colors", position="relation", attr="colors")
    for prompt in PROMPTS * 5:
        distorted = distort(prompt, rng)
        if prompt.task == "single":
            assert distorted == prompt
        elif prompt.task == "two":
            assert distorted.task == "single" and distorted.shapes[0] in prompt.shapes
        else:
            field = detail[prompt.task]
            assert distorted != prompt and replace(distorted, **{field: getattr(prompt, field)}) == prompt
            assert distorted in PROMPTS


def test_a_scene_is_no_edit_away_from_the_prompts_that_the_judge_accepts_and_an_edit_or_more_from_the_rest():
    prompts = random_prompts(200, default_rng(18))
    images, layouts = scenes(prompts, default_rng(8))
    distance, fits = edit_distance(layouts), judge_labels(images).numpy()
    assert ((distance == 0) == fits).all(axis=1).mean() >= 0.99
    assert distance[distance > 0].min() == 1
    assert (distance[range(200), numbers_of(prompts)] == 0).all()


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
    distances = edit_distance(layout_of(cells)[None])
    assert distances[0, CAPTIONS.index(f"a photo of {text}")] == distance


def test_an_edit_changes_a_layout_and_its_distance_to_any_prompt_by_two_at_most():
    rng = default_rng(19)
    layouts = random_layouts(PROMPTS, rng)
    edited_layouts = np.stack([edit(layout, rng) for layout in layouts])
    assert (edited_layouts != layouts).any((1, 2)).all()
    shape, color = edited_layouts[:, 0], edited_layouts[:, 1]
    assert ((shape >= 0) == (color >= 0)).all()
    assert (shape >= 0).any(1).all()
    assert np.abs(edit_distance(edited_layouts) - edit_distance(layouts)).max() <= 2


# ------------------------------------------------------------------------------------ scenes and fades


def test_training_scenes_have_the_judges_labels_and_a_quarter_to_a_half_of_right_captions():
    """Right and wrong ones, half painted, warped, and with an object more."""
    batch = training_scenes(200, default_rng(13))
    assert share((batch["fits"] == judge_labels(batch["images"])).all(dim=1)) >= 0.99
    assert 0.2 < share(of_caption(batch["fits"], batch["caption"])) < 0.5


def test_a_half_painted_scene_has_one_object_without_a_color():
    prompts = [prompt for prompt in PROMPTS if prompt.task == "count"] * 3
    layouts = random_layouts(prompts, default_rng(0))
    images = paint_halves(layouts, default_rng(14))
    for prompt, objects in zip(prompts, objects_in(images), strict=True):
        assert len(objects) == prompt.count
        assert sum(o.color == UNKNOWN for o in objects) == 1


def test_add_object_fills_one_empty_cell_if_there_is_one_and_changes_no_other():
    rng = default_rng(15)
    for layout in random_layouts(PROMPTS, rng):
        crowded = add_object(layout, rng)
        is_new = (crowded != layout).all(axis=0)  # in shape and color
        assert (crowded[:, ~is_new] == layout[:, ~is_new]).all()
        assert is_new.sum() == (layout[0] < 0).any()
        assert (layout[:, is_new] == -1).all() and (crowded[:, is_new] >= 0).all()


def test_warp_moves_pixels_and_keeps_the_range_of_colors():
    prompts = [prompt for prompt in PROMPTS if prompt.task == "attr"][:40]
    images, _ = scenes(prompts, default_rng(16))
    warped = warp(images, default_rng(17))
    assert (warped.amin((2, 3)) >= images.amin((2, 3)) - 1e-5).all()
    assert (warped.amax((2, 3)) <= images.amax((2, 3)) + 1e-5).all()
    assert 0.1 < share(judge_images(warped, prompts)) < 0.9


def test_a_fade_differs_in_two_cells_at_most_and_gains_no_more_than_its_edit():
    fade = fades(240, default_rng(20))
    start, end = fade["images"].chunk(2)
    difference = (end - start).abs().amax(1)  # (n, 64, 64)
    cells = difference.unflatten(1, (2, 32)).unflatten(3, (2, 32)).amax((2, 4))  # (n, 2, 2)
    assert ((cells > 1e-4).sum((1, 2)) <= 2).all()
    gain = of_caption(fade["gain"], fade["caption"])
    assert 0.25 < share(gain > 0) < 0.5
    assert 0.25 < share(gain < 0) < 0.5
    assert fade["gain"].abs().max() <= 2


def test_the_shipped_reward_changes_along_a_fade_in_the_direction_of_its_gain():
    fade = fades(150, default_rng(21))
    gain = of_caption(fade["gain"], fade["caption"])
    is_clear = gain.abs() > 0.2  # of an edit
    assert is_clear.sum() > 40
    texts = [CAPTIONS[i] for i in fade["caption"][is_clear]]
    start, end = fade["images"].chunk(2)
    tiny = open_reward("tiny")
    change = tiny.score(end[is_clear], texts) - tiny.score(start[is_clear], texts)
    assert share(change * gain[is_clear] > 0) > 0.85


# ---------------------------------------------------------------------------------- walks and losses


def test_walkers_go_up_a_score_by_one_or_two_steps_of_0_2_to_1(monkeypatch):
    monkeypatch.setattr(reward, "RESTART", 0)
    torch.manual_seed(0)
    goals, x = torch.randn(2, 60, 16, 32)
    walkers = dict(x=x.clone(), caption=torch.arange(60))

    def score(x: Tensor, caption: Tensor) -> Tensor:
        return -(x - goals[caption]).flatten(1).norm(dim=1)

    latents = move_walkers(walkers, walkers, score, default_rng(0))
    progress = score(walkers["x"], walkers["caption"]) - score(x, walkers["caption"])
    moved = progress != 0
    assert moved.sum() == len(latents) == 48
    assert ((progress[moved] > 0.2) & (progress[moved] < 2)).all()
    length = (walkers["x"] - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(progress, length, atol=1e-4, rtol=0)  # straight at their own goals


def test_dense_loss_falls_with_every_fitting_score_and_rises_with_every_other():
    layouts = random_layouts(random_prompts(12, default_rng(9)), default_rng(10))
    fits = torch.from_numpy(edit_distance(layouts) == 0)
    score = torch.from_numpy(default_rng(11).normal(2, 2, fits.shape)).requires_grad_()
    (grad,) = torch.autograd.grad(dense_loss(score, fits), score)
    assert (grad[fits] < 0).all() and (grad[~fits] > 0).all()
    truthful = torch.where(fits, 8.0, -8.0)
    assert dense_loss(truthful, fits) < 1e-3
    assert dense_loss(-truthful, fits) > 20


def test_the_loss_of_fades_is_its_closed_form(monkeypatch):
    """Of two fades and three prompts: the mean over all gains but 0, plus that over each fade's caption."""
    start = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    end = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 1.0]])
    monkeypatch.setattr(reward, "scores", lambda model, images, text: (torch.cat([start, end]), None))
    gain = torch.tensor([[0.5, -1.0, 0.0], [0.0, -0.4, 0.8]])
    images, caption = torch.zeros(4, 3, 64, 64), torch.tensor([0, 1])
    loss = fade_loss(None, None, default_rng(0), images, gain, caption)

    def expected(gain: float, change: float) -> float:
        return float(np.log1p(np.exp(2.0 * (1.5 * abs(gain) - np.sign(gain) * change))))

    caption_terms = [expected(0.5, 1.0), expected(-0.4, -2.0)]
    terms = [*caption_terms, expected(-1.0, 0.5), expected(0.8, 0.0)]
    assert loss.item() == pytest.approx(np.mean(terms) + np.mean(caption_terms), rel=1e-5)


@pytest.mark.parametrize("radius", [0.03, 1.5])
def test_an_attack_raises_the_error_and_moves_each_image_by_at_most_the_radius_and_most_of_them_far(radius):
    """The error is that of the shipped reward: the score of wrong captions, and minus that of right ones."""
    model, tokenizer = load_clip(SHIPPED["tiny-reward"])
    texts = tokenizer(CAPTIONS, padding="max_length", max_length=12, return_tensors="pt")
    text = features(model.get_text_features(input_ids=texts.input_ids)).detach()
    batch = training_scenes(24, default_rng(12))

    def error(images: Tensor) -> Tensor:
        score, _ = scores(model, images, text)
        correct = of_caption(batch["fits"], batch["caption"])
        return torch.where(correct, -1, 1) * of_caption(score, batch["caption"])

    torch.manual_seed(1)
    attacked_images = attack(error, batch["images"], radius)
    length = (attacked_images - batch["images"]).flatten(1).norm(dim=1)
    assert length.min() > 0 and length.max() <= radius * (1 + 1e-5)
    assert length.mean() > 0.4 * radius and length.std() > 0.05 * radius  # 0.3 to 1, less what the clip removes
    assert attacked_images.min() >= 0 and attacked_images.max() <= 1
    assert share(error(attacked_images) > error(batch["images"])) > 0.9
    assert all(p.grad is None for p in model.parameters())
