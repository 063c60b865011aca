"""JSON lines: an object a line, so that a log survives a kill up to its last whole line."""

import json
from pathlib import Path
from typing import Any

from infra.files import replacing

Entry = dict[str, Any]


def append_line(path: Path, entry: Entry) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[Entry]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out.

    Raises ValueError naming the file and the line that is none.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}): remove that line") from None
    return entries


def truncate_log(path: Path, step: int) -> list[Entry]:
    """Take from a log what a resumed run will write again, step `step` and after; returns what is left."""
    entries = [e for e in read_log(path) if e["step"] < step]
    if path.exists():
        with replacing(path) as part:
            part.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return entries
