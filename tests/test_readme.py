"""The READMEs: commands parse, code runs, paths exist, numbers stand in the results, equations are where they say."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

import evaluate
import sample
import train
from config import parse
from experiments.compare import CompareFlags
from experiments.fidelity import FidelityFlags
from infra.distributed import join
from tests.tree import ROOT, sources
from tools.plan import PlanFlags
from tools.prompts import PromptsFlags

README = (ROOT / "README.md").read_text()
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


def code_block(word: str) -> str:
    """The one Python block of the README that has a word in it."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in b]
    return block


# -------------------------------------------------------------------------------------------- code


def test_the_readmes_own_method_runs_from_its_file_and_resumes_only_as_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_method.py").write_text(code_block("def noisy_steps"))
    (tmp_path / "few.txt").write_text("a photo of a circle\na photo of two squares\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--updates", "2", "--batch", "4", "--eval-prompts", "few.txt", "--out", "run"]

    def command(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "--method", "my_method.py:noisy_steps", *flags, *more])
        train.main()

    command("--option", "count=2", "power=0.5")
    entry = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert entry["backwards"] == 4 * 2
    assert 0 < entry["k"] <= 1
    with pytest.raises(SystemExit, match="2"):
        command("--resume", "--option", "count=3")
    assert "was started with ['count=2', 'power=0.5']" in capsys.readouterr().err


def test_the_update_by_hand_prints_what_the_readme_shows(capsys):
    block = code_block("open_run")
    scope: dict = {}
    exec(block, scope)
    scope["run"].stack.close()  # the process group, which lives as long as a Python prompt otherwise
    printed = capsys.readouterr().out
    values = [float(number) for number in re.findall(r"-?\d+\.\d+", printed)]
    shown = README.split(block)[1].split("```")[2]
    shown_values = [float(number) for number in re.findall(r"-?\d+\.\d+", shown)]
    assert len(values) == len(shown_values) > 5
    # Other processors and numbers of threads round differently.
    assert values == pytest.approx(shown_values, abs=2e-3, rel=2e-3)


# ---------------------------------------------------------------------------------------- commands


def commands(program: str) -> Iterator[str]:
    """The arguments of all of the README's commands of a program; a line that ends with a backslash goes on."""
    text = README.replace("\\\n", " ")
    for line in re.findall(rf"^ {{4,}}(?:python|torchrun.*?) {re.escape(program)}(?: (.*))?$", text, re.MULTILINE):
        yield line.partition("#")[0]
    for line in re.findall(rf"`(?:python|torchrun[^`]*?) {re.escape(program)} ?([^`]*)`", text):
        yield line


@pytest.mark.parametrize("program, count", [("train.py", 10), ("sample.py", 1), ("evaluate.py", 1)])
def test_the_readme_has_commands_of_each_program(program, count):
    assert len(list(commands(program))) >= count


@pytest.mark.parametrize("arguments", [a for a in commands("train.py") if "--help" not in a])
def test_flags_of_train_exist(arguments):
    parse(shlex.split(arguments))


@pytest.mark.parametrize(
    "program, flags",
    [
        ("sample.py", sample.SampleFlags),
        ("evaluate.py", evaluate.EvaluateFlags),
        ("-m tools.plan", PlanFlags),
        ("-m tools.prompts", PromptsFlags),
        ("-m experiments.compare", CompareFlags),
        ("-m experiments.fidelity", FidelityFlags),
    ],
)
def test_flags_of_other_commands_exist(program, flags):
    for arguments in commands(program):
        _, words = tyro.cli(flags, args=shlex.split(arguments), return_unknown_args=True)
        if words:  # tools.plan takes a preset and flags of train.py, too
            assert flags is PlanFlags
            parse(words)


# ----------------------------------------------------------------------------------- paths, numbers


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_to_a_file(file):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_every_interval_stands_in_a_results_file():
    results = "".join(file.read_text() for file in (ROOT / "experiments" / "results").glob("*.md"))
    intervals = re.findall(r"\d\.\d+ ±\d\.\d+", README)
    assert len(intervals) > 8
    for interval in intervals:
        assert interval in results, interval


def test_every_function_in_the_table_of_symbols_is_where_it_says_and_names_its_equation():
    table = README.split("| symbol |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) >= 12
    equations = set()
    for symbol, _, _, functions, equation in rows:
        files = re.findall(r"\]\(([\w/]+\.py)\)", functions) or ["leaps.py"]
        source = "".join((ROOT / file).read_text() for file in files)
        for name in re.findall(r"`(\w+)`", functions):
            assert f"def {name}(" in source, (symbol, name)
        for number in re.findall(r"\d+", equation):
            assert re.search(rf"Eq\.[ \d,and-]*\b{number}\b", source), (symbol, number)
            equations.add(int(number))
    assert equations == set(range(3, 15)) - {8}  # Eq. 8 is Eq. 10 without the discount


def test_every_file_of_the_root_is_in_the_list_of_files():
    listed = set(re.findall(r"^ {4}(\w+\.py) ", README.split("## Commands and files")[1], re.MULTILINE))
    assert {file.name for file in sources("*.py")} == listed


def test_an_update_runs_through_as_many_files_as_the_readme_says(tmp_path):
    cfg, preset = parse(["shapes", "--batch", "4", "--rollout-steps", "2", "--out", str(tmp_path / "run")])
    lines_of_file: dict[str, set[int]] = {}

    def note(frame, event: str, argument) -> None:
        code = frame.f_code
        file = Path(code.co_filename)
        if event == "call" and file.is_relative_to(ROOT) and ".venv" not in file.parts:
            name = str(file.relative_to(ROOT))
            lines = {line for _, _, line in code.co_lines() if line}
            lines_of_file[name] = lines_of_file.get(name, set()) | lines

    with join("cpu") as process:
        setup = train.set_up(cfg, process, preset)
        state = train.make_state(cfg, setup.pipe.flux)
        sys.setprofile(note)
        train.one_update(cfg, setup, state, process, 0)
        sys.setprofile(None)
    count = int(re.search(r"An update runs through (\d+) files", README)[1])
    names = re.search(r"three quarters of its lines are in (.*?)\.\n", README)[1]
    lines = sum(len(lines_of_file[name]) for name in re.findall(r"\w+\.py", names))
    assert len(lines_of_file) == count
    assert lines / sum(map(len, lines_of_file.values())) == pytest.approx(0.75, abs=0.03)
