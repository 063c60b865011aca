"""Pictures that are not square, and runs over several sizes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from config import Config, sides
from infra.distributed import join
from infra.meter import Meter
from rewards import open_reward, score_all

ROOT = Path(train.__file__).parent
TINY = str(ROOT / "shapes" / "tiny-flux")
WIDE = Config(
    size=("32x96",), watch=(), batch=4, rollout_steps=3, updates=2, eval_every=2, eval_prompts=ROOT / "prompts.txt"
)


@pytest.mark.parametrize(("size", "pixels"), [("64", (64, 64)), ("768x1344", (768, 1344))])
def test_a_size_is_a_square_or_height_by_width(size, pixels):
    assert sides(size) == pixels


@pytest.mark.parametrize("size", ["", "64x", "x64", "64X64", "6.4", "-64", "64x64x64", "64*64"])
def test_anything_else_is_no_size(size):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH, such as 768x1344"):
        sides(size)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(size=("64", "63x64")), "image size 63x64 is not a positive multiple of 16"),
        (dict(size=("64", "big")), "--size big: give pixels"),
        (dict(size=()), "--size: give one or more"),
        (dict(size=("64", "32x64"), watch=("judge",)), "--size 32x64: the judge reads 64x64 pixels"),
    ],
)
def test_a_size_that_cannot_be_is_told_before_any_weights_are_read(flags, words, monkeypatch, tmp_path):
    monkeypatch.setattr("train.build_network", lambda *_: pytest.fail("weights were read"))
    flags = dict(watch=(), eval_prompts=Config().eval_prompts) | flags
    with pytest.raises(ValueError, match=words), join("cpu") as world:
        train.set_up(replace(WIDE, out=tmp_path / "run", **flags), world)


def test_a_reward_of_ones_own_is_tried_at_every_size(monkeypatch, tmp_path):
    (tmp_path / "square.py").write_text("""
def square(images, prompts):
    assert images.shape[2] == images.shape[3], "only squares"
    return images.mean((1, 2, 3))
""")
    monkeypatch.setattr("train.build_network", lambda *_: pytest.fail("weights were read"))
    cfg = replace(WIDE, out=tmp_path / "run", size=("64", "32x64"), reward=(f"{tmp_path / 'square.py'}:square",))
    with pytest.raises(ValueError, match=r"fails on .*32, 64.*only squares"), join("cpu") as world:
        train.set_up(cfg, world)


def gradients(cfg: Config, step: int) -> list[torch.Tensor]:
    with join("cpu") as world:
        setup = train.set_up(cfg, world)
        train.accumulate_batch_gradient(cfg, setup, world, step, Meter(world.device))
        return [p.grad for p in setup.pipe.flux.parameters()]


def test_sizes_take_turns_and_an_update_is_that_of_a_run_at_its_size_alone(tmp_path):
    cfg = replace(WIDE, out=tmp_path / "run")
    both = gradients(replace(cfg, size=("64", "32x96")), step=1)
    assert all(torch.equal(a, b) for a, b in zip(both, gradients(cfg, step=1), strict=True))
    assert any(g.abs().max() > 0 for g in both)


def test_a_run_over_two_sizes_is_evaluated_at_the_first_and_resumes_only_with_the_same(tmp_path):
    cfg = replace(WIDE, out=tmp_path / "run", size=("32x96", "64"), watch=("lattice",))
    with join("cpu") as world:
        train.run(cfg, train.set_up(cfg, world), world)
    assert {Image.open(file).size for file in cfg.out.glob("samples/step_*/*.png")} == {(96, 32)}
    flops = [json.loads(line)["tflops"] for line in (cfg.out / "metrics.jsonl").read_text().splitlines()]
    assert len(flops) == 2
    with pytest.raises(ValueError, match="--resume with --size"), join("cpu") as world:
        train.set_up(replace(cfg, resume=True, size=("32x96",)), world)


def test_the_sample_command_draws_high_by_wide(tmp_path, monkeypatch, capsys):
    flags = ["--prompt", "a photo of a circle", "--num", "1", "--steps", "1", "--size", "32x96"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", TINY, *flags, "--out", str(tmp_path / "wide.png")])
    sample.main()
    assert "1 images of 32x96" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "wide.png").size
    assert width > 1.5 * height


def test_images_of_a_prompt_take_turns_at_the_sizes_of_an_evaluation(tmp_path, capsys):
    """The n-th image has its noise by n, so an evaluation at one size has every other image; each size has its mean."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a circle\na photo of a red square\n")
    flags = dict(prompts=prompts, reward=("tiny", "lattice"), num=4, rollout_steps=2, keep_images=True)
    found = {}
    for name, sizes in dict(both=("64", "32x96"), square=("64",), wide=("32x96",)).items():
        with join("cpu") as world:
            evaluate.evaluate_models(
                evaluate.EvaluateFlags(model=(TINY,), out=tmp_path / name, size=sizes, **flags), world
            )
        scores = json.loads((tmp_path / name / "results.json").read_text())["scores"]["shapes_tiny-flux"]
        found[name] = {reward: np.array(values) for reward, values in scores.items()}
    for reward in ("tiny", "lattice"):
        expected = found["square"][reward].copy()
        expected[:, 1::2] = found["wide"][reward][:, 1::2]
        np.testing.assert_allclose(found["both"][reward], expected, atol=1e-4)
    results = json.loads((tmp_path / "both" / "results.json").read_text())["summary"]
    for reward in ("tiny", "lattice"):
        means = {"64": found["square"][reward][:, ::2].mean(), "32x96": found["wide"][reward][:, 1::2].mean()}
        assert results[reward]["shapes_tiny-flux"]["sizes"] == pytest.approx(means, abs=1e-4)
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny ") and "64" in line)
    assert told.split() == ["tiny", "mean", "change", "64", "32x96"]
    kept = [Image.open(tmp_path / "both" / "shapes_tiny-flux" / "images" / f"00001_{n}.png").size for n in range(4)]
    assert kept == [(64, 64), (96, 32)] * 2


