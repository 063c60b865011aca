"""Files and folders that a kill cannot break: a process is killed at each of its calls that change the disk."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from infra.files import (
    OLD,
    PART,
    check_writable,
    lock_folder,
    part_of,
    put_back,
    put_in_place,
    recover,
    replacing,
    unlock_folder,
)
from infra.jsonl import append_line, read_log, truncate_log
from tests.tree import sources

ROOT = Path(__file__).parent.parent

# Writes a file or a folder with `replacing`, and exits with 9 at the given call that changes the disk.
WRITER = """
import os, sys
from pathlib import Path
import files

target, kind, calls_left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def killing(call):
    def counted(*args, **options):
        global calls_left
        calls_left -= 1
        if calls_left < 0:
            os._exit(9)
        return call(*args, **options)
    return counted

for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
    setattr(os, name, killing(getattr(os, name)))
half_written = killing(lambda: None)
with files.replacing(target) as draft:
    if kind == "file":
        draft.write_text("ne")
        half_written()
        draft.write_text("new")
    else:
        draft.mkdir()
        (draft / "a").write_text("new")
        half_written()
        (draft / "b").write_text("new")
"""


def write(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)


def read(path: Path) -> str:
    """The text of a file or of a folder's two files; "nothing" or "broken"."""
    if not path.exists():
        return "nothing"
    if path.is_file():
        return path.read_text()
    texts = [file.read_text() for file in path.iterdir()]
    is_whole = len(texts) == 2 and texts[0] == texts[1]
    return texts[0] if is_whole else "broken"


def killed(target: Path, kind: str, call: int) -> bool:
    """Whether a process that writes `target` is killed at its call number `call`; it is not if it makes fewer."""
    command = [sys.executable, "-c", WRITER, str(target), kind, str(call)]
    code = subprocess.run(command, cwd=ROOT / "infra").returncode
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("state", ["old", "nothing"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_call_a_reader_finds_the_old_or_the_new_and_the_next_write_works(kind, state, tmp_path):
    texts, call, was_killed = set(), 0, True
    while was_killed:
        target = tmp_path / str(call) / "best"
        target.parent.mkdir()
        if state == "old":
            write(target, kind, "old")
        was_killed = killed(target, kind, call)

        put_back(target)  # as a reader does
        texts.add(read(target))
        recover(target)  # as a resumed run does
        assert read(target) in (state, "new")

        with replacing(target) as draft:
            write(draft, kind, "next")
        assert read(target) == "next"
        assert list(target.parent.iterdir()) == [target]
        call += 1
    assert texts == {state, "new"} and call > 3


@pytest.mark.parametrize("call", range(12))
def test_a_second_kill_while_recovering_from_the_first_loses_nothing(call, tmp_path):
    # The first kill is between the two renames.
    target = tmp_path / "best"
    write(tmp_path / f"best{OLD}", "folder", "old")
    write(tmp_path / f"best{PART}", "folder", "new")
    killed(target, "folder", call)
    recover(target)
    assert read(target) in ("old", "new")


def test_the_old_folder_comes_back_if_there_is_no_new_one(tmp_path):
    target = tmp_path / "best"
    write(tmp_path / f"best{OLD}", "folder", "old")
    recover(target)
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_folder_is_removed_if_there_is_a_new_one(tmp_path):
    target = tmp_path / "best"
    write(target, "folder", "new")
    write(tmp_path / f"best{OLD}", "folder", "old")
    put_back(target)
    assert (tmp_path / f"best{OLD}").exists()  # a reader removes nothing
    recover(target)
    assert read(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_while_writing_leaves_the_old_and_nothing_else(kind, tmp_path):
    target = tmp_path / "best"
    write(target, kind, "old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as draft:
        write(draft, kind, "new")
        raise KeyboardInterrupt
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_between_the_two_renames_puts_the_old_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "best", Path.replace

    def failing(self: Path, new_path: Path) -> Path:
        if self.name == f"best{PART}":
            raise OSError("the disk is gone")
        return replace(self, new_path)

    write(target, "folder", "old")
    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"), replacing(target) as draft:
        write(draft, "folder", "new")
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_may_be_put_in_place_later(tmp_path):
    target = tmp_path / "deep" / "best"
    draft = part_of(target)
    write(draft, "folder", "new")
    put_in_place(draft, target)
    assert read(target) == "new"


def test_check_writable_names_the_flag_and_the_file_in_the_way(tmp_path):
    check_writable("--out", tmp_path / "deep" / "run")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=f"^--out: nothing can be written in {file}$"):
        check_writable("--out", file / "run")
    assert list(tmp_path.iterdir()) == [file]  # it makes nothing


def test_a_link_to_a_folder_has_the_folders_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock_folder(tmp_path / "run")
    with pytest.raises(ValueError, match=f"--out {tmp_path / 'link'}: .* trains there"):
        lock_folder(tmp_path / "link")
    unlock_folder(tmp_path / "link")
    lock_folder(tmp_path / "run")
    unlock_folder(tmp_path / "run")


def test_a_log_is_truncated_by_numbers_not_by_their_digits(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        append_line(log, {"step": step})
    entries = truncate_log(log, 1_000_000)
    assert [entry["step"] for entry in entries] == [999_998, 999_999]
    assert read_log(log) == entries


def renames(tree: ast.AST) -> list[ast.Call]:
    """The calls that rename a file or folder, but for those within a draft."""
    calls = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        path_replace = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
        is_rename = path_replace or node.func.attr in ("rename", "renames", "move")
        within_draft = node.args and ast.unparse(node.args[0]).startswith(("part / ", "draft / "))
        if is_rename and not within_draft:
            calls.append(node)
    return calls


def test_no_other_module_renames_files():
    lines = []
    for folder in (".", "infra", "formats", "scorers", "shapes", "recipe", "experiments", "tools"):
        for file in sources(f"{folder}/*.py".removeprefix("./")):
            # saving.py renames the files of a model folder that is still a draft.
            if file.name not in ("files.py", "saving.py"):
                lines += [f"{file}:{node.lineno}" for node in renames(ast.parse(file.read_text()))]
    assert not lines
