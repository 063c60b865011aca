"""The recipe of the shapes world, all its stages, at a five-hundredth of its length."""

from pathlib import Path

import pytest
import torch

from infra.folders import load
from sample import sample
from scorers.clip import clip
from shapes import prepare

SHIPPED = Path(prepare.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    prepare.main(prepare.Config(work=folder / "work", out=folder / "out", scale=0.002, threads=torch.get_num_threads()))
    return folder


def test_the_recipe_makes_a_checkpoint_and_a_reward_that_load(made):
    pipe, reward = load(made / "out" / "tiny-flux"), clip(made / "out" / "tiny-reward")
    images = sample(pipe, ["a photo of a circle"] * 2, [0, 1], steps=2, height=64, width=64)
    scores = reward.score(images, ["a photo of a circle"] * 2)
    assert images.shape == (2, 3, 64, 64) and scores.abs().max() <= 1


@pytest.mark.parametrize("name", ["train-prompts.txt", "eval-prompts.txt"])
def test_the_recipe_writes_the_prompt_files_that_are_shipped(made, name):
    assert (made / "out" / name).read_text() == (SHIPPED / name).read_text()


def test_a_finished_stage_is_not_run_again(made, monkeypatch):
    monkeypatch.setattr(prepare, "reward_loss", None)
    monkeypatch.setattr(prepare, "flow_loss", None)
    prepare.main(prepare.Config(work=made / "work", out=made / "again", scale=0.002, threads=torch.get_num_threads()))
    weights = "tiny-flux/transformer/diffusion_pytorch_model.safetensors"
    assert (made / "again" / weights).read_bytes() == (made / "out" / weights).read_bytes()


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no stage 'clena'"):
        prepare.main(prepare.Config(work=tmp_path, stages=("clena",)))
