"""Files that presets need: each is named with a command of the READMEs, all that are missing at once."""

import re
import sys
from pathlib import Path

import pytest

from config import PRESETS, Config
from formats.locations import locate
from infra.downloads import DOWNLOADS, check_downloads, downloads_of
from rewards import WEIGHTS
from tools import plan

ROOT = Path(__file__).parent.parent


def test_every_command_is_one_of_the_readmes():
    text = "".join((ROOT / folder / "README.md").read_text() for folder in (".", "scorers", "formats"))
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    for _, *commands in DOWNLOADS.values():
        assert commands and set(commands) <= set(lines)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_needs_is_what_its_help_says(name):
    text, cfg = PRESETS[name]
    assert set(downloads_of(cfg, WEIGHTS)) == set(re.findall(r"weights/[\w./-]*\w", text))


def test_all_that_is_missing_is_told_at_once_and_what_is_here_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "PickScore_v1").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        check_downloads(PRESETS["flux-dev-lora"][1], WEIGHTS)
    for path in ("weights/FLUX.1-dev", "weights/train-prompts.txt", "weights/HPS_v2.1_compressed.pt"):
        assert DOWNLOADS[path][-1] in str(error.value)
    assert "PickScore" not in str(error.value)


@pytest.mark.parametrize("spec, count", [("hpsv2", 1), ("hpsv2:0.5", 1), ("hpsv2=my.pt", 0), ("my.py:hpsv2", 0)])
def test_a_reward_with_a_path_of_its_own_needs_no_download(spec, count):
    assert len(downloads_of(Config(reward=(spec,), watch=()), WEIGHTS)) == count


def test_the_plan_lists_what_is_here_and_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "PickScore_v1").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["plan.py", "flux-dev-lora", "--reward", "hpsv3", "--check"])
    plan.main()
    states = re.findall(r"^(here|missing) +weights/([\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    missing = {"FLUX.1-dev", "train-prompts.txt", "HPSv3"}
    assert {path: state for state, path in states} == dict.fromkeys(missing, "missing") | {"PickScore_v1": "here"}


def test_a_missing_folder_of_weights_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("formats.locations.snapshot_download", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(ValueError, match=r"(?s)no model at 'weights/FLUX\.1-dev'.*hf download black-forest-labs"):
        locate("weights/FLUX.1-dev")
    for path in ("weights/other", "runs/mine", "a/b/c"):
        with pytest.raises(ValueError, match=f"there is no folder {Path(path).parent}, give a folder"):
            locate(path)
