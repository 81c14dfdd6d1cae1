"""PSNR of each frame against the reference's frame, averaged over the frames of a clip; infinite for equal clips.

One frame that is equal would make the mean infinite and hide the others: frames are capped at 100 dB, which no 8-bit difference
reaches, unless all are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.metrics import Measured
from qgen.eval.psnr import psnr
from qgen.eval.video import Clips, video_metrics

__all__ = ["frame_psnr"]

CAP = 100.0


def frame_psnr(clip: Tensor, reference: Tensor) -> float:
    """Mean over frames in dB, for two clips (T, H, W, 3) in [0, 1]."""
    frames = psnr(clip, reference)  # (T,)
    return float(frames.mean() if bool(frames.isinf().all()) else frames.clamp_max(CAP).mean())


@video_metrics.register("video_psnr")
def score_video_psnr(shots: Clips) -> Measured:
    pairs = zip(shots.clips, shots.need_reference("video_psnr"), strict=True)
    return Measured("per-frame PSNR", "dB", "higher", per_prompt=torch.tensor([frame_psnr(x, y) for x, y in pairs]))
