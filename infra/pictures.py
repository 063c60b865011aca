"""Pictures for people: captioned grids of images, before and after, and curves of what a run measured."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from infra.logs import read_log
from shapes.world import TASKS

PAD, LINE = 6, 13  # pixels between things, and a line of text
PALETTE = ("#222222", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf")
Series = dict[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y


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
    before: Sequence[Tensor], after: Sequence[Tensor], captions: Sequence[str], path: Path, side: int = 96
) -> None:
    """Write pairs of images of the same prompt and noise: above before, below after, then the caption."""
    cells = [list(pair) for pair in zip(before, after, strict=True)]
    save_png(grid_of(cells, captions, columns=8, side=side), path)


def grid_of(cells: Sequence[Sequence[Tensor]], captions: Sequence[str], columns: int, side: int) -> Image.Image:
    """A grid of cells; a cell is images one above the other and a caption of up to three lines beneath."""
    font = ImageFont.load_default(11)
    height = round(side * cells[0][0].shape[1] / cells[0][0].shape[2])
    texts = [textwrap.wrap(c.removeprefix("a photo of "), width=max(8, side // 6))[:3] for c in captions]
    stack = (height + 2) * len(cells[0])
    width, tall = side + PAD, stack + LINE * max(len(t) for t in texts) + PAD
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(cells)) + PAD, tall * rows + PAD), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        x, y = PAD + i % columns * width, PAD + i // columns * tall
        for image in cell:
            resample = Image.NEAREST if image.shape[2] < side else Image.LANCZOS
            sheet.paste(to_pil(image).resize((side, height), resample), (x, y))
            y += height + 2
        draw.multiline_text((x, y), "\n".join(text), fill="black", font=font, spacing=1)
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


# ------------------------------------------------------------------------------------------ curves


def chart(series: Series, title: str, size: tuple[int, int] = (440, 280)) -> Image.Image:
    """Lines over one x axis, with their names and last values at the right; drawn large, then reduced."""
    zoom = 3
    left, right, top, bottom = (zoom * m for m in (40, 110, 26, 24))
    width, height = (zoom * s for s in size)
    xs = [x for line in series.values() for x in line[0]]
    ys = [y for line in series.values() for y in line[1]]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(12 * zoom), ImageFont.load_default(10 * zoom)
    draw.text((left, 4 * zoom), title, fill="black", font=font)
    for i in range(5):
        y = y_low + (y_high - y_low) * i / 4
        x = x_low + (x_high - x_low) * i / 4
        draw.line([place(x_low, y), place(x_high, y)], fill="#dddddd", width=zoom)
        draw.text((left - 4 * zoom, place(x_low, y)[1]), f"{y:.2f}", fill="#555555", font=small, anchor="rm")
        draw.text((place(x, y_low)[0], height - 4 * zoom), f"{x:.0f}", fill="#555555", font=small, anchor="ms")
    free = [top + i * 13 * zoom for i in range(len(series))]  # names from top to bottom, by their last value
    by_height = sorted(series, key=lambda name: -series[name][1][-1])
    for color, (name, (x, y)) in zip(PALETTE, series.items(), strict=False):
        draw.line([place(*point) for point in zip(x, y, strict=True)], fill=color, width=2 * zoom, joint="curve")
        spot = (width - right + 6 * zoom, free[by_height.index(name)])
        draw.text(spot, f"{name} {y[-1]:.2f}", fill=color, font=small)
    return picture.resize(size, Image.LANCZOS)


def curves(run: Path, path: Path) -> None:
    """Write the trained reward of a run (each update's batch, smoothed, and the evaluations) and all others."""
    updates, evals = read_log(run / "metrics.jsonl"), read_log(run / "eval.jsonl")
    smooth, mean = [], updates[0]["reward"]
    for entry in updates:
        mean = 0.9 * mean + 0.1 * entry["reward"]
        smooth.append(mean)
    at = [e["step"] for e in evals]
    values = {name: [e[name] for e in evals] for name in evals[0] if name not in ("step", "seconds", "by_prompt")}
    rewards = {name: ys for name, ys in values.items() if name not in ("judge", *TASKS)}
    trained = rewards.pop("reward")
    charts = [chart({"batch": ([e["step"] for e in updates], smooth), "evaluation": (at, trained)}, "trained reward")]
    charts += [chart({name: (at, ys)}, name) for name, ys in rewards.items() if ys != trained]
    if "judge" in values:
        judged = {name: (at, values[name]) for name in ("judge", *TASKS) if name in values}
        charts.append(chart(judged, "judge accuracy, evaluation prompts"))
    picture = Image.new("RGB", (sum(c.width for c in charts), charts[0].height), "white")
    for i, c in enumerate(charts):
        picture.paste(c, (sum(c.width for c in charts[:i]), 0))
    save_png(picture, path)
