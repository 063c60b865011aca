"""Make GenEval-style prompts, to train on or to evaluate on.

    python -m tools.prompts --out compositional.jsonl --num 50000          # to train on, as the paper's
    python -m tools.prompts --out check.jsonl --num 60 --ratio 1 1 1 1 1 1 # to evaluate on: evaluate.py --geneval

The file written has an object per line, in the form of GenEval's evaluation_metadata.jsonl, which its evaluator reads:

    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [...], "prompt": "..."}
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from infra.files import check_writable
from infra.prompts import read_entries

# COCO's 80 classes, under the names of GenEval's detector, and how many of them are called where it is not just an s.
OBJECTS = """
person|people, bicycle, car, motorcycle, airplane, bus|buses, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench|benches, bird, cat, dog, horse, sheep|sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis|pairs of skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass|wine glasses, cup, fork, knife|knives, spoon,
bowl, banana, apple, sandwich|sandwiches, orange, broccoli|heads of broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch|couches, potted plant, bed, dining table, toilet, tv, laptop, computer mouse|computer mice, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors|pairs of scissors, teddy bear, hair drier, toothbrush|toothbrushes
"""
PLURAL = {}
for _object in OBJECTS.replace("\n", " ").strip().split(", "):
    _name, _, _many = _object.strip().partition("|")
    PLURAL[_name] = _many or f"{_name}s"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}  # the same, said of the other thing
NUMBERS = {2: "two", 3: "three", 4: "four"}
TASKS = ("position", "counting", "color_attr", "colors", "two_object", "single_object")  # GenEval's tags
RATIO = (7, 5, 3, 1, 1, 0)  # the paper's


def one(name: str, color: str = "") -> str:
    """A noun phrase: an apple, a red bench, a pair of skis."""
    words = " ".join(filter(None, [color, name]))
    if name in ("skis", "scissors"):
        return f"a pair of {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def compose(task: str, rng: np.random.Generator) -> dict[str, Any]:
    """A prompt of a task and what GenEval's evaluator must find for it. Nobody is painted: no colors for people."""
    names = list(PLURAL)[1:] if task in ("colors", "color_attr") else list(PLURAL)
    a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
    x, y = (COLORS[i] for i in rng.choice(len(COLORS), 2, replace=False))
    entry: dict[str, Any] = {"tag": task}
    if task == "single_object":
        entry["include"], text = [{"class": a, "count": 1}], one(a)
    elif task == "two_object":
        entry["include"], text = [{"class": c, "count": 1} for c in (a, b)], f"{one(a)} and {one(b)}"
    elif task == "counting":
        n = int(rng.integers(2, 5))
        entry["include"], entry["exclude"] = [{"class": a, "count": n}], [{"class": a, "count": n + 1}]
        text = f"{NUMBERS[n]} {PLURAL[a]}"
    elif task == "colors":
        entry["include"], text = [{"class": a, "count": 1, "color": x}], one(a, x)
    elif task == "color_attr":
        entry["include"] = [{"class": c, "count": 1, "color": color} for c, color in ((a, x), (b, y))]
        text = f"{one(a, x)} and {one(b, y)}"
    else:
        relation = POSITIONS[rng.integers(len(POSITIONS))]
        entry["include"] = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        text = f"{one(a)} {relation} {one(b)}"
    return entry | {"prompt": f"a photo of {text}"}


def meaning(entry: dict[str, Any]) -> str:
    """What a prompt asks for, however it is worded: whichever thing comes first, and whatever its plural."""
    if "include" not in entry:
        return entry["prompt"]
    things = [{name: thing[name] for name in thing if name != "position"} for thing in entry["include"]]
    relation = next((thing["position"][0] for thing in entry["include"] if "position" in thing), "")
    if relation in MIRRORED:
        relation, things = MIRRORED[relation], things[::-1]
    elif not relation:
        things.sort(key=json.dumps)
    return json.dumps([entry["tag"], relation, things])


def generate(
    num: int, ratio: Sequence[float], seed: int, without: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """`num` entries, tasks in the given ratio to the nearest prompt, shuffled; none that is or means one in `without`.

    Tasks of few possible prompts (counting has 240) repeat them.
    """
    rng = np.random.default_rng(seed)
    ends = np.rint(np.cumsum(ratio) / np.sum(ratio) * num).astype(int)
    entries = []
    for task, end in zip(TASKS, ends, strict=True):
        refused = 0
        while len(entries) < end:
            entry = compose(task, rng)
            if without.isdisjoint({entry["prompt"], meaning(entry)}):
                entries.append(entry)
                refused = 0
            elif (refused := refused + 1) > 10_000:
                raise ValueError(f"--without leaves no prompt of the task {task}: give it 0 in --ratio")
    return [entries[i] for i in rng.permutation(len(entries))]


@dataclass(frozen=True)
class Config:
    """Write GenEval-style prompts."""

    out: Path
    """JSON lines to write: a --prompts file, and GenEval's metadata."""
    num: int = 50_000
    """How many."""
    ratio: tuple[float, float, float, float, float, float] = RATIO
    """Of the tasks position, counting, attribute binding, colors, two objects, single object."""
    without: Path | None = None
    """A file of prompts to leave out, such as GenEval's own evaluation_metadata.jsonl if you evaluate on it."""
    seed: int = 0
    """The same seed writes the same file."""


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    try:
        if cfg.num < 1 or min(cfg.ratio) < 0 or sum(cfg.ratio) <= 0:
            raise ValueError(f"--num {cfg.num} must be positive, and --ratio {cfg.ratio} too, in all")
        check_writable(f"--out {cfg.out}", cfg.out.parent)
        known = read_entries(cfg.without) if cfg.without else []
        without = frozenset([e["prompt"] for e in known] + [meaning(e) for e in known])
        entries = generate(cfg.num, cfg.ratio, cfg.seed, without)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    cfg.out.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    print(f"wrote {cfg.out}: {len(entries)} prompts, such as {entries[0]['prompt']!r}")


if __name__ == "__main__":
    main()
