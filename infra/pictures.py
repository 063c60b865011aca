"""Pictures for people: captioned grids of images, before and after, and curves of what a run measured."""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from infra.jsonl import read_log

PAD, LINE = 6, 13  # pixels between things, and a line of text
PAGE, GRID, INK = "#ffffff", "#d8dee4", "#57606a"
PALETTE = ("#24292f", "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8250df", "#7d4e00", "#1b7c83")  # dark on white
STYLES = ("-", "--")
FRAME = "#1a7f37"  # of what is right
ROUND = (1, 2, 5, 10)  # what ticks are apart, times a power of ten
Lines = dict[str, tuple[Sequence[float], ...]]  # name -> x, y and perhaps half the width of a band


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] to a PIL image."""
    return Image.fromarray(image.detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def contact_sheet(
    images: Sequence[Tensor], captions: Sequence[str], path: Path, columns: int = 4, side: int = 128
) -> None:
    """Write images in a grid, each `side` pixels wide (never enlarged smoothly), its caption beneath."""
    cells = [[image] for image in images]
    save_png(grid_of(cells, captions, columns, side), path)


def before_after(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    captions: Sequence[str],
    path: Path,
    side: int = 96,
    right: Sequence[Sequence[bool]] | None = None,
) -> None:
    """Write pairs of images of the same prompt and noise: above before, below after, then the caption.

    A frame is around those that are `right`, by a judge.
    """
    cells = [list(pair) for pair in zip(before, after, strict=True)]
    save_png(grid_of(cells, captions, columns=8, side=side, framed=right), path)


def grid_of(
    cells: Sequence[Sequence[Tensor]],
    captions: Sequence[str],
    columns: int,
    side: int,
    framed: Sequence[Sequence[bool]] | None = None,
) -> Image.Image:
    """A grid of cells; a cell is images one above the other, some framed, and a caption of up to four lines."""
    font = ImageFont.load_default(11)
    height = round(side * cells[0][0].shape[1] / cells[0][0].shape[2])
    texts = [textwrap.wrap(c.removeprefix("a photo of "), width=max(8, side // 6))[:4] for c in captions]
    stack = (height + 2) * len(cells[0])
    width, tall = side + PAD, stack + LINE * max(len(t) for t in texts) + PAD
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(cells)) + PAD, tall * rows + PAD), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        x, y = PAD + i % columns * width, PAD + i // columns * tall
        for n, image in enumerate(cell):
            resample = Image.NEAREST if image.shape[2] < side else Image.LANCZOS
            sheet.paste(to_pil(image).resize((side, height), resample), (x, y))
            if framed and framed[i][n]:
                draw.rectangle((x, y, x + side - 1, y + height - 1), outline=FRAME, width=3)
            y += height + 2
        draw.multiline_text((x, y), "\n".join(text), fill="black", font=font, spacing=1)
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


# ------------------------------------------------------------------------------------------ curves


def line_chart(axes: Axes, lines: Lines, title: str, across: str = "step") -> None:
    """Draw lines over one x axis, each named, with its last value, at its end.

    A line is (x, y) or (x, y, half): half is the half-width of a shaded band, such as a 95% interval.  Where there are
    more lines than colors, the others are dashed.
    """
    ends = []
    for (style, color), (name, (x, y, *half)) in zip(
        itertools.cycle(itertools.product(STYLES, PALETTE)), lines.items()
    ):
        axes.plot(x, y, style, color=color, linewidth=1.6)
        if half:
            low, high = np.asarray(y) - half[0], np.asarray(y) + half[0]
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        digits = 3 if abs(y[-1]) < 1 else 2
        ends.append((y[-1], f"{name} {y[-1]:.{digits}f}{' ┄┄' * (style == STYLES[1])}", color))
    dress(axes, title, across)
    name_ends(axes, ends)


def dress(axes: Axes, title: str, across: str) -> None:
    """Give axes the look of all charts; `across` is what their x axis shows."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(across, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=across == "step", steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PAGE)


def name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write names at the right of the axes, at the height of their lines' ends, or one below the other beside them."""
    low, high = axes.get_ylim()
    line = 10.5 / (72 * axes.get_position().height * axes.figure.get_figheight())  # of text, as a part of the height
    ends, places = sorted(ends, reverse=True), [1 + line]
    for y, _, _ in ends:
        places.append(min((y - low) / (high - low), places[-1] - line))
    floor = 0.0
    for i in range(len(ends), 0, -1):  # and none below the axes
        places[i] = max(places[i], floor)
        floor = places[i] + line
    for (_, text, color), place in zip(ends, places[1:], strict=True):
        axes.text(1.02, place, text, color=color, fontsize=8, va="center", transform=axes.transAxes)


def save_charts(charts: Sequence[tuple[str, Lines]], path: Path, across: str = "step") -> None:
    """Write a row of charts, (title, lines) each."""
    save_row([partial(line_chart, lines=lines, title=title, across=across) for title, lines in charts], path)


def save_row(
    charts: Sequence[Callable[[Axes], None]], path: Path, height: float = 2.8, left: float = 0.5, right: float = 1.1
) -> None:
    """Write a row of charts, each drawn by a function of its axes, as a PNG of few kilobytes.

    `height`, `left`, the room for the first chart's names at its left, and `right`, at each one's right, are in inches.
    The page is white, so that it is read on a dark one too.  No pyplot: what a notebook draws with stays as it is.
    """
    gap, wide = right + 0.5, 2.8
    width = left + len(charts) * (wide + gap) - 0.5
    figure = Figure(figsize=(width, height), dpi=110, facecolor=PAGE)
    grid = figure.subplots(1, len(charts), squeeze=False)[0]
    figure.subplots_adjust(left / width, 0.5 / height, 1 - right / width, 1 - 0.3 / height, wspace=gap / wide)
    for axes, draw in zip(grid, charts):
        draw(axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    save_png(picture.quantize(64, dither=Image.Dither.NONE), path)


def curves(run: Path, path: Path, tasks: Sequence[str] = ()) -> None:
    """Write what a run measured: the trained reward, of batches (smoothed) and of evaluations, and all others.

    `tasks` are those keys of eval.jsonl that belong to the judge, whose chart they share.
    """
    updates, evals = read_log(run / "metrics.jsonl"), read_log(run / "eval.jsonl")
    at = [entry["step"] for entry in evals]
    numbers = {k: [entry[k] for entry in evals] for k, v in evals[0].items() if isinstance(v, int | float)}
    trained = numbers.pop("reward")
    lines = {"batch": ([e["step"] for e in updates], smooth([e["reward"] for e in updates]))} if updates else {}
    charts = [("trained reward", {**lines, "evaluation": (at, trained)})]
    judged = {k: (at, numbers[k]) for k in ("judge", *tasks) if k in numbers}
    others = numbers.keys() - judged.keys() - {"step", "seconds"}
    charts += [(k, {k: (at, ys)}) for k, ys in numbers.items() if k in others and ys != trained]
    if judged:
        charts.append(("judge accuracy, evaluation prompts", judged))
    save_charts(charts, path)


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Each value's average with those before it, of which an older one counts less."""
    return list(itertools.accumulate(values, lambda mean, value: keep * mean + (1 - keep) * value))
