"""Files and folders that a kill cannot break: a process is killed before each call of its that changes the disk."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from infra import files
from infra.files import OLD, PART, exchange, part_of, put_in_place, recover, replacing

ROOT = Path(__file__).parent.parent
KILLED = """
import os, shutil, sys
from pathlib import Path
import files

target, kind, can_exchange, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])

def step(call):
    def counted(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args, **options)
    return counted

for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
    setattr(os, name, step(getattr(os, name)))
files.exchange = step(files.exchange if can_exchange else lambda a, b: False)
with files.replacing(target) as part:
    if kind == "file":
        part.write_text("ne")
        step(lambda: None)()
        part.write_text("new")
    else:
        part.mkdir()
        (part / "a").write_text("new")
        step(lambda: None)()
        (part / "b").write_text("new")
"""


def write(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)


def read(path: Path) -> str:
    """What a file or folder says as a whole; "nothing", or "broken"."""
    if not path.exists():
        return "nothing"
    texts = {path.read_text()} if path.is_file() else {f.read_text() for f in path.iterdir()}
    whole = path.is_file() or len(list(path.iterdir())) == 2
    return texts.pop() if whole and len(texts) == 1 else "broken"


def killed(target: Path, kind: str, can_exchange: bool, step: int) -> bool:
    """Whether a process that writes `target` was killed at its `step`; it is done if there are not so many."""
    command = [sys.executable, "-c", KILLED, str(target), kind, str(can_exchange), str(step)]
    code = subprocess.run(command, cwd=ROOT / "infra").returncode
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["old", "nothing"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_step_the_old_or_the_new_is_whole_and_the_next_write_works(kind, before, can_exchange, tmp_path):
    seen, step = set(), 0
    while True:
        target = tmp_path / str(step) / "best"
        target.parent.mkdir()
        if before == "old":
            write(target, kind, "old")
        was_killed = killed(target, kind, can_exchange, step)
        if can_exchange and sys.platform == "linux":
            assert read(target) in (before, "new")
        recover(target)
        seen.add(read(target))
        assert read(target) in (before, "new")
        with replacing(target) as part:
            write(part, kind, "next")
        assert read(target) == "next" and list(target.parent.iterdir()) == [target]
        if not was_killed:
            break
        step += 1
    assert seen == {before, "new"} and step > 3


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_second_kill_while_recovering_from_the_first_loses_nothing(can_exchange, step, tmp_path):
    """The first kill is between the two renames, which leaves an old and a part."""
    target = tmp_path / "best"
    write(tmp_path / f"best{OLD}", "folder", "old")
    write(tmp_path / f"best{PART}", "folder", "new")
    killed(target, "folder", can_exchange, step)
    recover(target)
    assert read(target) in ("old", "new")


def test_what_stepped_aside_comes_back_and_is_removed_where_there_is_a_newer(tmp_path):
    target = tmp_path / "best"
    write(tmp_path / f"best{OLD}", "folder", "old")
    recover(target)
    assert read(target) == "old" and list(tmp_path.iterdir()) == [target]
    write(tmp_path / f"best{OLD}", "folder", "older")
    with replacing(target) as part:
        write(part, "folder", "new")
    assert read(target) == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_while_writing_leaves_the_old_and_nothing_else(kind, tmp_path):
    target = tmp_path / "best"
    write(target, kind, "old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        write(part, kind, "new")
        raise KeyboardInterrupt
    assert read(target) == "old" and list(tmp_path.iterdir()) == [target]


def test_an_error_between_the_two_renames_puts_the_old_back(tmp_path, monkeypatch):
    target, move = tmp_path / "best", Path.replace

    def failing(self: Path, to: Path) -> Path:
        if self.name == f"best{PART}":
            raise OSError("the disk is gone")
        return move(self, to)

    write(target, "folder", "old")
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"), replacing(target) as part:
        write(part, "folder", "new")
    assert read(target) == "old" and list(tmp_path.iterdir()) == [target]


def test_a_part_may_be_put_in_place_later(tmp_path):
    part = part_of(tmp_path / "deep" / "best")
    write(part, "folder", "new")
    put_in_place(part, tmp_path / "deep" / "best")
    assert read(tmp_path / "deep" / "best") == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders")
def test_folders_change_places_in_one_step_or_not_at_all(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, "folder", "one")
    assert not exchange(a, b) and read(a) == "one"
    write(b, "folder", "two")
    assert exchange(a, b) and (read(a), read(b)) == ("two", "one")


def test_every_write_then_rename_of_the_code_is_in_infra_files():
    found = []
    code = [file for folder in (".", "infra", "scorers", "shapes", "tools") for file in (ROOT / folder).glob("*.py")]
    for file in code:
        for node in ast.walk(ast.parse(file.read_text())):
            if file.name != "files.py" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                path_replace = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
                inside = node.args and ast.unparse(node.args[0]).startswith("part / ")  # of what is not yet in place
                if (path_replace or node.func.attr in ("rename", "renames", "move")) and not inside:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found
