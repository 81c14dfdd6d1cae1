"""Pictures in one form: float32 (n, H, W, 3) on the CPU, values in [0, 1].

Everything that enters the scores passes through `as_images`, so that a wrong range, a missing channel or NaN is met
here with a readable error instead of as a strange number later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgen.errors import BadData

__all__ = ["PICTURE_SUFFIXES", "as_images", "batches", "load_folder"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def as_images(pictures: Any, what: str = "pictures") -> Tensor:
    """Returns pictures as a float32 tensor (n, H, W, 3) on the CPU with values in [0, 1].

    Arguments:
        pictures: a tensor or array (n, H, W, 3), uint8 or floating in [0, 1]; or a sequence of PIL images or arrays
        (H, W, 3) of one
            size; or the path of a folder of pictures of one size.
        what: how an error names them.

    Raises ValueError for other shapes, ranges or mixed sizes, and `BadData` for NaN or infinity.
    """
    if isinstance(pictures, (str, Path)):
        pictures = load_folder(pictures)
    if isinstance(pictures, Sequence):
        pictures = _stack([_one(p, what) for p in pictures], what)
    x = pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.array(pictures))
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"{what} must have shape (n, height, width, 3), found {tuple(x.shape)}")
    return _unit_range(x, what)


def batches(pictures: Tensor | Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Yields (B, H, W, 3) tensors of up to `size` pictures in order; where sizes differ, a batch ends early."""
    if isinstance(pictures, Tensor):
        yield from pictures.split(size)
        return
    batch: list[Tensor] = []
    for picture in pictures:
        if batch and (len(batch) == size or picture.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield torch.stack(batch)


def load_folder(folder: str | Path) -> list[Tensor]:
    """Returns the pictures of a folder in the order of their names, each float32 (H, W, 3) in [0, 1]; sizes may differ.

    Files that are no pictures by name are passed over; transparent pictures are laid on white. Raises ValueError if the
    folder has no picture or cannot be read, and `BadData` for a file that is called a picture and is none.
    """
    return [_opened(path) for path in picture_paths(folder)]


def picture_paths(folder: str | Path) -> list[Path]:
    """The picture files of a folder by name; ValueError if there are none or the folder cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"a folder of pictures wanted, found no folder {folder}")
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror or error}; see to its permissions") from error
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return paths


def _opened(path: Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _one(image, str(path))
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; see to its permissions") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's word for a broken PNG
        reason = str(error).splitlines()[0][:200]
        raise BadData(
            f"{path} is called a picture and is none, or is broken: {reason}; remove or replace it"
        ) from error


def _one(picture: Any, what: str) -> Tensor:
    if hasattr(picture, "convert"):  # PIL, without importing it
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            white = layer.copy()
            white.paste((255, 255, 255, 255), (0, 0, *layer.size))
            white.alpha_composite(layer)
            picture = white
        picture = np.array(picture.convert("RGB"))
    x = picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture))
    if x.ndim != 3 or x.shape[-1] != 3:
        raise ValueError(f"{what}: one picture must have shape (height, width, 3), found {tuple(x.shape)}")
    return _unit_range(x, what)


def _stack(pictures: list[Tensor], what: str) -> Tensor:
    sizes = {tuple(p.shape[:2]) for p in pictures}
    if len(sizes) != 1:
        found = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:4]) or "no picture"
        raise ValueError(f"{what} must be of one size, found {found}")
    return torch.stack(pictures)


def _unit_range(x: Tensor, what: str) -> Tensor:
    if x.dtype == torch.uint8:
        return x.cpu().float() / 255
    if not x.is_floating_point():
        raise ValueError(f"{what} must be uint8 or floating, found {x.dtype}")
    x = x.detach().cpu().float()
    if not bool(x.isfinite().all()):
        raise BadData(f"{what} hold NaN or infinity; a 16-bit VAE that overflows does this, try float32 or bfloat16")
    low, high = float(x.min()), float(x.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"{what} must have values in [0, 1], found [{low:.3g}, {high:.3g}]")
    return x.clamp(0, 1)
