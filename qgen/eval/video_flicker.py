r"""Flicker: how much the changes from frame to frame differ from the reference's changes.

    flicker = mean_t mean | (x_{t+1} - x_t) - (y_{t+1} - y_t) |,        in 1/255

An error that is the same in every frame is no flicker and costs nothing here; one that comes and goes is, even where
each frame looks fine. 0 for equal clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.metrics import Measured
from qgen.eval.video import Clips, video_metrics

__all__ = ["flicker"]


def flicker(clip: Tensor, reference: Tensor) -> float:
    """Mean absolute difference of frame differences, in 1/255, for two clips (T >= 2, H, W, 3) in [0, 1]."""
    return 255 * float((clip.double().diff(dim=0) - reference.double().diff(dim=0)).abs().mean())


@video_metrics.register("video_flicker")
def score_flicker(shots: Clips) -> Measured:
    pairs = zip(shots.clips, shots.need_reference("video_flicker"), strict=True)
    values = torch.tensor([flicker(x, y) for x, y in pairs])
    return Measured("flicker (frame-difference error)", "1/255", "lower", per_prompt=values)
