"""experiments.bases: what the other bases are trained on, and folders that load."""

import numpy as np
import pytest
import torch

from config import Config as TrainConfig
from experiments import bases
from experiments.bases import Config, loss_of, own_pairs, scene_pairs
from infra.folders import Pipeline, load
from leaps import rollout
from sample import Text, decode, encode, sigmas
from shapes.base import velocity
from shapes.judge import judge
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


def test_rendered_scenes_come_back_from_their_latents_as_their_captions_say(pipe):
    caption, x0, x1 = scene_pairs(pipe, 24, seed=0)
    assert not len(x1)
    with torch.no_grad():
        assert judge(decode(pipe, x0, 64, 64), [PROMPTS[i] for i in caption]).float().mean() > 0.95


def test_pairs_are_kept_together_and_images_get_new_noise(pipe, table, monkeypatch):
    """A velocity of zero has the loss (x_1 - x_0)^2, which tells whose x_1 it was."""
    monkeypatch.setattr(bases, "velocity", lambda *_: lambda x, t: torch.zeros_like(x))
    (caption, x0, _), x1 = scene_pairs(pipe, 8, seed=0), torch.full((8, 16, 32), 7.0)
    x0 = x0 * 0
    paired = loss_of(pipe.flux, table, (caption, x0, x1))(np.random.default_rng(0), 0)["loss"]
    fresh = loss_of(pipe.flux, table, (caption, x0, torch.empty(0)))(np.random.default_rng(0), 0)["loss"]
    assert paired.item() == pytest.approx(49) and fresh.item() == pytest.approx(1, abs=0.05)


def test_it_writes_two_folders_that_load_and_share_all_but_the_transformer(tmp_path, pipe):
    bases.run(Config(out=tmp_path, pairs=32, reflow_steps=2, early_steps=2))
    for name in ("early", "reflowed"):
        other = load(tmp_path / name)
        assert not torch.equal(other.flux.img_in.weight, pipe.flux.img_in.weight)
        assert torch.equal(other.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert not list(tmp_path.glob("*.pt"))  # which a run with other flags would go on from
    with pytest.raises(ValueError, match="has reflowed/ already"):
        bases.run(Config(out=tmp_path))
