"""Pictures between qgen and ComfyUI, whose IMAGE is a float32 tensor (B, H, W, 3) in [0, 1]."""

__all__ = ["from_pil", "stacked", "text_picture"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_INK, _PAPER = (24, 24, 27), (255, 255, 255)


def from_pil(*pictures: Any) -> Tensor:
    """(B, H, W, 3) from PIL pictures of one size."""
    import numpy as np

    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))


def text_picture(lines: Sequence[str], size: int = 16, width: int = 0, headline: bool = True) -> Any:
    """A PIL picture of lines of text; columns, split by tabs, are aligned. The first line is underlined if it is a headline."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    rows = [line.split("\t") for line in lines]
    columns = max((len(row) for row in rows), default=1)
    spans = [0.0] * columns
    for row in rows:
        for i, cell in enumerate(row):
            if len(row) > 1:  # a line without tabs is prose, it may run over all columns
                spans[i] = max(spans[i], font.getlength(cell))
    gap, margin, step = 2 * size, size, round(size * 1.6)
    longest = max((font.getlength(row[0]) for row in rows if len(row) == 1), default=0)
    width = max(width, round(max(sum(spans) + gap * (columns - 1), longest)) + 2 * margin)
    canvas = Image.new("RGB", (width, step * len(rows) + 2 * margin), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        x = float(margin)
        for i, cell in enumerate(row):
            draw.text((x, margin + number * step), cell, _INK, font)
            x += spans[i] + gap
    if headline and rows:
        draw.line((margin, margin + step - 4, width - margin, margin + step - 4), (170, 170, 178))
    return canvas


def stacked(*pictures: Any) -> Any:
    """PIL pictures under each other, on white."""
    from PIL import Image

    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
