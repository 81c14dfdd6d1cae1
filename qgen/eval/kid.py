r"""Kernel distance: maximum mean discrepancy of two feature sets, unbiased at any number of pictures.

    d = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),      k(x, y) = (x·y / K + 1)³

Unlike the Fréchet distance its expectation does not depend on n, so it suits a few hundred pictures; it may come out
slightly negative. That holds for independent sets. Where x_i and y_i show the same prompt, they are alike by design, and
i = j is left out of the last mean as well: else two models that draw alike would seem closer than equal. The interval is
±1.96 standard errors by the jackknife: leave one picture (of pairs: one prompt) out, see how the value moves.

Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401; Gretton et al., 2012, equation 4 (pairs),
https://jmlr.org/papers/v13/gretton12a.html; Arvesen, 1969, https://doi.org/10.1214/aoms/1177697287
(jackknife of U-statistics)
"""

from __future__ import annotations

from torch import Tensor

from qgen.eval.bootstrap import Interval
from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["kernel_distance"]


def kernel_distance(x: Tensor, y: Tensor, paired: bool = False) -> Interval:
    """Returns the distance of feature sets (n, K) and (m, K) in float64, with its 95 % interval.

    paired: row i of both belongs to one prompt. Raises ValueError for fewer than three rows, unequal K, or pairs of unequal number.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(f"two feature sets (n >= 3, K) wanted, found {tuple(x.shape)} and {tuple(y.shape)}")
    if paired and len(x) != len(y):
        raise ValueError(f"pairs wanted, found {len(x)} and {len(y)} rows")
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = _kernel(x, x).fill_diagonal_(0), _kernel(y, y).fill_diagonal_(0), _kernel(x, y)
    if paired:
        xy.fill_diagonal_(0)
        h = xx + yy - xy - xy.T
        value, sums = h.sum() / (n * (n - 1)), h.sum() - 2 * h.sum(1)
        variance = (n - 1) * (sums / ((n - 1) * (n - 2))).var(correction=0)
    else:
        value = _combine(xx.sum(), yy.sum(), xy.sum(), n, m)
        without_x = _combine(xx.sum() - 2 * xx.sum(1), yy.sum(), xy.sum() - xy.sum(1), n - 1, m)  # (n,)
        without_y = _combine(xx.sum(), yy.sum() - 2 * yy.sum(1), xy.sum() - xy.sum(0), n, m - 1)  # (m,)
        variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_x, without_y))
    half = 1.96 * float(variance) ** 0.5
    return Interval(float(value), float(value) - half, float(value) + half, min(n, m))


@metrics.register("kid")
@needs("set", "network")
def score_kid(shots: Shots) -> Measured:
    extractor = shots.extractor_for("kid")
    mine, theirs, against = shots.feature_pair(extractor, "kid")
    found = kernel_distance(mine, theirs, paired=shots.real is None)
    label, reference = extractor.labels["kid"], None
    if shots.real is not None and shots.reference is not None:
        reference = kernel_distance(shots.features_of("reference", extractor), theirs).mean
    return Measured(
        label,
        "",
        "lower",
        found.mean,
        found.low,
        found.high,
        extractor=extractor,
        note=against,
        reference_value=reference,
    )


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _combine(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
