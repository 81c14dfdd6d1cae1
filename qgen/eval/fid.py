r"""Fréchet distance between two clouds of features, each taken for a Gaussian.

    d = |μx - μy|² + tr Cx + tr Cy - 2 tr (Cx Cy)^½

With centred features scaled to A and B so that Cx = AᵀA and Cy = BᵀB, the last trace is the sum of singular values of
A Bᵀ: exact, real, and cheap when there are fewer pictures than feature dimensions. Over InceptionV3's 2048 features it
is called FID; over another network it carries that network's name and another scale. It is biased upward for few
pictures, so only compare values of equal n.

Heusel et al., 2017, https://arxiv.org/abs/1706.08500; Dowson & Landau, 1982,
https://doi.org/10.1016/0047-259X(82)90077-X
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgen.eval.exchange import LEAST, excess
from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["frechet_distance"]

FEW = 2048  # as many pictures as InceptionV3 has features: below, its covariance has no full rank
# Deals of the pictures for the difference from chance: fewer where a distance takes long, none where it takes minutes.
MANY, DEALS, MOST = 512, 199, 2 * FEW


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Returns the distance of two feature sets (n, K) and (m, K), computed in float64.

    Raises ValueError for fewer than two rows, unequal K, or values that are not finite.
    """
    for name, features in (("first", x), ("second", y)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"the {name} feature set must be (n >= 2, K), found {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"the {name} feature set holds NaN or infinity")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature sets have {x.shape[1]} and {y.shape[1]} dimensions; both need the same extractor")
    x, y = x.double(), y.double()
    a, b = _factor(x), _factor(y)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    distance = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return float(distance.clamp_min(0))  # rounding may leave -1e-12 for equal sets


@metrics.register("fid")
@needs("set", "network")
def score_fid(shots: Shots) -> Measured:
    extractor = shots.extractor_for("fid")
    mine, theirs, against = shots.feature_pair(extractor, "fid")
    n, K = min(len(mine), len(theirs)), mine.shape[1]
    beside = _beside(shots, extractor, mine, theirs) if shots.real is not None else {}
    label, why = extractor.labels["fid"], few(n, K)
    note = "; ".join([against, *why, *beside.pop("said", ())])
    value = frechet_distance(mine, theirs)
    return Measured(label, "", "lower", value, extractor=extractor, note=note, flagged=bool(why), **beside)


def _beside(shots: Shots, extractor: Any, mine: Tensor, real: Tensor) -> dict[str, Any]:
    """A reference and the difference from it. Of many pictures the difference has no interval, whose deals would take minutes."""
    theirs = None if shots.reference is None else shots.features_of("reference", extractor)
    both = len(mine) + len(real)
    draws = DEALS if both <= MANY else LEAST
    if theirs is not None:
        found: dict[str, Any] = {"reference_value": frechet_distance(theirs, real)}
        if both <= MOST:
            apart = lambda a, b: frechet_distance(a, real) - frechet_distance(b, real)  # noqa: E731
            found["change"] = excess(apart, mine, theirs, paired=True, draws=draws)[1]
            found["said"] = (f"difference by {draws} swaps of pictures of one prompt",)
        return found
    if both > MOST:
        return {}
    return {
        "change": excess(frechet_distance, mine, real, draws=draws)[1],
        "said": (f"reference: mean of {draws} random deals of all pictures",),
    }


def few(n: int, K: int) -> list[str]:
    """Warnings about the number of pictures, for a row's note."""
    if n < K:
        return [f"only {n} pictures for {K} feature dimensions: biased upward, compare equal n only"]
    return [f"only {n} pictures (< {FEW}): biased upward, compare equal n only"] if n < FEW else []


def _factor(features: Tensor) -> Tensor:
    """F (min(n, K), K) with FᵀF equal to the unbiased covariance."""
    a = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return a if a.shape[0] <= a.shape[1] else torch.linalg.qr(a, mode="r").R
