"""A user's file imports what is the user's: their packages and the files beside theirs, and ours stay ours."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.user_code import load_function

ROOT = Path(__file__).parent.parent
OURS = ("clip", "hpsv2", "logs", "config", "model", "rewards", "leaps", "infra", "scorers", "shapes")
REWARD = """
import torch
{imports}

def mine(images, prompts):
    {inside}
    return images.mean((1, 2, 3)) * 0 + torch.tensor([float({value})] * len(images))
"""


# Answers each line of code with a line, from a process in which nothing of ours or of the user's was imported before.
FORKS = """
import json, os, sys, traceback
from transformers import AutoTokenizer, CLIPModel  # what takes seconds, once for all of them
for line in sys.stdin:
    if os.fork() == 0:
        try:
            exec(json.loads(line), {})
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    if os.wait()[1]:
        print(json.dumps("it died"), flush=True)
"""


def scored(folder: Path, python: subprocess.Popen, imports: str, value: str, inside: str = "pass", first: str = ""):
    """What a reward in folder/my_file.py scores, in a process that opens `tiny` too."""
    folder.mkdir(exist_ok=True)
    (folder / "my_file.py").write_text(REWARD.format(imports=imports, value=value, inside=inside))
    code = f"""
import sys
assert not {{"clip", "hpsv2", "rewards", "infra", "scorers"}} & sys.modules.keys()
import torch
{first}
from rewards import open_reward
theirs = open_reward({str(folder / "my_file.py") + ":mine"!r})
tiny = open_reward("tiny")
images = torch.rand(2, 3, 64, 64)
assert tiny.score(images, ["a photo of a circle"] * 2).isfinite().all()
import config, leaps, model, infra.logs, scorers.clip
ours = [config, leaps, model, infra.logs, scorers.clip, sys.modules["rewards"]]
assert all(module.__file__.startswith({str(ROOT)!r}) for module in ours), ours
print(theirs.score(images, ["a photo of a circle"] * 2)[0].item(), flush=True)
"""
    print(json.dumps(code), file=python.stdin, flush=True)
    answer = json.loads(python.stdout.readline())
    assert isinstance(answer, float), answer
    return answer


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A path with packages that are installed there: clip and hpsv2, as people have them."""
    path = tmp_path_factory.mktemp("site")
    for number, name in enumerate(("clip", "hpsv2"), start=1):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text(f"from {name}.inner import value\n")
        (path / name / "inner.py").write_text(f"value = {number}\n")
    return path


@pytest.fixture(scope="module")
def python(packages) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=ROOT,
        env={"PYTHONPATH": str(packages), "PATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def test_an_installed_package_is_what_a_reward_file_imports(python, tmp_path):
    assert scored(tmp_path, python, "import clip, hpsv2", "10 * clip.value + hpsv2.value") == 12


def test_so_it_is_when_our_scorers_of_those_names_were_imported_before(python, tmp_path):
    assert scored(tmp_path, python, "import clip", "clip.value", first="import scorers.clip, scorers.hpsv2") == 1


def test_files_beside_the_users_file_are_the_users_whatever_they_are_called(python, tmp_path):
    for number, name in enumerate(OURS):
        (tmp_path / f"{name}.py").write_text(f"value = {number}\n")
    total = "+".join(f"{name}.value" for name in OURS)
    assert scored(tmp_path, python, f"import {', '.join(OURS)}", total) == sum(range(len(OURS)))


def test_a_package_beside_it_is_the_users_too(python, tmp_path):
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra" / "__init__.py").write_text("from infra.logs import value\n")
    (tmp_path / "infra" / "logs.py").write_text("value = 7\n")
    assert scored(tmp_path, python, "from infra import logs", "logs.value") == 7


def test_what_is_imported_only_when_the_function_is_called_is_found_beside_it(python, tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("value = 5\n")
    assert scored(tmp_path, python, "", "helper_of_mine.value", inside="import helper_of_mine") == 5
    assert scored(tmp_path, python, "", "clip.value", inside="import clip") == 1


def test_so_is_one_that_is_called_as_ours_and_it_is_read_once(python, tmp_path):
    (tmp_path / "config.py").write_text("calls = []\n")
    inside = "import config; config.calls.append(0)"
    calls = scored(tmp_path, python, "", "len(config.calls)", inside=inside)
    assert calls == 3  # two that try it, and this one


def test_two_files_with_helpers_of_one_name_have_each_their_own(tmp_path):
    values = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.py").write_text(f"value = {name!r}\n")
        (tmp_path / name / "file.py").write_text("import config\n\ndef f():\n    return config.value\n")
        values.append(load_function(f"{tmp_path / name / 'file.py'}:f", "reward"))
    assert [f() for f in values] == ["one", "two"]
