"""JSON lines: one object per line, so that a log survives a kill up to its last whole line."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.files import write_whole
from infra.reading import parse_file

Entry = dict[str, Any]


def append_line(path: Path, entry: Entry) -> None:
    """Add an object to a log."""
    # Opened for each line: the file is complete up to here, whatever ends the process.
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path, check: Callable[[Entry], Any] = bool) -> list[Entry]:
    """The objects of a log; none if there is no such file.

    Raises ValueError naming the file and the line that is not JSON, or for which `check` raises whatever it likes.
    """
    if not path.exists():
        return []

    def parse(line: str) -> Entry:
        entry = json.loads(line)
        check(entry)
        return entry

    *lines, _ = parse_file(path, Path.read_text).split("\n")  # after the last line end is what a kill interrupted
    entries = []
    for number, line in enumerate(lines, start=1):
        # Damage is not by a kill, so the reader must decide what the line was.
        entries.append(parse_file(f"{path}, line {number}", lambda _, line=line: parse(line), "remove that line"))
    return entries


def check_numbers_of(entry: Entry, names: Sequence[str], listed: Sequence[str] = ()) -> None:
    """Raise TypeError or KeyError if an entry of a log lacks its step, these numbers, or lists by prompt."""
    for name in ("step", *names):
        entry[name] + 0
    for name in listed:
        sum(entry["by_prompt"][name])


def truncate_log(path: Path, step: int) -> list[Entry]:
    """Remove the entries from `step` on, which a resumed run writes again, and return the entries that stay."""
    entries = [entry for entry in read_log(path) if entry["step"] < step]
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in entries]
        # In one step: a kill must not lose the log.
        write_whole(path, "".join(lines))
    return entries
