"""Pictures for people: labelled grids of images and curves of what a run measured."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] to a PIL image."""
    return Image.fromarray(image.detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def contact_sheet(
    images: Sequence[Tensor], captions: Sequence[str], path: Path, columns: int = 4, side: int = 128
) -> None:
    """Write images in a grid, each `side` pixels wide (never enlarged smoothly), its caption beneath."""
    font, pad, line = ImageFont.load_default(11), 6, 13
    height = round(side * images[0].shape[1] / images[0].shape[2])
    texts = [textwrap.wrap(c.removeprefix("a photo of "), width=max(8, side // 6))[:3] for c in captions]
    lines = max((len(t) for t in texts), default=0)
    cell = (side + pad, height + line * lines + pad)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + pad, cell[1] * rows + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = pad + i % columns * cell[0], pad + i // columns * cell[1]
        smaller = image.shape[2] < side
        sheet.paste(to_pil(image).resize((side, height), Image.NEAREST if smaller else Image.LANCZOS), (x, y))
        draw.multiline_text((x, y + height + 1), "\n".join(text), fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
