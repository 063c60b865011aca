"""TensorBoard and W&B: what is missing is told before anything starts, without network."""

import importlib.util
import sys
from pathlib import Path

import pytest

from infra.trackers import check_trackers


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """W&B installed, and nothing that says who asks: no variables, an empty home, no terminal."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_DISABLED",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", (tmp_path / "stdin").open("w+"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return tmp_path


def test_wandb_without_a_key_or_a_terminal_is_an_error_that_says_what_to_do(bare):
    with pytest.raises(ValueError, match=r"--log wandb finds no key.*wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_trackers(("tensorboard", "wandb"))
    check_trackers(("tensorboard",))
    check_trackers(())


@pytest.mark.parametrize(
    "name, value", [("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")]
)
def test_a_variable_with_a_key_or_a_mode_without_network_is_enough(name, value, bare, monkeypatch):
    monkeypatch.setenv(name, value)
    check_trackers(("wandb",))


@pytest.mark.parametrize(
    "file, text",
    [
        (".netrc", "machine api.wandb.ai\n  login user\n  password {k}\n"),
        ("_netrc", "machine api.wandb.ai login user password {k}\n"),
        ("wandb/settings", "[default]\nmode = offline\n"),
        (".config/wandb/settings", "[default]\nmode = offline\n"),
    ],
)
def test_what_wandbs_own_commands_have_left_on_the_disk_is_enough(file, text, bare):
    (bare / file).parent.mkdir(parents=True, exist_ok=True)
    (bare / file).write_text(text)
    (bare / file).chmod(0o600)
    check_trackers(("wandb",))


def test_the_key_of_another_host_is_none(bare, monkeypatch):
    (bare / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (bare / ".netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    with pytest.raises(ValueError, match="finds no key"):
        check_trackers(("wandb",))


def test_somebody_at_a_terminal_can_be_asked(bare, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    check_trackers(("wandb",))


def test_a_tracker_that_is_not_installed_is_an_error(bare, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log wandb needs that package: pip install wandb"):
        check_trackers(("wandb",))
