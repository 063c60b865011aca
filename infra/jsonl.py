"""JSON lines: one object per line, so that a log survives a kill up to its last whole line."""

import json
from pathlib import Path
from typing import Any

from infra.files import replacing

Entry = dict[str, Any]


def append_line(path: Path, entry: Entry) -> None:
    """Add an object to a log."""
    # Opened for each line: the file is complete up to here, whatever ends the process.
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[Entry]:
    """The objects of a log; none if there is no such file.

    Raises ValueError naming the file and the line that is not JSON.
    """
    if not path.exists():
        return []
    entries = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break  # a kill interrupted the last write
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                # Not by a kill, so the reader must decide what the line was.
                raise ValueError(f"{path}, line {number}, is damaged ({error}): remove that line") from None
    return entries


def truncate_log(path: Path, step: int) -> list[Entry]:
    """Remove the entries from `step` on, which a resumed run writes again, and return the entries that stay."""
    entries = [entry for entry in read_log(path) if entry["step"] < step]
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in entries]
        # In one step: a kill must not lose the log.
        with replacing(path) as draft:
            draft.write_text("".join(lines))
    return entries
