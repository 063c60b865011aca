"""A user's file imports our modules, installed packages and the files beside it; our own imports stay ours."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infra.failures import explain
from infra.user_code import UserCodeError, load_function

ROOT = Path(__file__).parent.parent
REWARD = """
import torch
{imports}

def mine(images, prompts):
    {body}
    return images.mean((1, 2, 3)) * 0 + torch.tensor([float({value})] * len(images))
"""

# Runs a user's reward, then tiny and the other modules of ours.
PROGRAM = """
import sys
assert not {{"clip", "hpsv2", "rewards", "infra", "scorers"}} & sys.modules.keys()
import torch
{first}
from rewards import open_reward
users = open_reward({spec!r})
tiny = open_reward("tiny")
images = torch.rand(2, 3, 64, 64)
prompts = ["a photo of a circle"] * 2
assert tiny.score(images, prompts).isfinite().all()
import config, leaps, model, infra.logs, scorers.clip
modules = [config, leaps, model, infra.logs, scorers.clip, sys.modules["rewards"]]
assert all(module.__file__.startswith({root!r}) for module in modules), modules
print(users.score(images, prompts)[0].item(), flush=True)
"""

# Answers each line of code with a line, from a process in which nothing of ours or of the user's is imported yet.
FORKS = """
import json, os, sys, traceback
from transformers import AutoTokenizer, CLIPModel  # seconds, but once for all processes
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


@pytest.fixture
def sys_path(monkeypatch) -> None:
    """The test may add folders to the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder of installed packages: clip and hpsv2, as people have them."""
    folder = tmp_path_factory.mktemp("site")
    for number, name in enumerate(("clip", "hpsv2"), start=1):
        package = folder / name
        package.mkdir()
        (package / "__init__.py").write_text(f"from {name}.inner import value\n")
        (package / "inner.py").write_text(f"value = {number}\n")
    return folder


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


def answer(
    file: Path,
    python: subprocess.Popen,
    imports: str,
    value: str,
    body: str = "pass",
    first: str = "",
) -> float | str:
    """What a reward in `file` scores in a new process, or the traceback."""
    file.write_text(REWARD.format(imports=imports, value=value, body=body))
    code = PROGRAM.format(spec=f"{file}:mine", root=str(ROOT), first=first)
    print(json.dumps(code), file=python.stdin, flush=True)
    return json.loads(python.stdout.readline())


def test_a_file_imports_installed_packages(python, tmp_path):
    value = "10 * clip.value + hpsv2.value"
    assert answer(tmp_path / "my_file.py", python, "import clip, hpsv2", value) == 12


def test_a_file_imports_installed_packages_though_our_scorers_have_their_names(python, tmp_path):
    first = "import scorers.clip, scorers.hpsv2"
    assert answer(tmp_path / "my_file.py", python, "import clip", "clip.value", first=first) == 1


