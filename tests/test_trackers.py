"""Trackers of other people: a missing package is an error before anything starts; W&B's own words are W&B's."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from infra.trackers import check_trackers, open_trackers


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_an_error_that_names_its_package(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else object())
    with pytest.raises(ValueError, match=f"--log {kind} needs that package: pip install {kind}"):
        check_trackers(("tensorboard", "wandb", "trackio"))
    check_trackers(())


def test_installed_trackers_are_checked_without_a_key_or_a_terminal(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_trackers(("tensorboard", "wandb"))


def test_what_wandb_says_of_a_missing_key_reaches_the_user(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(RuntimeError, match="wandb login"):
        open_trackers(("wandb",), tmp_path, {}, 0)
