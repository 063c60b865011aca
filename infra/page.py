"""Pages for people: one HTML file that opens without a network, with pictures, curves and tables.

`write_page` fills page.html, which draws in the browser what it is given. `runs_page` reads all of it from the folders
of runs, so a page can be made of a run that goes on, was killed, or comes from another machine.
"""

import base64
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from infra.files import replacing
from infra.jsonl import Entry, check_numbers_of, read_log
from infra.reading import parse_file, parse_json
from infra.summary import Scores, Summary, confidence_interval, format_table

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 256  # pixels of the longer side of a picture: a page with larger ones would have many MB
COLUMNS = 8  # evaluations whose pictures are shown
PROMPTS = 24  # of an evaluation of models: so many that gained most, and so many that lost most
POINTS = 2000  # updates that a curve shows
FLAGS = ("updates", "prompts_read")  # of a run's config.json, without which there is no page
NO_RUN = "it is no run's, give another folder"


def write_page(path: Path, title: str, **content: Any) -> None:
    """Write a page; all but the title may be left out.

    facts, warnings, commands, texts: lists of text, the last with line breaks
    cards: dicts of title, base, now, change, half (of the change's 95% interval)
    pictures: a dict of prompts; score, a name; columns, dicts of name, images (files) and scores, one a prompt
    series: numbers of runs over updates, dicts of run, source (batch or evaluation), name, x, y; watched, names
    charts: dicts of title, across (the x axis), lines (dicts of name, x, y)
    tables: dicts of title, head, rows
    """
    text = json.dumps(dict(title=title, **content), default=data_uri)
    text = text.replace("<", r"\u003c")  # a prompt with </script> would end the script
    with replacing(path) as draft:
        draft.write_text(TEMPLATE.read_text().replace("{{content}}", text))


def data_uri(file: Path) -> str:
    """A picture as text within a page: a small one as it is, a larger one as a JPEG of at most SIDE pixels."""
    picture = parse_file(file, lambda path: Image.open(path).convert("RGB"))
    picture.thumbnail((SIDE, SIDE))
    kind = "png" if max(picture.size) <= 128 else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{text}"


# ------------------------------------------------------------------------------------ training runs


class RunLogs(NamedTuple):
    """What a run has written so far."""

    name: str
    folder: Path
    flags: dict[str, Any]
    updates: list[Entry]
    evaluations: list[Entry]


def runs_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of a run; of several, with their curves over each other and the flags in which they differ.

    Raises ValueError naming a folder that holds no evaluation of a run, or a file that is damaged.
    """
    if not folders:
        raise ValueError("give the folder of a run, or of several")
    names = [folder.resolve().name for folder in folders]
    # Curves are told apart by the names of their runs.
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = list(map(read_run, names, folders))
    warnings, cards, series = [], [], []
    for run in runs:
        warnings_file = run.folder / "warnings.txt"
        if warnings_file.exists():
            warnings += parse_file(warnings_file, Path.read_text).splitlines()
        cards += changes(run, f"{run.name}: " if len(runs) > 1 else "")
        series += series_of(run, "evaluation", run.evaluations)
        series += series_of(run, "batch", run.updates[:: 1 + len(run.updates) // POINTS])
    tables = [evaluation_table(runs)]
    if len(runs) > 1:
        tables.append(flag_table(runs))
    write_page(
        path,
        title=" and ".join(run.name for run in runs),
        facts=[*map(describe, runs), time.strftime("written %Y-%m-%d %H:%M")],
        warnings=warnings,
        cards=cards,
        pictures=run_pictures(runs),
        tables=tables,
        series=series,
        watched=list(runs[0].evaluations[0]["by_prompt"]),
        commands=[run.flags.get("command", "unknown") for run in runs],
    )


def read_run(name: str, folder: Path) -> RunLogs:
    """The logs of a run. Raises ValueError naming the one that is missing or is no run's."""
    log = folder / "eval.jsonl"
    evaluations = read_log(log)
    if not evaluations:
        raise ValueError(f"{folder} holds no evaluation of a run")
    parse_file(log, lambda _: check_evaluations(evaluations), NO_RUN)
    config = folder / "config.json"
    flags = parse_json(config, lambda entries: entries | {name: entries[name] for name in FLAGS}, NO_RUN)
    updates = read_log(folder / "metrics.jsonl", lambda entry: check_numbers_of(entry, ["seconds", "memory"]))
    return RunLogs(name, folder, flags, updates, evaluations)


def check_evaluations(evaluations: Sequence[Entry]) -> None:
    """Raise TypeError, KeyError or ValueError if an evaluation lacks a number that the first one has."""
    watched = evaluations[0]["by_prompt"]
    for entry in evaluations:
        check_numbers_of(entry, ["reward", *watched])
        for name, scores in watched.items():
            np.subtract(entry["by_prompt"][name], scores)


def describe(run: RunLogs) -> str:
    """Where a run stands, and what an update takes."""
    words = [run.name, f"{len(run.updates)} of {run.flags['updates']} updates"]
    if run.updates:
        seconds = np.mean([entry["seconds"] for entry in run.updates])
        words.append(f"{seconds:.1f} s an update, {run.updates[-1]['memory']:.1f} GB")
    words.append(f"revision {run.flags.get('revision', 'unknown')}")
    return " · ".join(words)


