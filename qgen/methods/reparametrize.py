r"""Reparametrization: a range for every channel, or for every group of channels, at the price of one range for the tensor.

A scale s_c and a middle z_c per channel of x cannot be used in a product over channels. But

    x' = (x − z_c) / r_c,    r_c = s_c / mean(s),    W' = W r_c,    bias' = bias + W z

is the same layer in floating point, and one static scale for all of x' gives the very codes that x had under its own scales. The middle is
taken out by the `center` of a draft, r_c is its smoothing; no channel's range depends on the weight, as it does in SmoothQuant.

groups = 0: each channel for itself (RepQuant, after LayerNorm). groups > 0: channels whose (min, max) lie together share a range, by
k-means; DGQ adds up one product per group, which is the same sum. Few groups follow chance less, and leave the weight's columns as they are
within a group. Ranges are taken at a few quantiles, and what has the least error on held-out rows stays, no change among the candidates.
RepQ-ViT, Li et al., 2022, https://arxiv.org/abs/2212.08254 · RepQuant, 2024, https://arxiv.org/abs/2402.05628 · DGQ, Ryu et al., 2025,
https://arxiv.org/abs/2501.04304
"""

__all__ = ["Reparametrize", "axis", "group", "ranges", "spread"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.formats.vq import kmeans
from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("reparametrize")
@dataclass(frozen=True)
class Reparametrize:
    """Evens out the ranges of channels before one scale serves them all. Stands in the place of `smooth`, after `center`.

    groups: of channels that share a range; 0 = every channel its own. quantiles: of the rows, tried as ends of the ranges.
    """

    name: ClassVar[str] = "reparametrize"
    groups: int = 0
    quantiles: tuple[float, ...] = (1.0, 0.9999, 0.999, 0.99)
    judge_rows: int = 512

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        judge = stats.judge.first(self.judge_rows)
        best, least, label = replace(draft, qweight=None), None, "none"
        for quantile in (None, *self.quantiles):
            trial = best if quantile is None else self._with(draft, stats, quantile)
            error = judge.error(trial)
            if least is None or error < least:
                best, least, label = trial, error, "none" if quantile is None else f"{quantile:g}"
        where = {"outliers_in": axis(judge.rows, groups=self.groups)} if self.groups else {}
        return best.noted(quantile=label, **where)

    def _with(self, draft: Draft, stats: Stats, quantile: float) -> Draft:
        low, high = ranges(stats.fit, quantile)
        if self.groups:
            owner = group(low, high, self.groups)
            count = int(owner.max()) + 1
            low = low.new_full((count,), torch.inf).scatter_reduce(0, owner, low, "amin")[owner]
            high = high.new_full((count,), -torch.inf).scatter_reduce(0, owner, high, "amax")[owner]
        reach = torch.maximum(high, -low)  # rows are centred: what is left of the middle must fit too
        alive = reach > 0
        r = torch.where(alive, reach / reach[alive].mean() if alive.any() else reach, 1.0).clamp(1e-4, 1e4)
        return replace(draft, smooth=draft.stored(r), down=None, up=None, qweight=None)


def ranges(rows: Tensor, quantile: float = 1.0) -> tuple[Tensor, Tensor]:
    """(low, high), each (K,), of rows (M, K): at 1.0 the smallest and the largest, else the quantiles 1 − q and q."""
    if quantile >= 1:
        return rows.amin(0), rows.amax(0)
    m = rows.shape[0]
    rank = min(max(round((1 - quantile) * (m - 1)), 0), m - 1)  # kthvalue, for torch.quantile refuses large inputs
    return rows.kthvalue(rank + 1, 0).values, rows.kthvalue(m - rank, 0).values


def group(low: Tensor, high: Tensor, count: int) -> Tensor:
    """(K,) which of at most `count` groups each channel belongs to, by k-means on the points (low, high)."""
    points = torch.stack([low, high], -1)
    centres = kmeans(points, min(count, len(points.unique(dim=0))))
    return torch.cdist(points, centres).argmin(-1)


def spread(low: Tensor, high: Tensor) -> float:
    """DGQ's D of one axis: how far the ends of its ranges lie apart, (max − min of highs) + (max − min of lows)."""
    return float(high.amax() - high.amin() + low.amax() - low.amin())


def axis(rows: Tensor, bits: int = 4, groups: int = 8) -> str:
    """ "channel" or "row": along which axis of rows (M, K) groups of ranges leave the smaller error; `spread` decides between equals.

    D alone is fooled by channels that are large and centred, whose row maxima vary as much as their channel maxima.
    """
    errors = {}
    for name, x in (("channel", rows), ("row", rows.T)):
        low, high = ranges(x)
        errors[name] = (float((grouped(x, group(low, high, groups), bits) - x).square().sum()), -spread(low, high))
    return min(errors, key=lambda name: errors[name])


def grouped(x: Tensor, owner: Tensor, bits: int) -> Tensor:
    """x (M, K) there and back with one step and one zero for all columns of a group; owner (K,)."""
    out = torch.empty_like(x)
    top = (1 << bits) - 1
    for index in owner.unique():
        part = x[:, owner == index]
        low, high = part.amin().clamp(max=0), part.amax().clamp(min=0)
        step = ((high - low) / top).clamp_min(1e-12)
        zero = (-low / step).round()
        out[:, owner == index] = (((part / step).round() + zero).clamp(0, top) - zero) * step
    return out
