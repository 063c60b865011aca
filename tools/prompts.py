"""Make GenEval-style prompts, to train on or to evaluate on.

    python -m tools.prompts --file compositional.jsonl --num 50000          # to train on, as the paper's
    python -m tools.prompts --file check.jsonl --num 60 --ratio 1 1 1 1 1 1 # to evaluate on: evaluate.py --geneval

Writes JSON lines as in GenEval's evaluation_metadata.jsonl, which its evaluator reads:

    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [...], "prompt": "..."}
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from infra.files import check_writable
from infra.flags import flags
from infra.prompts import read_entries

# COCO's 80 classes, as GenEval's detector names them, and their plurals where an s is not enough.
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
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}  # "a right of b" means "b left of a"
NUMBERS = {2: "two", 3: "three", 4: "four"}
TASKS = ("position", "counting", "color_attr", "colors", "two_object", "single_object")  # GenEval's tags
RATIO = (7, 5, 3, 1, 1, 0)  # of the tasks, in the paper
MAX_REFUSALS = 10_000  # in a row, until a task has no prompt left: counting has 240 in all

Entry = dict[str, Any]  # a line of GenEval's metadata


def plurals(objects: str) -> dict[str, str]:
    """Each class and its plural."""
    plural = {}
    for item in objects.replace("\n", " ").split(","):
        name, _, irregular = item.strip().partition("|")
        plural[name] = irregular or f"{name}s"
    return plural


PLURAL = plurals(OBJECTS)


@flags
class PromptsFlags:
    """Write GenEval-style prompts."""

    file: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """JSON lines to write: a --prompts file, and GenEval's metadata."""
    num: int = 50_000
    """Number of prompts."""
    ratio: tuple[float, float, float, float, float, float] = RATIO
    """Ratio of the tasks position, counting, attribute binding, colors, two objects, single object."""
    without: Path | None = None
    """A file of prompts to leave out, such as GenEval's own evaluation_metadata.jsonl if you evaluate on it."""
    seed: int = 0
    """The same seed writes the same file."""


def main() -> None:
    cfg = tyro.cli(PromptsFlags, description=__doc__)
    try:
        if cfg.num < 1 or min(cfg.ratio) < 0 or sum(cfg.ratio) <= 0:
            raise ValueError(f"--num {cfg.num} and the sum of --ratio {cfg.ratio} must be positive")
        check_writable(f"--file {cfg.file}", cfg.file.parent)
        # Left out are the same words, and the same request in other words.
        refused = set()
        for entry in read_entries(cfg.without) if cfg.without else []:
            refused |= {entry["prompt"], meaning(entry)}
        entries = generate(cfg.num, cfg.ratio, cfg.seed, frozenset(refused))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    cfg.file.parent.mkdir(parents=True, exist_ok=True)
    cfg.file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    print(f"wrote {cfg.file}: {len(entries)} prompts, such as {entries[0]['prompt']!r}")


def generate(num: int, ratio: Sequence[float], seed: int, without: frozenset[str] = frozenset()) -> list[Entry]:
    """`num` entries, shuffled, the tasks in the ratio to the nearest prompt.

    No entry has its prompt or its meaning in `without`. Tasks of few possible prompts repeat prompts.
    Raises ValueError if `without` leaves a task no prompt.
    """
    rng = np.random.default_rng(seed)
    # Cumulative counts are rounded, so that the counts of the tasks sum to `num`.
    ends = np.rint(np.cumsum(ratio) / np.sum(ratio) * num).astype(int)
    entries = []
    for task, end in zip(TASKS, ends, strict=True):
        refusals = 0
        while len(entries) < end:
            entry = compose(task, rng)
            if without.isdisjoint({entry["prompt"], meaning(entry)}):
                entries.append(entry)
                refusals = 0
                continue
            refusals += 1
            if refusals > MAX_REFUSALS:
                raise ValueError(f"--without leaves no prompt of the task {task}: give it 0 in --ratio")
    return [entries[i] for i in rng.permutation(len(entries))]


def compose(task: str, rng: np.random.Generator) -> Entry:
    """A prompt of a task, and the objects that GenEval's evaluator must find in its image."""
    # People have no color: the first class, person, is left out.
    names = list(PLURAL)[1:] if task in ("colors", "color_attr") else list(PLURAL)
    a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
    x, y = (COLORS[i] for i in rng.choice(len(COLORS), 2, replace=False))

    exclude = []
    if task == "single_object":
        include = [{"class": a, "count": 1}]
        text = noun_phrase(a)
    elif task == "two_object":
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
        text = f"{noun_phrase(a)} and {noun_phrase(b)}"
    elif task == "counting":
        n = int(rng.integers(2, 5))
        include = [{"class": a, "count": n}]
        exclude = [{"class": a, "count": n + 1}]  # because the evaluator's counts are lower bounds
        text = f"{NUMBERS[n]} {PLURAL[a]}"
    elif task == "colors":
        include = [{"class": a, "count": 1, "color": x}]
        text = noun_phrase(a, x)
    elif task == "color_attr":
        include = [{"class": a, "count": 1, "color": x}, {"class": b, "count": 1, "color": y}]
        text = f"{noun_phrase(a, x)} and {noun_phrase(b, y)}"
    else:
        relation = POSITIONS[rng.integers(len(POSITIONS))]
        # A position is relative to an object of the list, here to the first one, so b is listed first.
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        text = f"{noun_phrase(a)} {relation} {noun_phrase(b)}"

    entry: Entry = {"tag": task, "include": include}
    if exclude:
        entry["exclude"] = exclude
    entry["prompt"] = f"a photo of {text}"
    return entry


def noun_phrase(name: str, color: str = "") -> str:
    """An apple, a red bench, a pair of skis."""
    words = f"{color} {name}".strip()
    if name in ("skis", "scissors"):  # nouns without a singular
        return f"a pair of {words}"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def meaning(entry: Entry) -> str:
    """What a prompt asks for, alike for two orders of its objects and for two spellings of a plural."""
    if "include" not in entry:  # a line of a plain text, which says no more than its words
        return entry["prompt"]
    objects, relation = [], ""
    for item in entry["include"]:
        objects.append({key: item[key] for key in item if key != "position"})
        relation = item["position"][0] if "position" in item else relation
    if relation in MIRRORED:  # of the two ways to say a position, the other one
        relation = MIRRORED[relation]
        objects.reverse()
    elif not relation:  # without a position the order of the objects means nothing
        objects.sort(key=json.dumps)
    return json.dumps([entry["tag"], relation, objects])


if __name__ == "__main__":
    main()