def changes(run: RunLogs, prefix: str) -> list[dict]:
    """The watched rewards and the trained one, from the first evaluation to the last.

    A watched reward is known of each prompt, so its change has an interval, paired by prompt.
    """
    first, last = run.evaluations[0], run.evaluations[-1]
    cards = []
    for name in [*first["by_prompt"], "reward"]:
        half = math.nan
        if name in first["by_prompt"]:
            _, half = confidence_interval(np.subtract(last["by_prompt"][name], first["by_prompt"][name]))
        title = prefix + ("trained reward" if name == "reward" else name)
        cards.append(dict(title=title, base=first[name], now=last[name], change=last[name] - first[name], half=half))
    return cards


def evaluation_table(runs: Sequence[RunLogs]) -> dict:
    """A row for each number that is evaluated: of the base, and of the last evaluation of each run."""
    first = runs[0].evaluations[0]
    rows = []
    for name, value in first.items():
        if isinstance(value, float) and name != "seconds":
            rows.append([name, value, *(run.evaluations[-1].get(name) for run in runs)])
    return dict(title="From the base to the last evaluation", head=["", "base", *(run.name for run in runs)], rows=rows)


def flag_table(runs: Sequence[RunLogs]) -> dict:
    """The flags in which runs differ."""
    rows = []
    for name in runs[0].flags:
        values = [str(run.flags.get(name)) for run in runs]
        if name != "command" and len(set(values)) > 1:
            rows.append([name, *values])
    return dict(title="Flags that differ", head=["", *(run.name for run in runs)], rows=rows)


def series_of(run: RunLogs, source: str, entries: Sequence[Entry]) -> list[dict]:
    """The numbers of a log, each over the updates."""
    series: dict[str, dict] = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "step":
                curve = series.setdefault(name, dict(run=run.name, source=source, name=name, x=[], y=[]))
                curve["x"].append(entry["step"])
                curve["y"].append(float(f"{value:.5g}"))  # more than a chart can show
    return list(series.values())


def run_pictures(runs: Sequence[RunLogs]) -> dict:
    """The pictures of some evaluations of each run with the first run's prompts; scores by the first watched reward."""
    prompts_file = runs[0].folder / "samples" / "prompts.json"
    score = next(iter(runs[0].evaluations[0]["by_prompt"]), "")
    prompts = parse_json(prompts_file, dict) if prompts_file.exists() else {}
    columns = []
    for run in runs:
        if run.flags["prompts_read"] != runs[0].flags["prompts_read"]:
            continue
        count = min(len(run.evaluations), max(2, COLUMNS // len(runs)))
        for i in np.linspace(0, len(run.evaluations) - 1, count).round().astype(int):
            entry = run.evaluations[i]
            folder = run.folder / "samples" / f"step_{entry['step']:04d}"
            images = [folder / f"{index}.png" for index in prompts]
            if all(image.exists() for image in images):  # the disk may have been full
                by_prompt = entry["by_prompt"].get(score)  # another run may watch other rewards
                scores = []
                if by_prompt:
                    scores = parse_file(prompts_file, lambda _, values=by_prompt: [values[int(i)] for i in prompts])
                label = f"{run.name}, " if len(runs) > 1 else ""
                columns.append(dict(name=f"{label}step {entry['step']}", images=images, scores=scores))
    return dict(prompts=list(prompts.values()), score=score, columns=columns)


# --------------------------------------------------------------------------- an evaluation of models


def models_page(summary: Summary, scores: Scores, prompts: Sequence[str], out: Path) -> None:
    """Write index.html of models side by side, with the prompts whose images gained most and lost most.

    Of a single model these are the prompts of the best and the worst images.
    """
    models = list(scores)
    score, *_ = summary  # the first of --reward, the one that matters most
    by_prompt = [scores[model][score].mean(1) for model in models]  # (prompts,), a model each
    gains = by_prompt[-1] - by_prompt[0] if len(models) > 1 else by_prompt[0]
    order = gains.argsort(kind="stable").tolist()
    indices = list(dict.fromkeys([*order[::-1][:PROMPTS], *order[:PROMPTS]]))
    columns = []
    for model, values in zip(models, by_prompt):
        images = [out / model / f"{i:05d}.png" for i in indices]
        columns.append(dict(name=model, images=images, scores=values[indices].tolist()))
    cards = []
    for reward, by_model in summary.items():
        for model in models[1:]:
            numbers = by_model[model]
            base, change, half = by_model[models[0]]["mean"], numbers["change"], numbers["change_half"]
            cards.append(dict(title=f"{model}: {reward}", base=base, now=numbers["mean"], change=change, half=half))
    pictures = dict(prompts=[prompts[i] for i in indices], score=score, columns=columns)
    title = " and ".join(models)
    write_page(out / "index.html", title, cards=cards, pictures=pictures, texts=[format_table(summary)])
