"""Pictures for people: pixels from whatever was drawn, PNG data URIs for pages, and a labelled before/after grid.

Difference pictures show |after − before| · gain on black, so that a perfect match is black; the gain is always written beside them.
Small pictures are enlarged by whole factors without smoothing: what is seen are the model's own pixels.
"""

__all__ = ["difference", "grid", "pixels", "png_uri"]

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

GAIN = 4
_INK, _FADED, _PAPER, _FRAME = (24, 24, 27), (113, 113, 122), (255, 255, 255), (222, 222, 228)


def pixels(picture: Any) -> np.ndarray:
    """(H, W, 3) uint8 from a PIL picture, or an array or tensor (H, W, 3), uint8 or floating in [0, 1]. ValueError otherwise."""
    if hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    elif hasattr(picture, "detach"):
        picture = picture.detach().cpu().float() if picture.is_floating_point() else picture.detach().cpu()
    x = np.asarray(picture)
    if x.ndim != 3 or x.shape[2] != 3 or 0 in x.shape:
        raise ValueError(f"a picture of shape (height, width, 3) wanted, found {x.shape}")
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all():
        raise ValueError(f"a picture of uint8, or of finite floats in [0, 1], wanted; found {x.dtype}")
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def difference(before: Any, after: Any, gain: float = GAIN) -> np.ndarray:
    """|after − before| · gain, (H, W, 3) uint8; ValueError if the sizes differ."""
    a, b = pixels(before), pixels(after)
    if a.shape != b.shape:
        raise ValueError(f"pictures of one size wanted, found {a.shape[:2]} and {b.shape[:2]}")
    return (np.abs(a.astype(np.float32) - b.astype(np.float32)) * gain).clip(0, 255).round().astype(np.uint8)


def enlarge(x: np.ndarray, least: int) -> np.ndarray:
    """x repeated by the smallest whole factor that makes its width at least `least` pixels."""
    factor = -(-least // x.shape[1])
    return x.repeat(factor, 0).repeat(factor, 1)


def png_uri(picture: Any, least: int = 0) -> str:
    """A data: URI with the picture as PNG, enlarged to `least` pixels of width if it is smaller."""
    from PIL import Image

    stream = io.BytesIO()
    x = pixels(picture)
    Image.fromarray(enlarge(x, least) if least else x).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def grid(rows: Sequence[tuple[str, Sequence[Any]]], captions: Sequence[str], title: str = "", least: int = 160) -> Any:
    """A PIL picture: one labelled row of pictures per entry of `rows`, one captioned column per prompt.

    rows: (label, pictures); a label's first line is bold, further lines are smaller. least: width of a picture at least, in pixels.
    """
    from PIL import Image, ImageDraw

    tiles = [[enlarge(pixels(p), least) for p in pictures] for _, pictures in rows]
    if not tiles or any(len(row) != len(captions) for row in tiles) or not captions:
        raise ValueError(
            f"one picture per caption in every row wanted, found {[len(row) for row in tiles]} for {len(captions)} captions"
        )
    height, width = tiles[0][0].shape[:2]
    big, bold, small = _font(24), _font(19), _font(15)
    margin, gap, left, top = 24, 8, 190, 24 + (46 if title else 0)
    caption_height = max(len(_lines(c, small, width)) for c in captions) * 20 + 10
    size = (
        left + len(captions) * (width + gap) + margin - gap,
        top + caption_height + len(tiles) * (height + gap) + margin - gap,
    )
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin - 4), title, _INK, big)
    for column, caption in enumerate(captions):
        for number, line in enumerate(_lines(caption, small, width)):
            draw.text((left + column * (width + gap), top + number * 20), line, _INK, small)
    for index, ((label, _), row) in enumerate(zip(rows, tiles, strict=True)):
        y = top + caption_height + index * (height + gap)
        lines = label.split("\n")
        start = y + height // 2 - (24 + 20 * (len(lines) - 1)) // 2
        for number, line in enumerate(lines):
            below = 26 + 20 * (number - 1) if number else 0
            draw.text((margin, start + below), line, _FADED if number else _INK, small if number else bold)
        for column, tile in enumerate(row):
            x = left + column * (width + gap)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)
            canvas.paste(Image.fromarray(tile), (x, y))
    return canvas


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _lines(text: str, font: Any, width: int) -> list[str]:
    """Text cut at spaces into lines that fit; a word that fits nowhere is cut off with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            word = word.rstrip("…")[:-1] + "…"
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines or [""]
