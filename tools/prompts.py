"""Make GenEval-style prompts, to train on or to evaluate on.

    python -m tools.prompts --file compositional.txt --num 50000            # to train on, as the paper's
    python -m tools.prompts --file check.jsonl --num 60 --ratio 1 1 1 1 1 1 # to evaluate on: evaluate.py --geneval

A .txt gets a prompt per line. A .jsonl gets JSON lines as in GenEval's evaluation_metadata.jsonl, which its evaluator
reads:

    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [...], "prompt": "..."}
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

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
MAX_TRIALS = 10_000  # until a task has no prompt left: counting has 240 in all

Entry = dict[str, Any]  # a line of GenEval's metadata


PLURAL = {}
for item in OBJECTS.replace("\n", " ").split(","):
    name, _, irregular = item.strip().partition("|")
    PLURAL[name] = irregular or f"{name}s"


@flags
class PromptsFlags:
    """Write GenEval-style prompts."""

    file: Path
    """File to write, .txt or .jsonl, which must not exist yet. train.py --prompts reads both, GenEval needs .jsonl."""
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
        check_prompts_flags(cfg)
        without = read_entries(cfg.without) if cfg.without else []
        entries = generate(cfg.num, cfg.ratio, cfg.seed, without)
        lines = [json.dumps(entry) if cfg.file.suffix == ".jsonl" else entry["prompt"] for entry in entries]
        cfg.file.parent.mkdir(parents=True, exist_ok=True)
        cfg.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {cfg.file}: {len(entries)} prompts, such as {entries[0]['prompt']!r}")


def check_prompts_flags(cfg: PromptsFlags) -> None:
    """Raise ValueError naming the flag."""
    if cfg.num < 1 or cfg.seed < 0:
        raise ValueError(f"--num {cfg.num} must be above 0, and --seed {cfg.seed} not below 0")
    total = sum(cfg.ratio)
    if not (min(cfg.ratio) >= 0 and 0 < total < math.inf):
        raise ValueError(f"--ratio {cfg.ratio}: six numbers, none below 0, with a finite sum above 0")
    if cfg.file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--file {cfg.file} is written as its suffix says: name a .txt or a .jsonl")
    if cfg.file.exists():  # perhaps prompts that somebody wrote
        raise ValueError(f"--file {cfg.file} is there already: remove that file or name another")


def generate(num: int, ratio: Sequence[float], seed: int, without: Sequence[Entry] = ()) -> list[Entry]:
    """`num` entries, shuffled, the tasks in the ratio to the nearest prompt.

    None asks for what an entry of `without` asks for. Tasks of few possible prompts repeat prompts.
    Raises ValueError if `without` leaves a task no prompt.
    """
    refused = set(map(meaning, without))
    rng = np.random.default_rng(seed)
    # Cumulative counts are rounded, so that the counts of the tasks sum to `num`.
    ends = np.rint(np.cumsum(ratio) / np.sum(ratio) * num).astype(int)
    entries = []
    for task, end in zip(TASKS, ends, strict=True):
        while len(entries) < end:
            for _ in range(MAX_TRIALS):
                entry = compose(task, rng)
                # An entry of `without` that is a plain text means its words.
                if refused.isdisjoint([entry["prompt"], meaning(entry)]):
                    break
            else:
                raise ValueError(f"--without leaves no prompt of the task {task}: give it 0 in --ratio")
            entries.append(entry)
    return [entries[i] for i in rng.permutation(len(entries))]


def compose(task: str, rng: np.random.Generator) -> Entry:
    """A prompt of a task, and the objects that GenEval's evaluator must find in its image."""
    has_colors = task in ("colors", "color_attr")
    names = list(PLURAL)[has_colors:]  # people have no color: the first class, person, is left out
    a, b = rng.choice(names, 2, replace=False).tolist()
    x, y = rng.choice(COLORS, 2, replace=False).tolist()
    first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
    if has_colors:
        first["color"], second["color"] = x, y
    text = noun_phrase(first)
    entry: Entry = {"tag": task, "include": [first]}
    if task in ("two_object", "color_attr"):
        entry["include"] = [first, second]
        text = f"{text} and {noun_phrase(second)}"
    elif task == "counting":
        n = int(rng.integers(2, 5))
        first["count"] = n
        entry["exclude"] = [{"class": a, "count": n + 1}]  # because the evaluator's counts are lower bounds
        text = f"{NUMBERS[n]} {PLURAL[a]}"
    elif task == "position":
        relation = POSITIONS[rng.integers(len(POSITIONS))]
        # A position is relative to an object of the list, here to the first one, so b is listed first.
        entry["include"] = [second, first | {"position": [relation, 0]}]
        text = f"{text} {relation} {noun_phrase(second)}"
    entry["prompt"] = f"a photo of {text}"
    return entry


def noun_phrase(item: Entry) -> str:
    """An apple, a red bench, a pair of skis."""
    words = f"{item.get('color', '')} {item['class']}".strip()
    if item["class"] in ("skis", "scissors"):  # nouns without a singular
        return f"a pair of {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def meaning(entry: Entry) -> str:
    """What a prompt asks for, alike for two orders of its objects and for two spellings of a plural."""
    if "include" not in entry:  # a line of a plain text, which says no more than its words
        return entry["prompt"]
    objects = [dict(item) for item in entry["include"]]
    relation, _ = objects[-1].pop("position", ("", 0))
    if relation in MIRRORED:  # of the two ways to say a position, the other one
        relation = MIRRORED[relation]
        objects.reverse()
    elif not relation:  # without a position the order of the objects means nothing
        objects.sort(key=json.dumps)
    return json.dumps([entry["tag"], relation, objects])


if __name__ == "__main__":
    main()
