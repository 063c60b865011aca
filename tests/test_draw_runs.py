"""experiments.draw_runs: the base and each run's end, one above the other, framed where the judge accepts."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import draw_runs
from infra.jsonl import append
from infra.pictures import FRAME
from infra.watch import shown

SIDE, PROMPTS = 32, [f"a photo of {i} circles" for i in range(48)]


def write_run(folder: Path, gray: int, right: list[float] | None, base: int = 10) -> Path:
    """A run whose images are all of one gray, and whose judge accepted some at the end."""
    (folder / "samples").mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "config.json").write_text(json.dumps(dict(eval_prompts=str(folder / "prompts.txt"))))
    for name, level in (("first", base), ("last", gray)):
        torch.save(torch.full((24, 3, SIDE, SIDE), level, dtype=torch.uint8), folder / "samples" / f"{name}.pt")
    for scores in ([0.0] * len(PROMPTS), right):
        append(folder / "eval.jsonl", dict(by_prompt={} if scores is None else {"judge": scores}))
    return folder


def test_rows_are_the_base_and_the_runs_and_a_frame_is_the_judges_word(tmp_path):
    accepts = [0.0] * len(PROMPTS)
    accepts[shown(PROMPTS)[2]] = 1.0  # the second picture of those that are drawn
    runs = (write_run(tmp_path / "a", 100, accepts), write_run(tmp_path / "b", 200, None))
    draw_runs.run(draw_runs.Config(runs, tmp_path / "c.png", SIDE))
    picture = Image.open(tmp_path / "c.png").convert("RGB")
    colors = {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)}
    assert {(level,) * 3 for level in (10, 100, 200)} <= colors
    green = tuple(int(FRAME[i : i + 2], 16) for i in (1, 3, 5))
    framed = [(x, y) for x in range(picture.width) for y in range(picture.height) if picture.getpixel((x, y)) == green]
    (left, right), (top, bottom) = ((min(v), max(v)) for v in zip(*framed))
    assert (right - left, bottom - top) == (SIDE - 1, SIDE - 1)
    assert picture.getpixel((left + SIDE // 2, top + SIDE // 2)) == (100,) * 3
    assert 0.5 * picture.width / 12 < left < 1.5 * picture.width / 12


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = write_run(tmp_path / "a", 100, None), write_run(tmp_path / "b", 100, None, base=11)
    for runs, word in (((), "one run"), ((a, tmp_path), "no run that has been evaluated"), ((a, b), "does not start")):
        with pytest.raises(ValueError, match=word):
            draw_runs.run(draw_runs.Config(runs))
