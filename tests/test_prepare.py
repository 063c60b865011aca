"""The recipe of the shapes world, all its stages, at a thousandth of its length."""

from pathlib import Path

import pytest
import torch

from formats.folders import load_pipeline
from recipe import base, fit, prepare, teach
from sample import sample
from scorers.clip import clip

SHIPPED = Path(prepare.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    prepare.main(config(folder, "out"))
    return folder


def config(folder: Path, out: str) -> fit.Config:
    return fit.Config(work=folder / "work", out=folder / out, scale=0.001, threads=torch.get_num_threads())


def test_the_recipe_makes_a_checkpoint_and_a_reward_that_load(made):
    pipe, reward = load_pipeline(made / "out" / "tiny-flux"), clip(made / "out" / "tiny-reward")
    images = sample(pipe, ["a photo of a circle"] * 2, [0, 1], steps=2, height=64, width=64)
    scores = reward.score(images, ["a photo of a circle"] * 2)
    assert images.shape == (2, 3, 64, 64) and scores.abs().max() <= 1


@pytest.mark.parametrize("name", ["train-prompts.txt", "eval-prompts.txt"])
def test_the_recipe_writes_the_prompt_files_that_are_shipped(made, name):
    assert (made / "out" / name).read_text() == (SHIPPED / name).read_text()


def test_a_finished_stage_is_not_run_again(made, monkeypatch):
    monkeypatch.setattr(teach, "attacked_loss", None)
    monkeypatch.setattr(base, "flow_loss", None)
    prepare.main(config(made, "again"))
    weights = "tiny-flux/transformer/diffusion_pytorch_model.safetensors"
    assert (made / "again" / weights).read_bytes() == (made / "out" / weights).read_bytes()


def test_an_interrupted_stage_ends_as_an_undisturbed_one(tmp_path):
    """All of a step's randomness comes from its number; the average is kept too."""

    def trained(folder: Path, stop: int | None) -> torch.Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)

        def loss_fn(rng, step):
            if step == stop:
                raise KeyboardInterrupt
            return dict(loss=(module(torch.randn(8, 4)) - float(rng.normal())).square().mean())

        fit.fit("line", module, loss_fn, fit.Config(work=folder), steps=9, lr=0.1, average=0.9, save_every=2)
        return module.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a", 5)
    assert torch.equal(trained(tmp_path / "a", None), trained(tmp_path / "b", None))


@pytest.mark.parametrize("folder", ["work", "out"])
def test_a_try_does_not_replace_what_is_shipped(folder, tmp_path):
    own = {"work": tmp_path / "work", "out": tmp_path / "out"}
    del own[folder]
    with pytest.raises(SystemExit, match="--scale"):
        prepare.main(fit.Config(scale=0.002, **own))


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no stage 'clena'"):
        prepare.main(fit.Config(work=tmp_path, stages=("clena",)))
