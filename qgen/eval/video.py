"""Scores of clips: what a picture metric cannot see is how frames follow each other.

    evaluate_video("clips_4bit", "clips_16bit")          # folders of clips, or tensors (n, T, H, W, 3) in [0, 1]

A clip is a folder of frames, or an animated .gif, .webp or .png; a .npy file holds (T, H, W, 3). Metrics register in
`video_metrics` as functions from `Clips` to `Measured`, one per file; "per prompt" then means per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgen.errors import BadData
from qgen.eval.collect import collect
from qgen.eval.images import PICTURE_SUFFIXES, as_images
from qgen.eval.metrics import Measured
from qgen.eval.scores import Scores
from qgen.registry import Registry

__all__ = ["Clips", "as_clips", "evaluate_video", "video_metrics"]

METRICS = ("video_psnr", "video_consistency", "video_flicker")
ANIMATED = (".gif", ".webp", ".png", ".apng")


@dataclass(frozen=True)
class Clips:
    """Clips to score, each (T, H, W, 3) float32 in [0, 1], and the reference's, alike in number and shape, or None."""

    clips: Sequence[Tensor]
    reference: Sequence[Tensor] | None = None

    def need_reference(self, metric: str) -> Sequence[Tensor]:
        if self.reference is None:
            raise ValueError(f"{metric} compares with the clips of another pipeline: pass reference=")
        return self.reference

    def on_both(self, judge: Callable[[Tensor], float]) -> tuple[Tensor, Tensor | None]:
        """judge(clip) for every clip, and for every reference clip or None."""
        mine = torch.tensor([judge(clip) for clip in self.clips])
        return mine, None if self.reference is None else torch.tensor([judge(clip) for clip in self.reference])


video_metrics: Registry[Callable[[Clips], Measured]] = Registry("video metric", "qgen.eval")


def evaluate_video(clips: Any, reference: Any = None, *, metrics: Sequence[str] = METRICS, seed: int = 0) -> Scores:
    """Scores clips against the reference's. ValueError for what does not fit together."""
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    found = [video_metrics[name] for name in names]
    mine = as_clips(clips, "clips")
    theirs = None if reference is None else as_clips(reference, "the reference's clips")
    if theirs is not None:
        shapes = [[tuple(clip.shape) for clip in side] for side in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"clips of equal number, length and size wanted, found {shapes[0][:3]} and {shapes[1][:3]}"
            )
    subject = Clips(mine, theirs)
    return collect({name: one(subject) for name, one in zip(names, found, strict=True)}, len(mine), seed=seed)


def as_clips(clips: Any, what: str = "clips") -> list[Tensor]:
    """Clips in one form: a list of (T, H, W, 3) float32 tensors in [0, 1]; T is at least 2."""
    found = [as_images(clip, what) for clip in (_folder(Path(clips)) if isinstance(clips, (str, Path)) else clips)]
    short = next((i for i, clip in enumerate(found) if len(clip) < 2), None)
    if not found or short is not None:
        raise ValueError(f"{what}: at least one clip, and two frames in each, wanted; found {len(found)} clips"
                         + ("" if short is None else f", and one frame in number {short}"))  # fmt: skip
    return found


def _folder(folder: Path) -> list[Any]:
    """Clips of a folder by name; a folder that holds still frames alone is one clip."""
    if not folder.is_dir():
        raise ValueError(f"a folder of clips wanted, found no folder {folder}")
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    clips: list[Any] = [p for p in entries if p.is_dir()]
    clips += [_frames(p) for p in entries if p.suffix.lower() == ".npy" or _animated(p)]
    if not clips and any(p.suffix.lower() in PICTURE_SUFFIXES for p in entries):
        return [folder]
    if not clips:
        kinds = ", ".join((*ANIMATED, ".npy"))
        raise ValueError(f"{folder} holds no clips: folders of frames, or files {kinds}; turn .mp4 into frames first")
    return clips


def _animated(path: Path) -> bool:
    if path.suffix.lower() not in ANIMATED or not path.is_file():
        return False
    from PIL import Image

    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, SyntaxError) as error:
        raise BadData(f"{path} is called a clip and is none, or is broken: {error}") from error


def _frames(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise BadData(f"{path} is no array of numbers: {error}") from error
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
