r"""Temporal consistency: mean likeness of neighbouring frames, as the cosine between them after removing their mean colour.

    consistency = mean_t cos( x_t - x̄_t, x_{t+1} - x̄_{t+1} ),      x̄_t = mean over pixels, per channel

A still clip gets 1, unrelated frames about 0. It is computed on pixels, so motion lowers it as well as trembling: only
its change from the 16-bit clips of the same prompts means something, and that stands beside it. VBench computes the same over
features of DINO and CLIP, which do not come with packages. Huang et al., 2023, https://arxiv.org/abs/2311.17982
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.metrics import Measured
from qgen.eval.video import Clips, video_metrics

__all__ = ["consistency"]


def consistency(clip: Tensor) -> float:
    """In [-1, 1], for a clip (T >= 2, H, W, 3); two flat frames count as alike."""
    x = clip.double()
    x = (x - x.mean((1, 2), keepdim=True)).flatten(1)  # (T, H·W·3)
    dot, size = (x[:-1] * x[1:]).sum(1), x.square().sum(1)
    scale = (size[:-1] * size[1:]).sqrt()
    flat = (size[:-1] < 1e-12) & (size[1:] < 1e-12)
    return float(torch.where(flat, torch.ones_like(dot), dot / scale.clamp_min(1e-12)).mean())


@video_metrics.register("video_consistency")
def score_consistency(shots: Clips) -> Measured:
    mine, theirs = shots.on_both(consistency)
    return Measured("temporal consistency (pixels)", "", "higher", per_prompt=mine, reference_per_prompt=theirs)
