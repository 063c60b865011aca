"""Prompt files, and the order in which a run sees their prompts."""

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from infra.reading import parse_file

Entry = dict[str, Any]  # a prompt under "prompt", and whatever else its file says of it
COLUMNS = ("prompt", "prompts", "text", "caption")  # names of the prompt, in any case; the first with text counts
COMMENT = re.compile(r"#+(\s|$)")  # "# a note", not "#1 dad mug"
# Zero-width space, word joiner and byte order mark: they come with text from web pages and would become tokens. The
# zero-width joiners stay, because emoji and Persian words are made with them.
INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
CONTROL = re.compile("[\0-\b\v-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line feed; half of a pair, too
# The first line that is written for another program: an object of JSON; a prompt with flags such as --w 512;
# "prompts:", or the first line of a list in which every line has a dash.
OTHER_FORMAT = re.compile(
    r'(?P<JSON_lines>^\[?\{ ?".*$)'
    r"|(?P<a_kohya_prompt_file>^.* --[a-z]+ .*$)"
    r"|(?P<YAML>^prompts:$|\A- .*(?=(?:\n- .*)*\Z))",
    re.MULTILINE,
)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, whose suffix says how it is read.

    .jsonl is JSON lines; .json is a JSON array (HPDv2's test.json) or JSON lines; .csv and .tsv are tables with a
    header (DrawBench.csv, PartiPrompts.tsv); .txt and all others have one prompt per line.
    JSON objects and tables have the prompt under one of COLUMNS. Blank lines and comments ("# ...") are left out.

    Raises ValueError naming the file and the line if the file cannot be read or holds no prompt.
    """
    return [entry["prompt"] for entry in read_entries(path)]


def read_entries(path: Path) -> list[Entry]:
    """As `read_prompts`, with the other fields of JSON objects and tables; a line of text becomes {"prompt": line}."""
    remedy = "write prompts as UTF-8 text, one per line, or make them with python -m tools.prompts --file FILE"
    entries = parse_file(path, parse_entries, remedy)
    match = OTHER_FORMAT.search("\n".join(entry["prompt"] for entry in entries))
    if match:
        format_name = match.lastgroup.replace("_", " ")
        print_on_first_rank(f"warning: {path} looks like {format_name}, and this is read as a prompt: {match[0]:.200}")
    return entries


def parse_entries(path: Path) -> list[Entry]:
    text = INVISIBLE.sub("", path.read_text(encoding="utf-8"))
    entries = [with_prompt(item, number) for number, item in read_items(text, path.suffix.lower())]
    if not entries:
        raise ValueError("it holds no prompt")
    return entries


def prompts_hash(prompts: Sequence[str]) -> str:
    """Eight hex digits that differ for different prompts, and for another order of the same prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:8]


# ------------------------------------------------------------------------------------------- formats


def read_items(text: str, suffix: str) -> Iterator[tuple[int, Any]]:
    """Prompts, or objects that hold one, in the format that the suffix names; each with its line number."""
    if suffix in (".csv", ".tsv"):
        yield from table_rows(text, "," if suffix == ".csv" else "\t")
        return
    is_json = suffix in (".json", ".jsonl")
    if suffix == ".json" and text.lstrip().startswith("["):
        yield from enumerate(json.loads(text), start=1)  # numbers of items, as json does not tell their lines
        return
    for number, line in enumerate(text.split("\n"), start=1):  # str.splitlines would split at a U+2028 in a prompt, too
        line = line.strip()
        if line and not COMMENT.match(line):
            try:
                yield number, json.loads(line) if is_json else line
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from error


def table_rows(text: str, delimiter: str) -> Iterator[tuple[int, Entry]]:
    """The rows of a table, as dicts by the header's columns."""
    # PartiPrompts.tsv has quotation marks in its prompts, which quote no cell.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in table:
            if None in row:  # csv puts here the cells of a row that is longer than the header
                raise csv.Error(f"more cells than columns: a prompt with {delimiter!r} in it needs quotes")
            yield table.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {table.reader.line_num}: {error}") from error


def with_prompt(item: Any, number: int) -> Entry:
    """An item of a file as an entry. Raises ValueError if it has no prompt."""
    entry = item if isinstance(item, dict) else {"prompt": item}
    fields = {name.lower(): value for name, value in entry.items()} | entry  # "prompt" wins over "Prompt"
    for column in COLUMNS:
        prompt = fields.get(column)
        if isinstance(prompt, str) and prompt.strip():
            prompt.encode()  # raises UnicodeEncodeError for half of a pair, which JSON can write
            return entry | {"prompt": prompt.strip()}
    raise ValueError(f'line {number} has no "prompt": {item!r:.80}')


def print_on_first_rank(text: str) -> None:
    """Print to stderr, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr)


def printable(text: str) -> str:
    """A text with its control characters escaped: those of a stranger's file could rewrite the terminal."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


# ---------------------------------------------------------------------------------------------- order


def prompts_of_update(prompts: Sequence[str], update: int, size: int, seed: int) -> list[str]:
    """The `size` prompts of an update: all prompts once an epoch, in an order that is drawn for each epoch.

    A function of (seed, update) alone, so that a run resumes, and any update is repeated, without a saved state.
    """
    batch = []
    while len(batch) < size:
        epoch, first = divmod(update * size + len(batch), len(prompts))
        order = order_of_epoch(len(prompts), epoch, seed)
        batch += [prompts[i] for i in order[first : first + size - len(batch)]]
    return batch


@lru_cache(maxsize=2)  # a permutation of a million prompts takes longer than an update of a small model
def order_of_epoch(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def rows_of_rank(rows: Sequence, rank: int, world_size: int) -> Sequence:
    """A rank's share of a batch: neighbours, so that the shares in the order of the ranks are the batch."""
    return rows[rank * len(rows) // world_size : (rank + 1) * len(rows) // world_size]
