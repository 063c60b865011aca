"""The recipe of the shapes world, all its stages, at a thousandth of its length."""

from pathlib import Path

import pytest
import torch
from numpy.random import Generator

import shapes
from formats.folders import load_pipeline
from recipe import base, prepare, teach
from recipe.fit import PrepareFlags, TensorDict, fit_stage
from sample import sample
from scorers.clip import clip

SHIPPED = Path(shapes.__file__).parent


@pytest.fixture(scope="module")
def short_recipe(tmp_path_factory) -> Path:
    """A folder with what the recipe makes in its subfolder `out`."""
    folder = tmp_path_factory.mktemp("prepare")
    prepare.main(short_flags(folder, "out"))
    return folder


def short_flags(folder: Path, out: str) -> PrepareFlags:
    return PrepareFlags(work=folder / "work", out=folder / out, scale=0.001, threads=torch.get_num_threads())


def test_the_recipe_makes_a_checkpoint_and_a_reward_that_load(short_recipe):
    pipe = load_pipeline(short_recipe / "out" / "tiny-flux")
    reward = clip(short_recipe / "out" / "tiny-reward")
    prompts = ["a photo of a circle"] * 2
    images = sample(pipe, prompts, [0, 1], steps=2, height=64, width=64)
    assert images.shape == (2, 3, 64, 64)
    assert reward.score(images, prompts).abs().max() <= 1


@pytest.mark.parametrize("name", ["train-prompts.txt", "eval-prompts.txt"])
def test_the_recipe_writes_the_prompt_files_that_are_shipped(short_recipe, name):
    assert (short_recipe / "out" / name).read_text() == (SHIPPED / name).read_text()


def test_the_recipe_ships_to_the_folder_of_the_world_unless_told_otherwise():
    assert PrepareFlags().out == SHIPPED


def test_a_finished_stage_is_not_run_again(short_recipe, monkeypatch):
    monkeypatch.setattr(teach, "attacked_loss", None)
    monkeypatch.setattr(base, "flow_loss", None)
    prepare.main(short_flags(short_recipe, "again"))
    weights = "tiny-flux/transformer/diffusion_pytorch_model.safetensors"
    assert (short_recipe / "again" / weights).read_bytes() == (short_recipe / "out" / weights).read_bytes()


def test_the_seed_decides_the_first_stage(tmp_path):
    """It draws its initial weights before any step has set a seed."""
    weights = []
    for name in ("a", "b"):
        cfg = PrepareFlags(work=tmp_path / name, scale=0.001)
        cfg.work.mkdir()
        torch.seed()
        weights.append(base.stage_vae(cfg).decoder.conv_out.weight)
    assert torch.equal(*weights)


def test_an_interrupted_stage_ends_as_an_undisturbed_one(tmp_path):
    """All of a step's randomness comes from its number; the average of the weights is in the checkpoint, too."""

    def fit_line(folder: Path, stop: int | None) -> torch.Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)

        def loss_fn(rng: Generator, step: int) -> TensorDict:
            if step == stop:
                raise KeyboardInterrupt
            error = module(torch.randn(8, 4)) - float(rng.normal())
            return dict(loss=error.square().mean())

        fit_stage("line", module, loss_fn, PrepareFlags(work=folder), steps=9, lr=0.1, average=0.9, save_every=2)
        return module.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "a", 5)
    assert torch.equal(fit_line(tmp_path / "a", None), fit_line(tmp_path / "b", None))


@pytest.mark.parametrize("default", ["work", "out"])
def test_a_short_recipe_does_not_replace_the_shipped_files(default, tmp_path):
    folders = {"work": tmp_path / "work", "out": tmp_path / "out"}
    del folders[default]
    with pytest.raises(SystemExit, match="--scale"):
        prepare.main(PrepareFlags(scale=0.002, **folders))


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no stage 'clena'"):
        prepare.main(PrepareFlags(work=tmp_path, stages=("clena",)))