@pytest.mark.parametrize("name", ["clip", "rewards"])
def test_a_file_of_any_name_imports_the_modules_and_packages_beside_it(name, python, tmp_path):
    (tmp_path / "utils.py").write_text("value = 20\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "logs.py").write_text("value = 3\n")
    imports = "import utils\nfrom my_package import logs"
    assert answer(tmp_path / f"{name}.py", python, imports, "utils.value + logs.value") == 23


def test_a_file_called_as_an_installed_package_imports_the_package(python, tmp_path):
    assert answer(tmp_path / "clip.py", python, "import clip", "clip.value") == 1


def test_an_import_within_the_function_finds_the_module_beside_the_file(python, tmp_path):
    (tmp_path / "helper.py").write_text("calls = []\n")
    body = "import helper; helper.calls.append(0)"
    calls = answer(tmp_path / "my_file.py", python, "", "len(helper.calls)", body=body)
    assert calls == 4  # open_reward tries the function three times


def test_a_module_beside_the_file_may_have_any_name_if_the_file_does_not_import_it(python, tmp_path):
    for name in ("config", "rewards", "clip"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit\n")
    assert answer(tmp_path / "my_file.py", python, "from leaps import rollout", "1") == 1


def test_a_dataclass_of_a_file_finds_its_annotations(tmp_path, sys_path):
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", ""]
    lines += ["@dataclass", "class Reward:", "    scale: float"]
    (tmp_path / "file.py").write_text("\n".join(lines))
    reward = load_function(f"{tmp_path / 'file.py'}:Reward", "reward")
    assert reward(3.0).scale == 3.0


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("statement", ["import {name}", "def f():\n    from {name}.inner import value"])
@pytest.mark.parametrize(
    "name, neighbour, origin",
    [
        ("config", "config.py", ROOT / "config.py"),
        ("model", "model/__init__.py", ROOT / "model.py"),
        ("infra", "infra.py", ROOT / "infra" / "__init__.py"),
        ("pytest", "pytest.py", Path(pytest.__file__)),
    ],
)
def test_an_import_that_would_miss_the_module_beside_the_file(name, neighbour, origin, statement, tmp_path, sys_path):
    file, hidden = tmp_path / "my_file.py", tmp_path / neighbour
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_text("")
    file.write_text(statement.format(name=name))
    message = f"{file} imports {name}: Python finds {origin}, not {hidden}. Rename yours"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_function(f"{file}:f", "reward")


def test_the_second_of_two_helpers_of_one_name(tmp_path, sys_path):
    specs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "my_helper.py").write_text(f"value = {name!r}\n")
        (folder / "file.py").write_text("import my_helper\n\ndef f():\n    return my_helper.value\n")
        specs.append(f"{folder / 'file.py'}:f")
    assert load_function(specs[0], "reward")() == "one"
    with pytest.raises(ValueError, match=r"one/my_helper\.py, not .*two/my_helper\.py\. Rename yours"):
        load_function(specs[1], "reward")


@pytest.mark.parametrize(
    "code, message",
    [
        ("1 / 0", r"does not run: ZeroDivisionError: .*file.py, line 1\)"),
        ("\nraise SystemExit(3)", r"does not run: SystemExit: 3 .*file.py, line 2\)"),
        ("x = 1\ny = = 2", r"does not run: SyntaxError: .*file.py, line 2\)"),
        ("import no_such_module", r"does not run: ModuleNotFoundError: .*file.py, line 1\)"),
        ("f = 1", r"defines no function 'f'"),
    ],
)
def test_a_file_that_does_not_run_or_lacks_the_function(code, message, tmp_path, sys_path):
    file = tmp_path / "file.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=message):
        load_function(f"{file}:f", "reward")


def test_a_file_that_does_not_exist():
    with pytest.raises(ValueError, match=r"no file 'none\.py' for the method 'none\.py:f'"):
        load_function("none.py:f", "method")


# ---------------------------------------------------------------------------- a guest leaves no trace


LOUD = """
import os, random, sys
import numpy as np
import torch

torch.set_grad_enabled(False)
os.chdir("/")

def loud(images, prompts):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(7)
    torch.manual_seed(0)
    torch.set_default_device("meta")
    os.chdir("/")
    images -= 1
    prompts.clear()
    return images.mean((1, 2, 3))

def drawn(images, prompts):
    return torch.rand(2) + random.random() + np.random.random()

def ends(images, prompts):
    {statement}
"""


def state_of_torch() -> tuple:
    generator = torch.get_rng_state().tolist()
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    return generator, *settings, torch.get_num_threads(), os.getcwd()


def loud(folder: Path, name: str, statement: str = "pass") -> Callable:
    file = folder / "loud.py"
    file.write_text(LOUD.format(statement=statement))
    return load_function(f"{file}:{name}", "reward")


def test_what_a_function_sets_or_writes_into_is_as_before_after_each_call(tmp_path, sys_path):
    images, prompts = torch.ones(2, 3, 4, 4), ["a", "b"]
    function = loud(tmp_path, "loud")
    first, *settings = state_of_torch()
    assert function(images, prompts).tolist() == [0, 0]
    generator, *others = state_of_torch()
    assert others == settings and generator != first  # a draw a call
    assert (images == 1).all() and prompts == ["a", "b"]


def test_random_numbers_follow_torchs_seed_and_differ_from_call_to_call(tmp_path, sys_path):
    function = loud(tmp_path, "drawn")
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([function(torch.ones(2), []).tolist() for _ in range(2)])
    assert draws[0] == draws[1] != draws[2] and draws[0][0] != draws[0][1]


@pytest.mark.parametrize("statement", ["sys.exit(0)", "raise KeyboardInterrupt", "raise OSError", "1 / 0"])
def test_whatever_a_function_raises_is_an_error_of_its_own_with_its_line(statement, tmp_path, sys_path):
    function = loud(tmp_path, "ends", statement)
    with pytest.raises(UserCodeError, match=r"reward .*loud\.py:ends fails on \(2,\): .*loud\.py, line 24\)"):
        function(torch.ones(2), [])


def test_memory_that_is_used_up_within_a_users_function_stays_that_error(tmp_path, sys_path):
    function = loud(tmp_path, "ends", "raise torch.OutOfMemoryError('no room')")
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(2), [])
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    error.add_note("leaps")
    assert explain(error) == "out of memory in the leaps: take a smaller --micro-batch, or --recompute blocks"
    assert explain(KeyError("x")) is None
