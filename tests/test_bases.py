"""experiments.bases: the paths that the other bases are trained on, and folders that load."""

import numpy as np
import pytest
import torch

from config import Config as TrainConfig
from experiments import bases
from experiments.bases import Config, arc, loss_of, own_pairs
from infra.folders import Pipeline, load
from leaps import rollout
from sample import Text, encode, sigmas
from shapes.base import velocity
from shapes.fit import fit
from shapes.world import PROMPTS


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load(TrainConfig.model)


@pytest.fixture(scope="module")
def table(pipe) -> Text:
    with torch.no_grad():
        return encode(pipe, [p.text for p in PROMPTS])


def test_own_pairs_are_ends_of_the_bases_rollouts(pipe, table):
    caption, x0, x1 = own_pairs(pipe, table, 5, seed=0)
    with torch.no_grad():
        ro = rollout(velocity(pipe.flux, table, caption), x1, sigmas(pipe.schedule, 25, 16))
    torch.testing.assert_close(x0, ro.x[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("bend", [0.0, 0.25])
def test_an_arc_goes_from_noise_to_image_and_its_velocity_is_its_derivative(bend):
    x0, x1 = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.equal(arc(x0, x1, torch.zeros(3).double(), bend)[0], x0)
    torch.testing.assert_close(arc(x0, x1, torch.ones(3).double(), bend)[0], x1)
    for time in (0.1, 0.5, 0.9):
        t, eps = torch.full((3,), time).double(), 1e-6
        x, v = arc(x0, x1, t, bend)
        ahead, behind = arc(x0, x1, t + eps, bend)[0], arc(x0, x1, t - eps, bend)[0]
        torch.testing.assert_close((ahead - behind) / (2 * eps), v, atol=1e-8, rtol=0)
        off = (x - torch.lerp(x0, x1, t[:, None, None])).norm() / x1.norm()
        assert off.item() == pytest.approx(bend * np.sin(np.pi * time))


def test_the_loss_is_of_pairs_that_are_kept_together(pipe, table, monkeypatch):
    """A velocity of zero has the loss (x_1 - x_0)^2, which tells whose x_1 it was."""
    monkeypatch.setattr(bases, "velocity", lambda *_: lambda x, t: torch.zeros_like(x))
    x0, caption = torch.randn(8, 16, 32), torch.zeros(8).long()
    loss = loss_of(pipe.flux, table, (caption, x0, x0 + 7), 0.0)(np.random.default_rng(0), 0)["loss"]
    assert loss.item() == pytest.approx(49, rel=1e-5)


def test_it_writes_two_folders_that_load_and_share_all_but_the_transformer(tmp_path, pipe):
    bases.run(Config(out=tmp_path, pairs=32, steps=2))
    weights = [pipe.flux.img_in.weight, *(load(tmp_path / name).flux.img_in.weight for name in ("reflowed", "bent"))]
    assert not any(torch.equal(a, b) for a, b in zip(weights, [*weights[1:], weights[0]]))
    assert torch.equal(load(tmp_path / "bent").vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("*.json")]  # which a run with other flags would go on from
    with pytest.raises(ValueError, match="has reflowed/ already"):
        bases.run(Config(out=tmp_path))


def test_a_run_that_was_stopped_between_the_two_goes_on(tmp_path, monkeypatch):
    def stopped(name, *args, **kwargs):
        if name == "bent":
            raise KeyboardInterrupt
        return fit(name, *args, **kwargs)

    cfg = Config(out=tmp_path, pairs=32, steps=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bases, "fit", stopped)
        bases.run(cfg)
    with pytest.raises(ValueError, match="holds a run of other flags"):
        bases.run(Config(out=tmp_path, pairs=32, steps=2))
    bases.run(cfg)
    assert all((tmp_path / name / "transformer").is_dir() for name in ("reflowed", "bent"))
