r"""Depth abs-rel: mean relative error of depth, after bringing the prediction to the truth's scale.

    abs_rel = mean |s d̂ - d| / d,       s = median d / median d̂        over pixels with finite, positive d and d̂

Depth from pictures alone has no scale: one factor per scene is free. Eigen et al., 2014, https://arxiv.org/abs/1406.2283
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["abs_rel"]


def abs_rel(predicted: Tensor, truth: Tensor, align: bool = True) -> float:
    """0 for equal maps of one shape. align=False leaves the scale. ValueError if shapes differ or no pixel is valid."""
    if predicted.shape != truth.shape:
        raise ValueError(f"depth maps of one shape wanted, found {tuple(predicted.shape)} and {tuple(truth.shape)}")
    a, b = predicted.double(), truth.double()
    valid = a.isfinite() & b.isfinite() & (b > 0) & (a > 0)
    if not bool(valid.any()):
        raise ValueError("no pixel has a finite, positive depth on both sides")
    a, b = a[valid], b[valid]
    scale = b.median() / a.median() if align else 1.0
    return float(((a * scale - b).abs() / b).mean())
