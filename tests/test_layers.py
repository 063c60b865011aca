"""Imports go one way, from what people run down to the mathematics; walked in the code, nothing is run but once."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT, sources

PACKAGES = ("baselines", "infra", "families", "formats", "scorers", "shapes", "recipe", "tools", "experiments", "tests")
HEIGHT = {  # a module may import what is lower, or of its own package
    "infra.flags": -1, "infra.reading": 0,
    "leaps": 0, "model": 0, "flux2": 0.5, "config": 0, "families": 1.5,
    "infra": 1, "formats": 2, "scorers.common": 1,
    "scorers": 2,
    "rewards": 3, "sample": 3, "baselines": 3,
    "samples": 4,
    "infra.failures": 1.5, "infra.methods": 5, "infra.checks": 5,
    "start": 6,
    "train": 7, "evaluate": 7,
    "shapes.world": 0, "shapes.judge": 0, "shapes": 1, "recipe": 8, "tools": 8, "experiments": 9, "tests": 10,
}  # fmt: skip
POPULAR = (
    "clip", "hpsv2", "hpsv3", "ImageReward", "imagereward", "pickscore", "judge", "files", "logs", "logger", "utils",
    "data", "dataset", "datasets", "test", "tests", "lora", "peft", "prompts", "parallel", "distributed", "checkpoint",
    "pipeline", "flux", "diffusers", "plan", "pictures", "eval", "metrics", "losses", "loss", "trainer", "main",
    "inference", "reward", "tokenizer", "vae", "clip_score", "aesthetic", "wandb", "watch", "accelerate",
)  # fmt: skip


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for folder in (".", *PACKAGES) for file in sources(f"{folder}/*.py".removeprefix("./"))}


def imports(name: str) -> Iterator[str]:
    """The modules of ours and of others that a file imports, at its top or within functions, by their full names."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (full if full in FILES else node.module for full in inner)


def height(name: str) -> float:
    """Of a module: that of its own name, or of its package."""
    return HEIGHT[name] if name in HEIGHT else HEIGHT[name.partition(".")[0]]


def ours(name: str) -> list[str]:
    return [module for module in imports(name) if module in FILES and module != name]


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    package = name.partition(".")[0]
    up = [m for m in ours(name) if height(m) >= height(name) and not (package in PACKAGES and m.startswith(package))]
    assert not up


def test_the_mathematics_stands_on_torch_alone():
    standard = set(sys.stdlib_module_names)
    assert {m.partition(".")[0] for m in imports("leaps")} - standard == {"torch"}
    assert not ours("leaps") and not ours("model")


def test_only_the_judges_scorer_knows_the_shapes_world():
    above = ("shapes", "recipe", "tools", "experiments", "tests")
    knows = {name for name in FILES for m in ours(name) if m.startswith("shapes")}
    assert {name for name in knows if not name.startswith(above)} == {"scorers.judge"}


def test_nothing_but_tests_and_the_look_at_an_update_imports_train():
    importers = {name for name in FILES if "train" in ours(name) and not name.startswith("tests.")}
    assert importers == {"tools.look"}


def test_a_reader_finds_ten_files_at_most_in_the_root_none_named_as_what_people_import():
    root = {name for name in FILES if "." not in name and name not in PACKAGES}
    scorers = {name.partition(".")[2] for name in FILES if name.startswith("scorers.")}
    assert len(root) <= 10
    assert not root & (set(POPULAR) | scorers | set(sys.stdlib_module_names))


def test_nothing_is_printed_when_a_command_starts():
    """diffusers and transformers import torchao where it is installed, which logs warnings that concern nobody here."""
    code = "import train, evaluate, sample"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
