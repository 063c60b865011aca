"""A user's idea: its page's method runs, --smoke is short and empties its own folder alone, no test counts the file."""

import re
import subprocess
import sys

import pytest

import train
from config import parse
from infra.jsonl import read_log
from tests import tree
from tests.tree import ROOT

PAGE = ROOT / "ideas" / "README.md"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder in which the page's own method was tried with --smoke."""
    folder = tmp_path_factory.mktemp("user")
    (method,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "late.py").write_text(method)
    (folder / "runs" / "smoke").mkdir(parents=True)
    (folder / "runs" / "smoke" / "old.txt").write_text("of the last try")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", "--method", "late.py:late_leaps", "--smoke"])
        train.main()
    return folder


def test_the_pages_method_runs_with_two_updates_and_six_images(smoke):
    assert [file.name for file in (smoke / "runs").iterdir()] == ["smoke"]
    run = smoke / "runs" / "smoke"
    updates = read_log(run / "metrics.jsonl")
    assert [entry["step"] for entry in updates] == [0, 1]
    assert all(entry["k"] <= 0.7 for entry in updates)
    evaluations = read_log(run / "eval.jsonl")
    assert [entry["step"] for entry in evaluations] == [0, 2]
    assert len(evaluations[0]["by_prompt"]["judge"]) == 6
    assert {"single", "two", "count", "color", "position", "attr"} < set(evaluations[0])


def test_what_the_last_try_left_is_gone(smoke):
    assert not (smoke / "runs" / "smoke" / "old.txt").exists()


def test_no_folder_but_its_own_is_ever_emptied():
    cfg, _ = parse(["flux-dev-hpsv2", "--smoke", "--out", "runs/precious"])
    assert str(cfg.out) == "runs/smoke"


def test_files_that_git_does_not_track_are_no_sources(tmp_path, monkeypatch):
    for name in ("train.py", "my_method.py", "ideas/late.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    for words in (["init", "-q"], ["add", "train.py"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    tree.tracked_names.cache_clear()
    try:
        assert tree.sources("*.py") == [tmp_path / "train.py"]
        assert tree.sources("ideas/*.py") == []
    finally:
        tree.tracked_names.cache_clear()
