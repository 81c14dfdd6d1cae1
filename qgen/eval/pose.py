r"""Pose AUC@τ: how accurate relative camera poses are, from 0 to 100.

For every pair i < j of views, the relative pose of the prediction is compared with the true one:

    rotation error    = angle of R̂_ij R_ijᵀ            translation error = angle between t̂_ij and t_ij, sign ignored
    error             = the larger of both, in degrees
    AUC@τ             = 100 / τ · ∫_0^τ (share of pairs with error < ε) dε = 100 · mean max(0, 1 - error / τ)

The integral is exact here; VGGT's own evaluation sums a histogram of whole degrees, which rounds errors up. Translations have no scale, so
only their direction counts, and pairs without any true translation are judged by rotation alone.
Wang et al., 2023 (PoseDiffusion), https://arxiv.org/abs/2306.15667
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pose_auc", "relative_errors"]


def relative_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and translation errors in degrees, both (S (S - 1) / 2,), of world-to-camera poses (S, 4, 4) or (S, 3, 4).

    Raises ValueError for other or unequal shapes, or fewer than two views.
    """
    if predicted.shape != truth.shape or truth.ndim != 3 or truth.shape[1:] not in ((4, 4), (3, 4)) or len(truth) < 2:
        raise ValueError(f"poses (S >= 2, 4, 4) alike wanted, found {tuple(predicted.shape)} and {tuple(truth.shape)}")
    (ra, ta), (rb, tb) = (_relative(x.double()) for x in (predicted, truth))
    return _angle_between_rotations(ra, rb), _angle_between_lines(ta, tb)


def pose_auc(errors: Tensor, degrees: float) -> float:
    """The area above, in percent, for errors (n,) in degrees."""
    return 100 * float((1 - errors / degrees).clamp_min(0).mean())


def _relative(poses: Tensor) -> tuple[Tensor, Tensor]:
    """R_ij = R_j R_iᵀ (P, 3, 3) and t_ij = t_j - R_ij t_i (P, 3) for all i < j."""
    i, j = torch.triu_indices(len(poses), len(poses), 1)
    R, t = poses[:, :3, :3], poses[:, :3, 3:]
    turn = R[j] @ R[i].transpose(1, 2)
    return turn, (t[j] - turn @ t[i]).squeeze(-1)


def _angle_between_rotations(a: Tensor, b: Tensor) -> Tensor:
    # |a - b|² = 8 sin²(θ/2): unlike the arc cosine of the trace it keeps its digits near zero.
    half = ((a - b).square().sum((1, 2)) / 8).sqrt().clamp(0, 1)
    return torch.rad2deg(2 * half.asin())


def _angle_between_lines(a: Tensor, b: Tensor) -> Tensor:
    across = torch.linalg.cross(a, b).norm(dim=1)
    angle = torch.rad2deg(torch.atan2(across, (a * b).sum(1).abs()))
    still_truth, still = b.norm(dim=1) < 1e-9, a.norm(dim=1) < 1e-9
    angle = torch.where(still & ~still_truth, torch.full_like(angle, 90.0), angle)
    return torch.where(still_truth, torch.zeros_like(angle), angle)
