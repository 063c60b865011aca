"""Pictures for people: captioned grids of images, before and after, and charts for the results of experiments."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PADDING = 6  # pixels between the cells of a grid
LINE_HEIGHT = 13  # pixels of a line of a caption
CAPTION_LINES = 4
NAME_WIDTH = 66  # pixels at the left of a grid whose rows have names
# GitHub's colors, for a white page. A line's color is also that of its name, so all have a contrast of 4.5 or more.
GRID = "#d8dee4"
INK = "#57606a"
PALETTE = ("#24292f", "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8250df", "#7d4e00", "#1b7c83")
FRAME = "#1a7f37"  # around an image that is correct
STYLES = ("-", "--")  # lines are dashed where there are more of them than colors
ROUND = (1, 2, 5, 10)  # distances of ticks, times a power of ten
Lines = dict[str, tuple[Sequence[float], ...]]  # name -> x, y, and for a band half of its width


# ------------------------------------------------------------------------------------------- grids


def contact_sheet(
    images: Sequence[Tensor], captions: Sequence[str], path: Path, columns: int = 4, side: int = 128
) -> None:
    """Write images (3, h, w) in [0, 1] as a grid, each `side` pixels wide with its caption beneath."""
    cells = [[image] for image in images]
    save_png(grid_of(cells, captions, columns, side), path)


def before_after(
    pairs: Sequence[Sequence[Tensor]],
    captions: Sequence[str],
    path: Path,
    names: tuple[str, str],
    titles: Sequence[str],
    correct: Sequence[Sequence[bool]],
) -> None:
    """Write pairs of images of the same prompt and noise, the first above the last, then the caption.

    `names` of the two stand at the left. `titles` are the tasks of the pairs: each stands above the first of its pairs.
    `correct` says of each pair which of the two a judge calls right; those get a frame.
    """
    save_png(grid_of(pairs, captions, columns=8, side=96, framed=correct, names=names, titles=titles), path)


def grid_of(
    cells: Sequence[Sequence[Tensor]],
    captions: Sequence[str],
    columns: int,
    side: int,
    framed: Sequence[Sequence[bool]] | None = None,
    names: Sequence[str] = (),
    titles: Sequence[str] = (),
) -> Image.Image:
    """A grid of cells: images of one size above each other, some with a frame, and a caption of up to four lines.

    `names` are those of a cell's images, at the left of each row of cells. `titles` are the cells'; a title that
    the cell before has, too, is not repeated.
    """
    first = cells[0][0]
    height = round(side * first.shape[1] / first.shape[2])
    texts = []
    for caption in captions:
        # All prompts of GenEval and of the shapes world begin alike, and a caption has little room.
        words = caption.removeprefix("a photo of ")
        lines = textwrap.wrap(words, width=max(8, side // 6))
        texts.append(lines[:CAPTION_LINES])
    # Every cell is as high as the one with the longest caption.
    text_height = LINE_HEIGHT * max(map(len, texts))  # pixels
    title_height = LINE_HEIGHT + 4 if titles else 0
    cell_height = title_height + (height + 2) * len(cells[0]) + text_height + PADDING
    cell_width = side + PADDING
    rows = math.ceil(len(cells) / columns)
    left_margin = PADDING + (NAME_WIDTH if names else 0)
    sheet_width = left_margin + cell_width * min(columns, len(cells))
    sheet_height = cell_height * rows + PADDING
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)  # Pillow's own, so that the sheet is the same on every machine
    large_font = ImageFont.load_default(14)
    for i, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        row, column = divmod(i, columns)
        x = left_margin + column * cell_width
        y = PADDING + row * cell_height
        if titles and (i == 0 or titles[i] != titles[i - 1]):
            draw.text((x, y), titles[i], fill="black", font=large_font)
        y += title_height
        for n, image in enumerate(cell):
            if names and column == 0:
                name = "\n".join(textwrap.wrap(names[n], width=9))
                draw.multiline_text((PADDING, y + height // 3), name, fill="black", font=large_font)
            # Pixels of a small image are enlarged as squares: smoothing would hide what the model draws.
            is_small = image.shape[2] < side
            resample = Image.NEAREST if is_small else Image.LANCZOS
            picture = to_pil(image)
            picture = picture.resize((side, height), resample)
            sheet.paste(picture, (x, y))
            if framed and framed[i][n]:
                corners = (x, y, x + side - 1, y + height - 1)
                draw.rectangle(corners, outline=FRAME, width=3)
            y += height + 2  # two pixels of white between images
        draw.multiline_text((x, y), "\n".join(text), fill="black", font=font, spacing=1)
    return sheet


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] to a PIL image."""
    pixels = 255 * image.detach().clamp(0, 1)
    pixels = pixels.round().byte().cpu()
    pixels = rearrange(pixels, "c h w -> h w c")
    return Image.fromarray(pixels.numpy())


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, and the folder that it is in if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def read_png(file: Path) -> Tensor:
    """A picture as a tensor (3, h, w) in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return rearrange(pixels, "h w c -> c h w") / 255


# ------------------------------------------------------------------------------------------ charts


def save_row(
    charts: Sequence[Callable[[Axes], None]],
    path: Path,
    height: float = 2.8,
    left_margin: float = 0.5,
    right_margin: float = 1.1,
) -> None:
    """Write a row of charts as a PNG; each chart is a function that draws into the axes it is given.

    In inches: `height` of the picture, `left_margin` for the labels of the first axes, `right_margin` for legends.
    """
    axes_width = 2.8
    gap = right_margin + 0.5
    width = left_margin + len(charts) * (axes_width + gap) - 0.5  # the last chart needs no gap, only its legend
    # A Figure of its own, not pyplot: pyplot would change the backend that a user's notebook draws with.
    figure = Figure(figsize=(width, height), dpi=110)
    # matplotlib wants the space around the axes in parts of the figure, and the space between them in parts of one of
    # the axes. 0.5 inches below are for the x axis, 0.3 above for titles.
    figure.subplots_adjust(
        left=left_margin / width,
        right=1 - right_margin / width,
        bottom=0.5 / height,
        top=1 - 0.3 / height,
        wspace=gap / axes_width,
    )
    all_axes = figure.subplots(1, len(charts), squeeze=False)
    for axes, draw in zip(all_axes[0], charts, strict=True):
        draw(axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    # 64 colors are enough for a few lines, and make a file of 15 kB out of 50.
    picture = Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)
    save_png(picture, path)


def line_chart(axes: Axes, lines: Lines, title: str, across: str = "step") -> None:
    """Draw lines over one x axis, with a legend of their names and last values.

    A line is (x, y) or (x, y, half); half is the half-width of a shaded band, such as a 95% interval.
    """
    ends = []
    # All colors with solid lines, then all again with dashed ones.
    looks = itertools.cycle(itertools.product(STYLES, PALETTE))
    for name, (x, y, *half) in lines.items():
        style, color = next(looks)
        axes.plot(x, y, style, color=color, linewidth=1.6)
        if half:
            low = np.subtract(y, half[0])
            high = np.add(y, half[0])
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        digits = 3 if abs(y[-1]) < 1 else 2
        text = f"{name} {y[-1]:.{digits}f}"
        if style == "--":
            text += " ┄┄"
        ends.append((y[-1], text, color))
    dress(axes, title, across)
    name_ends(axes, ends)


def dress(axes: Axes, title: str, across: str) -> None:
    """Give axes the look of all charts; `across` is what their x axis shows."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(across, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    # Steps are whole numbers; half of an update would be a strange tick.
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=across == "step", steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    # Of the frame only a grid is left, behind the lines: what was measured is what one sees.
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write a legend at the right of the axes, the highest line first; `ends` are (last value, text, color) of lines.

    The text has the color of its line, in place of a sample of the line.
    """
    handles = []
    for _, text, color in sorted(ends, reverse=True):
        handles.append(Line2D([], [], color=color, label=text))
    axes.legend(
        handles=handles,
        labelcolor="linecolor",
        handlelength=0,
        handletextpad=0,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.05),
        fontsize=8,
        frameon=False,
    )
