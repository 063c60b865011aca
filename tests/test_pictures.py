"""Charts: what they show, and that drawing leaves alone what a notebook draws with."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from infra.pictures import INK, NAME_WIDTH, PALETTE, before_after, line_chart, save_row

ROOT = Path(__file__).parent.parent


def axes_of(lines) -> Axes:
    figure = Figure()
    axes = figure.subplots()
    line_chart(axes, lines, "title")
    figure.canvas.draw()
    return axes


@pytest.mark.parametrize("low, high", [(0.312, 0.3127), (-3, 8), (13.1, 19.7), (0, 123456)])
def test_tick_values_are_round(low, high):
    axes = axes_of({"a": (range(1000), np.linspace(low, high, 1000))})
    for axis in (axes.xaxis, axes.yaxis):
        distance = np.diff(axis.get_majorticklocs())[0]
        mantissa = f"{distance:.6e}".partition("e")[0]
        assert float(mantissa) in (1, 2, 5)


def test_the_legend_has_the_last_values_the_highest_line_first_in_the_colors_of_the_lines():
    lines = {"low": ([0, 1], [0, 0.5]), "high": ([0, 1], [3, 2.0]), "near": ([0, 1], [0, 2.001])}
    texts = axes_of(lines).get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["near 2.00", "high 2.00", "low 0.500"]
    assert [text.get_color() for text in texts] == [PALETTE[2], PALETTE[1], PALETTE[0]]


def test_names_of_many_lines_fit_beside_the_axes(tmp_path):
    charts = []

    def eleven_lines(axes: Axes) -> None:
        charts.append(axes)
        line_chart(axes, {f"line {i}": ([0, 1], [i, 0]) for i in range(11)}, "all fall")

    save_row([eleven_lines], tmp_path / "chart.png")
    (axes,) = charts
    legend = axes.get_legend().get_window_extent()
    figure = axes.figure.bbox
    assert legend.x0 >= axes.get_window_extent().x1
    assert figure.y0 <= legend.y0 and legend.y1 <= figure.y1 and legend.x1 <= figure.x1
    boxes = [text.get_window_extent() for text in axes.get_legend().get_texts()]
    assert all(upper.y0 >= lower.y0 + 0.8 * lower.height for upper, lower in itertools.pairwise(boxes))


def test_a_band_is_as_wide_as_its_half_width_says():
    axes = axes_of({"a": ([0, 1], [1.0, 2.0], [0.5, 0.25])})
    (band,) = axes.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0.0, 0.5), (0.0, 1.5), (1.0, 1.75), (1.0, 2.25)}


def test_the_file_is_small_and_its_page_white_with_inks_that_are_read_on_it(tmp_path):
    chart = partial(line_chart, lines={"reward": (range(200), np.random.default_rng(0).random(200))}, title="reward")
    save_row([chart] * 3, tmp_path / "row.png")
    picture = Image.open(tmp_path / "row.png").convert("RGB")
    assert (tmp_path / "row.png").stat().st_size < 60_000
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.width > 2.5 * picture.height
    for color in (*PALETTE, INK):
        contrast = 1.05 / (luminance(color) + 0.05)
        assert contrast > 4.5  # WCAG's for text


def test_before_and_after_have_their_names_at_the_left_and_a_task_above_its_first_pair(tmp_path):
    green = torch.zeros(3, 8, 8)
    green[1] = 1
    tasks = ["single", "single", "two"]
    pairs, names, correct = [[green, green]] * 3, ("base", "after 8 updates"), [[False, False]] * 3
    before_after(pairs, [""] * 3, tmp_path / "a.png", names, tasks, correct)
    pixels = np.array(Image.open(tmp_path / "a.png"))
    is_ink = pixels.max(2) < 128
    is_green = (pixels == (0, 255, 0)).all(2)
    rows, columns = is_green.any(1).nonzero()[0], is_green.any(0).nonzero()[0]
    assert columns[0] > NAME_WIDTH
    assert is_ink[rows[0] : rows[-1], : columns[0]].any()
    above = is_ink[: rows[0], columns[0] :]
    pairs = np.array_split(above, 3, axis=1)
    assert [pair.any() for pair in pairs] == [True, False, True]


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb", by WCAG."""
    total = 0.0
    for start, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        value = int(color[start : start + 2], 16) / 255
        linear = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = """
import sys
from functools import partial
from pathlib import Path
import matplotlib
from infra.pictures import line_chart, save_row

def settings():
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # to read that imports pyplot

before = settings()
save_row([partial(line_chart, lines={"b": ([0, 1], [0, 1])}, title="a")], Path(sys.argv[1]))
assert settings() == before and "matplotlib.pyplot" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], cwd=ROOT).returncode == 0
    chart = partial(line_chart, lines={"b": ([0, 1], [0, 1])}, title="a")
    save_row([chart], tmp_path / "deep" / "c.png")
    assert (tmp_path / "deep" / "c.png").read_bytes() == (tmp_path / "c.png").read_bytes()
