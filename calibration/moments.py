r"""Moments: what a layer's input looks like at each part of the trajectory, and where along it that changes.

Rows are counted by fine bins of the timestep: sum and largest magnitude of each column. From F of them `cut` makes `bins` coarse ones by
dynamic programming, so that what is lost by treating timesteps of a bin alike is least:

    minimize Σ_bins Σ_{f in bin} n_f ‖v_f − v_bin‖²,     v_f = (mean of the columns, log of the largest magnitude), each part scaled to 1

A layer whose input changes only near clean images gets narrow bins there. Both statistics merge exactly.
"""

__all__ = ["Moments", "fine_edges"]

from collections.abc import Iterable

import torch
from torch import Tensor

from qgen.calibration.base import Moment


def fine_edges(ts: Iterable[float | None], most: int = 32) -> Tensor:
    """(F - 1,) ascending float32: midpoints between the distinct timesteps, or of at most `most` quantiles of them. (0,) without any."""
    known = torch.tensor(sorted({t for t in ts if t is not None}), dtype=torch.float64)
    if len(known) > most:
        known = known[torch.linspace(0, len(known) - 1, most).round().long()]
    return ((known[1:] + known[:-1]) / 2).float()


class Moments:
    """Count (F,), sum (F, K) and largest magnitude (F, K) of rows by timestep, over calls that are not held out and have one."""

    def __init__(self, edges: Tensor):
        self.edges = edges
        self.count = torch.zeros(len(edges) + 1, dtype=torch.float64)
        self.total: Tensor | None = None
        self.peak: Tensor | None = None

    def update(self, x: Tensor, moment: Moment) -> None:
        if moment.held or moment.t is None:
            return
        x = x.float()
        f = int(torch.bucketize(torch.tensor(moment.t, dtype=torch.float32), self.edges))
        if self.total is None:
            self.total = x.new_zeros(len(self.count), x.shape[1], dtype=torch.float64)
            self.peak = x.new_zeros(len(self.count), x.shape[1])
        self.count[f] += len(x)
        self.total[f] += x.sum(0, dtype=torch.float64)
        self.peak[f] = torch.maximum(self.peak[f], x.abs().amax(0))

    def merge(self, other: "Moments") -> None:
        if not torch.equal(self.edges, other.edges):
            raise ValueError("moments over different bins of timesteps cannot be merged")
        if other.total is None:
            return
        self.count += other.count
        self.total = other.total.clone() if self.total is None else self.total + other.total
        self.peak = other.peak.clone() if self.peak is None else torch.maximum(self.peak, other.peak)

    @property
    def empty(self) -> bool:
        return False  # calls without timesteps leave it empty, and that is no error

    @property
    def seen(self) -> bool:
        """Whether any row had a timestep."""
        return self.total is not None

    def nbytes(self, k: int) -> int:
        return 12 * k * (len(self.edges) + 1)

    def cut(self, bins: int) -> Tensor:
        """Edges (at most bins - 1,) ascending float32 between coarse bins, a subset of the fine ones; every bin has rows."""
        alive = self.count > 0
        n = self.count[alive]
        mean = self.total[alive].cpu() / n[:, None]
        peak = self.peak[alive].double().cpu().amax(1, keepdim=True).clamp_min(1e-12).log()
        v = torch.cat([_scaled(mean, n), _scaled(peak, n)], 1)
        # an edge lies right after each fine bin that has rows, but the last of them
        after = alive.nonzero()[:-1, 0]
        chosen = _segments(v, n, min(bins, len(n)))
        return self.edges[after[chosen]] if len(chosen) else self.edges[:0]

    def means(self, edges: Tensor) -> Tensor:
        """Mean of the columns (T, K) float32 in each coarse bin, and a last row over all where there are several."""
        owner = torch.bucketize(self._centres(), edges)
        count = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, owner, self.count)
        total = torch.zeros(len(count), self.total.shape[1], dtype=torch.float64).index_add_(0, owner, self.total.cpu())
        rows = [total / count.clamp_min(1)[:, None]]
        if len(edges):
            rows.append((total.sum(0) / count.sum())[None])
        return torch.cat(rows).float().to(self.total.device)

    def shares(self, edges: Tensor) -> Tensor:
        """(bins,) share of the rows in each coarse bin."""
        owner = torch.bucketize(self._centres(), edges)
        count = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, owner, self.count)
        return (count / count.sum()).float()

    def _centres(self) -> Tensor:
        """One timestep inside each fine bin."""
        e = self.edges
        if not len(e):
            return torch.zeros(1)
        return torch.cat([e[:1] - 1, (e[1:] + e[:-1]) / 2, e[-1:] + 1])


def _scaled(v: Tensor, n: Tensor) -> Tensor:
    """Rows v (F, D) about their mean, with weights n, so that all of their variance is 1 (or 0)."""
    v = v - (n[:, None] * v).sum(0) / n.sum()
    variance = (n[:, None] * v.square()).sum() / n.sum()
    return v / variance.sqrt() if variance > 1e-24 else torch.zeros_like(v)


def _segments(v: Tensor, n: Tensor, bins: int) -> Tensor:
    """Indices (bins - 1,) of the last row of every segment but the last one, of the best cut of v (F, D) with weights n into `bins`."""
    f = len(n)
    gram = (v @ v.T) * n[:, None] * n[None]
    sums = torch.zeros(f + 1, f + 1, dtype=v.dtype)
    sums[1:, 1:] = gram.cumsum(0).cumsum(1)
    square = torch.cat([torch.zeros(1, dtype=v.dtype), (n * v.square().sum(1)).cumsum(0)])
    weight = torch.cat([torch.zeros(1, dtype=v.dtype), n.cumsum(0)])
    i, j = torch.arange(f + 1)[:, None], torch.arange(f + 1)[None]
    inside = sums.diagonal()[None] - sums[i, j] - sums[j, i] + sums.diagonal()[:, None]
    cost = (square[None] - square[:, None]) - inside / (weight[None] - weight[:, None]).clamp_min(1e-30)
    cost = torch.where(j > i, cost, torch.inf)  # (from, to): rows from … to - 1
    best, back = cost[0].clone(), []
    for _ in range(bins - 1):
        best, where = (best[:, None] + cost).min(0)
        back.append(where)
    ends, at = [], f
    for where in reversed(back):
        at = int(where[at])
        ends.append(at - 1)
    return torch.tensor(ends[::-1], dtype=torch.int64)
