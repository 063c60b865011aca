"""Curves of a run: what they say, and that they leave alone what a notebook draws with."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from infra import pictures
from infra.pictures import curves, line_chart, save_charts, smooth

ROOT = Path(__file__).parent.parent
TASKS = ("single", "two")


@pytest.fixture
def run(tmp_path) -> Path:
    """Logs of a run that was killed within a line."""
    updates = [{"step": i, "reward": 14 + i / 40} for i in range(200)]
    at = range(0, 201, 40)
    evals = [
        {"step": i, "seconds": 1.0 * i, "reward": 14 + i / 30, "tiny": 14 + i / 30, "clip": 0.3 - i / 5000}
        | {"judge": 0.4 + i / 1000, "single": 0.9, "two": 0.1, "by_prompt": {"tiny": [1.0]}}
        for i in at
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in updates) + '{"step": 2')
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
    return tmp_path


def drawn(run: Path, monkeypatch, tasks=TASKS) -> dict[str, dict]:
    """Title to lines of the charts that `curves` draws."""
    seen: list = []
    monkeypatch.setattr(pictures, "save_charts", lambda charts, path: seen.extend(charts))
    curves(run, run / "curves.png", tasks)
    return dict(seen)


def chart(lines) -> Figure:
    figure = Figure()
    line_chart(figure.subplots(), lines, "title")
    figure.canvas.draw()
    return figure


def test_the_trained_reward_each_watched_one_and_the_judge_with_its_tasks_have_a_chart(run, monkeypatch):
    charts = drawn(run, monkeypatch)
    assert {title: list(lines) for title, lines in charts.items()} == {
        "trained reward": ["batch", "evaluation"],
        "clip": ["clip"],
        "judge accuracy, evaluation prompts": ["judge", "single", "two"],
    }
    x, y = charts["trained reward"]["evaluation"]
    assert x == [0, 40, 80, 120, 160, 200] and y[-1] == pytest.approx(14 + 200 / 30)


def test_without_tasks_all_that_was_measured_is_a_watched_reward(run, monkeypatch):
    assert list(drawn(run, monkeypatch, tasks=())) == [
        "trained reward", "clip", "single", "two", "judge accuracy, evaluation prompts",
    ]  # fmt: skip


@pytest.mark.parametrize("low, high", [(0.312, 0.3127), (-3, 8), (13.1, 19.7), (0, 123456)])
def test_tick_values_are_round(low, high):
    (axes,) = chart({"a": (range(1000), np.linspace(low, high, 1000))}).axes
    for axis in (axes.xaxis, axes.yaxis):
        apart = np.diff(axis.get_majorticklocs())[0]
        digits = f"{apart:.6e}".partition("e")[0]
        assert float(digits) in (1, 2, 5)


def test_names_stand_with_their_last_values_in_the_order_of_the_lines_and_do_not_overlap():
    lines = {"low": ([0, 1], [0, 0.5]), "high": ([0, 1], [3, 2.0]), "near": ([0, 1], [0, 2.001])}
    figure = chart(lines)
    texts = sorted(figure.axes[0].texts, key=lambda t: -t.get_position()[1])
    assert [t.get_text() for t in texts] == ["near 2.00", "high 2.00", "low 0.500"]
    boxes = [t.get_window_extent() for t in texts]
    assert all(above.y0 >= below.y0 + 0.8 * below.height for above, below in itertools.pairwise(boxes))


def test_a_band_is_as_wide_as_it_is_told():
    (axes,) = chart({"a": ([0, 1], [1.0, 2.0], [0.5, 0.25])}).axes
    (band,) = axes.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0.0, 0.5), (0.0, 1.5), (1.0, 1.75), (1.0, 2.25)}


def test_the_file_is_small_and_its_page_white_with_inks_that_are_read_on_it(run):
    curves(run, run / "curves.png", TASKS)
    picture = Image.open(run / "curves.png").convert("RGB")
    assert (run / "curves.png").stat().st_size < 60_000
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.width > 2.5 * picture.height

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    assert (
        min(1.05 / (luminance(c) + 0.05) for c in (*pictures.PALETTE, pictures.INK)) > 4.5
    )  # WCAG's contrast for text


def test_smoothing_weighs_older_values_less():
    assert smooth([1.0, 0.0, 0.0]) == pytest.approx([1.0, 0.9, 0.81]) and smooth([2.0] * 5) == pytest.approx([2.0] * 5)


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = """
import sys
from pathlib import Path
import matplotlib
from infra.pictures import save_charts

def settings():
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # to read that imports pyplot

before = settings()
save_charts([("a", {"b": ([0, 1], [0, 1])})], Path(sys.argv[1]))
assert settings() == before and "matplotlib.pyplot" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], cwd=ROOT).returncode == 0
    save_charts([("a", {"b": ([0, 1], [0, 1])})], tmp_path / "deep" / "c.png")
    assert (tmp_path / "deep" / "c.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_names_of_lines_that_all_end_at_the_bottom_stay_beside_the_axes_and_apart():
    axes = Figure().subplots()
    line_chart(axes, {f"line {i}": ([0, 1], [i, 0]) for i in range(7)}, "all fall")
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert heights[0] >= 0 and heights[-1] <= 1 and np.diff(heights).min() > 0.02