def test_more_sizes_than_images_of_a_prompt_are_refused():
    with pytest.raises(ValueError, match="--num 1: a prompt's images take turns at 2 sizes"):
        evaluate.check_values(evaluate.EvaluateFlags(num=1, size=("64", "32x96")))


# --------------------------------------------------------------------------------------- the lattice


def lattice_of(images: torch.Tensor) -> list[float]:
    return score_all(open_reward("lattice"), images, [""] * len(images), "cpu").tolist()


def test_the_lattice_scorer_finds_a_pattern_of_a_tokens_period_and_no_other():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 12, 18), size=(128, 192), mode="bicubic").clamp(0, 1)
    noisy = (smooth + 0.01 * torch.randn_like(smooth)).clamp(0, 1)
    tile = 0.05 * torch.randn(1, 3, 16, 16)
    other = 0.05 * torch.randn(1, 3, 10, 10)
    of_tokens = noisy + tile.tile(1, 1, 8, 12)
    of_others = noisy + other.tile(1, 1, 13, 20)[..., :128, :192]
    plain, patterned, another = (lattice_of(x) for x in (noisy, of_tokens, of_others))
    assert all(abs(score) < 0.4 for score in plain)
    assert all(score < -1.0 for score in patterned)
    assert all(score > -0.4 for score in another)


def test_a_stronger_lattice_scores_lower_and_one_that_nobody_sees_scores_nothing():
    torch.manual_seed(0)
    tile = torch.randn(1, 3, 16, 16).tile(1, 1, 4, 4)
    scores = lattice_of(torch.cat([0.5 + s * tile for s in (0, 1e-5, 1e-2, 1e-1)]))
    assert abs(scores[0]) < 1e-3 and abs(scores[1]) < 0.05
    assert scores[0] > scores[2] > scores[3]


def test_a_lattices_power_over_its_neighbours_is_what_was_put_in():
    """Waves of known amplitude at all of the first 15 multiples of 1/64, in one direction."""
    place, amplitude = torch.arange(64) / 64, torch.full((32,), 0.001)
    amplitude[4:32:4] = 0.02
    phase = torch.arange(32) ** 2.0
    wave = sum(amplitude[k] * torch.cos(2 * torch.pi * k * place + phase[k]) for k in range(1, 32))
    image = (0.5 + wave).expand(1, 3, 64, 64)
    floor = 2 * np.log10(np.hypot(0.01, 1e-4) / np.hypot(0.0005, 1e-4))  # an amplitude a has |rfft| = a / 2
    assert lattice_of(image)[0] == pytest.approx(-floor / 2, abs=1e-3)  # down there is nothing
