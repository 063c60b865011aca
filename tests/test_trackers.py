"""Trackers of other people: a missing package is an error before anything starts; W&B's own words are W&B's."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from config import Config
from infra.checks import check_flags
from infra.distributed import Process
from infra.trackers import open_trackers


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_starts(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else object())
    process = Process(0, 1, torch.device("cpu"), None)
    with pytest.raises(ValueError, match=f"--log {kind} needs a package: pip install {kind}"):
        check_flags(Config(log=("tensorboard", "wandb", "trackio")), process)
    check_flags(Config(), process)


def test_what_wandb_says_of_a_missing_key_reaches_the_user(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(RuntimeError, match="wandb login"):
        open_trackers(("wandb",), tmp_path, {}, 0)
