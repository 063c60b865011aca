"""Prompt files, and the order in which a run sees what they say."""

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Entry = dict[str, Any]  # a prompt under "prompt", and all else that a file says of it
KEYS = ("prompt", "prompts", "text", "caption")  # what files call a prompt, in any case; the first of them counts
COMMENT = re.compile(r"#+(\s|$)")  # not "#1 dad mug"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file: one per line, JSON lines, a JSON array, or a table with a header.

    A table is tab- or comma-separated, as PartiPrompts.tsv and DrawBench.csv; HPDv2's test.json is such an array.
    Objects and tables have the prompt under one of KEYS.  Blank lines are left out, and so are those that start with
    "# ", of which a line on stderr tells.
    Raises ValueError naming the file, and the line or entry at fault, if it cannot be read or holds no prompt.
    """
    return [entry["prompt"] for entry in read_entries(path)]


def read_entries(path: Path) -> list[Entry]:
    """As `read_prompts`, with all that JSON or a table says of a prompt; a plain line becomes {"prompt": line}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}, {error.strerror}: give one, a prompt a line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    entries = from_array(text, path)
    if entries is None:
        entries = from_table(text, path)
    if entries is None:
        entries = from_lines(text, path)
    if not entries:
        raise ValueError(f"prompt file {path} holds no prompt: write one per line")
    return entries


def prompts_hash(prompts: Sequence[str]) -> str:
    """Eight hex digits that are others for other prompts, or another order of them."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:8]


# ------------------------------------------------------------------------------------- forms of a file


def from_array(text: str, path: Path) -> list[Entry] | None:
    """The entries of a JSON array; None if the file is none.

    [masterpiece], 1girl is none either; what is called .json and starts as an array, or is an array of objects up to
    where it breaks, is an error.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix == ".json" or re.match(r'\s*\[\s*\{\s*"', text):
            raise ValueError(f"prompt file {path}: no JSON ({error})") from error
        return None
    plain = [{"prompt": item} if isinstance(item, str) else item for item in items]
    return [with_prompt(item, f"{path}, entry {number}") for number, item in enumerate(plain)]


def from_table(text: str, path: Path) -> list[Entry] | None:
    """The rows under a header that names a column of prompts; None if the file has no such header.

    A file that is not called .csv or .tsv is one only if it has more columns than one, and all rows have all of
    them: "prompt, text" may be a prompt too.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")  # its first cell may be empty, as pandas'
    called, separator = path.suffix.lower() in (".csv", ".tsv"), "\t" if "\t" in first else ","
    header = [cell.strip().strip('"') for cell in first.split(separator)]
    if (column := prompt_key(header)) is None:
        if called:
            raise ValueError(f"prompt file {path}: no column of its header is called {' or '.join(KEYS)}: {first!r}")
        return None
    rows = [(line, row) for line, row in table_rows(text, separator, path) if any(map(str.strip, row))][1:]
    if not called and (len(header) == 1 or any(len(row) != len(header) for _, row in rows)):
        return None
    entries = []
    for line, row in rows:
        if len(row) > len(header):
            cells = f"{len(row)} cells under {len(header)} columns"
            raise ValueError(f'{path}, line {line}: {cells}; a prompt with "{separator}" in it needs quotes around it')
        entry = dict(zip(header, row))
        entries.append(with_prompt(entry | {"prompt": entry.get(column, "").strip()}, f"{path}, line {line}"))
    return entries


def table_rows(text: str, separator: str, path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and cells. Where quotes are not those of a table, in tab-separated files, they are letters."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        if separator != "\t":
            raise ValueError(f"{path}, line {reader.line_num}: no row of a table ({error})") from error
    return [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), start=1)]


def from_lines(text: str, path: Path) -> list[Entry]:
    """One prompt per line; JSON lines where the file is called so, or a line of it is a JSON object."""
    lines = [(n, line) for n, line in enumerate(map(str.strip, text.split("\n")), start=1) if line]  # not splitlines,
    written = [(n, line) for n, line in lines if not COMMENT.match(line)]  # which cuts at more than line ends
    if left_out := len(lines) - len(written):
        print_once(f"{path}: {left_out} of {len(lines)} lines {'starts' if left_out == 1 else 'start'} with # and a space: "
            "read as comments")  # fmt: skip
    called = path.suffix in (".json", ".jsonl")
    is_json = called or any(is_object(line) for _, line in written)
    entries = []
    for number, line in written:
        where = f"{path}, line {number}"
        in_json = (is_json and line.startswith("{")) or (called and line.startswith('"'))
        try:
            entry = json.loads(line) if in_json else line
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON ({error})") from error
        entries.append(with_prompt({"prompt": entry} if isinstance(entry, str) else entry, where))
    return entries


def is_object(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def prompt_key(names: Sequence[str]) -> str | None:
    """Which of the names that a file gives is that of the prompt."""
    known = {name.lower(): name for name in sorted(names, key=str.islower)}  # of two, that in lower case
    return next((known[key] for key in KEYS if key in known), None)


def with_prompt(entry: Any, where: str) -> Entry:
    """The entry, its prompt under "prompt". ValueError if it has none."""
    prompt = entry.get(prompt_key(list(entry))) if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        found = ", ".join(entry) or "nothing" if isinstance(entry, dict) else repr(entry)
        raise ValueError(f'{where}: it has no "prompt", but {found}')
    return entry | {"prompt": prompt}


def print_once(text: str) -> None:
    """Tell people, once however many processes read the file."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


# ----------------------------------------------------------------------------------------------- order


def prompts_of_update(items: Sequence[Item], step: int, size: int, seed: int) -> list[Item]:
    """The `size` items of one step: all of them once an epoch, each epoch in an order of its own.

    A function of (seed, step) alone, so a run resumes, and any step is repeated, without a state.
    """
    batch, orders = [], {}
    for i in range(step * size, (step + 1) * size):
        epoch, i_in_epoch = divmod(i, len(items))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(items))
        batch.append(items[orders[epoch][i_in_epoch]])
    return batch


def rows_of_rank(items: Sequence[Item], rank: int, process: int) -> Sequence[Item]:
    """A rank's part of a batch: neighbours, so that the parts in the order of ranks are the batch."""
    return items[rank * len(items) // process : (rank + 1) * len(items) // process]
