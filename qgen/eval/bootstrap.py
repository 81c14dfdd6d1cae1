"""How sure is a mean? The percentile bootstrap.

Draw n values with replacement from the n values at hand, take their mean, repeat; the middle 95 % of those means is
the interval. For two pipelines on the same prompts the *paired* difference is resampled instead: prompts that are
hard for both no longer blur the comparison.

Efron, 1979, "Bootstrap Methods: Another Look at the Jackknife", https://doi.org/10.1214/aos/1176344552
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_difference", "bootstrap_mean", "bootstrap_two"]


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its interval [low, high] at the given level."""

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(values: Sequence[float] | Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Returns the mean of values (n,) with its percentile-bootstrap interval; the same seed gives the same bits.

    Infinite values (PSNR of equal pictures) are allowed. Raises ValueError for no values, NaN, or a level outside (0,
    1). One value gives an interval of no width, which says nothing: n is in the result for that reason.
    """
    x = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if x.numel() == 0:
        raise ValueError("no values to average")
    if bool(x.isnan().any()):
        raise ValueError(f"{int(x.isnan().sum())} of {x.numel()} values are NaN")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level must lie in (0, 1) and draws be positive, found level={level}, draws={draws}")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(x.numel(), (draws, x.numel()), generator=generator)
    means = x[picks].mean(1).sort().values  # (draws,)
    # The nearest order statistic: interpolating between two infinite means would give NaN.
    edge = (1 - level) / 2
    low, high = (means[round(q * (draws - 1))] for q in (edge, 1 - edge))
    return Interval(float(x.mean()), float(low), float(high), x.numel(), level)


def bootstrap_difference(
    a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Returns the mean of a - b over pairs, both (n,), with its interval; zero outside it means a real difference at
    this level.

    Pairs that are infinite alike count as equal. Raises ValueError if lengths differ.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64).flatten().cpu() for v in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"pairs wanted, found {a.numel()} and {b.numel()} values")
    return bootstrap_mean(torch.where(a == b, torch.zeros_like(a), a - b), level, draws, seed)


def bootstrap_two(
    a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Returns mean a - mean b of two unpaired sets (n,) and (m,) with its interval, for samples of different prompts.

    n of the result is the smaller set's. Values must be finite; raises ValueError otherwise, or for an empty set.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64).flatten().cpu() for v in (a, b))
    if not a.numel() or not b.numel() or not bool(a.isfinite().all() & b.isfinite().all()):
        raise ValueError(f"two sets of finite values wanted, found {a.numel()} and {b.numel()} values")
    generator = torch.Generator().manual_seed(seed)
    means = [x[torch.randint(len(x), (draws, len(x)), generator=generator)].mean(1) for x in (a, b)]
    differences = (means[0] - means[1]).sort().values
    edge = (1 - level) / 2
    low, high = (differences[round(q * (draws - 1))] for q in (edge, 1 - edge))
    return Interval(float(a.mean() - b.mean()), float(low), float(high), min(len(a), len(b)), level)
