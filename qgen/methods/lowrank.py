r"""SVDQuant's low-rank branch: W ≈ Q(W − U D) + U D, with U D the leading rank-R part of the smoothed weight.

Refits repeat `L ← SVD_R(Ŵ − Q(Ŵ − L))`, which moves what rounding lost into the branch, and stop when the output error rises. The SVD is
randomized (R + 10 columns, 4 power iterations, seeded): as good as the full one here, and some 18 times quicker.
Li et al., 2024, https://arxiv.org/abs/2411.05007 · Halko et al., 2009, https://arxiv.org/abs/0909.4061
"""

__all__ = ["LowRank", "low_rank"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Stats, rounds_for
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("lowrank")
@dataclass(frozen=True)
class LowRank:
    """Lowers the squared error of the weight; refits lower the output error on held-out rows.

    rank: R, capped at a quarter of the smaller side. rounds: refits at most, one in layers of more than a million weights. iterations:
    power iterations of the SVD. smaller: ranks (0 = no branch) of which a layer takes the smallest whose error on held-out rows is at most
    `slack` above that of `rank`: it then stores less and computes less.
    """

    name: ClassVar[str] = "lowrank"
    rank: int = 32
    rounds: int = 3
    iterations: int = 4
    smaller: tuple[int, ...] = ()
    slack: float = 0.02

    def __post_init__(self) -> None:
        if self.rank < 1 or self.slack < 0 or any(not 0 <= r < self.rank for r in self.smaller):
            raise ValueError(
                f"rank is 1 or more, smaller ones lie below it and slack is not negative: found {self.rank}, {self.smaller}, {self.slack}"
            )

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"} if self.rounds else ())

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        cap = min(draft.sites[0].shape) // 4
        rank = min(self.rank, cap)
        if rank < 1:
            return draft
        chosen = self._fitted(draft, stats, rank)
        if stats.judge is None or not self.smaller:
            return chosen
        most = (1 + self.slack) * stats.judge.error(chosen)
        for less in sorted({min(r, cap) for r in self.smaller if r < rank}):
            trial = self._fitted(draft, stats, less)
            if stats.judge.error(trial) <= most:
                return trial.noted(rank=less)
        return chosen.noted(rank=rank)

    def _fitted(self, draft: Draft, stats: Stats, rank: int) -> Draft:
        """The draft with a branch of this rank."""
        base = replace(draft, down=None, up=None, qweight=None)
        if not rank:
            return base.rounded()
        target = base.target()
        chosen = with_branch(base, *low_rank(target, rank, stats.seed, self.iterations)).rounded()
        if stats.judge is None or not self.rounds:
            return chosen
        least, current = stats.judge.error(chosen), chosen
        for round in range(rounds_for(draft, self.rounds)):
            lost = target - current.qweight.dequantize()
            current = with_branch(base, *low_rank(lost, rank, stats.seed + round + 1, self.iterations)).rounded()
            error = stats.judge.error(current)
            if not error < least:
                break
            chosen, least = current, error
        return chosen


def low_rank(matrix: Tensor, rank: int, seed: int = 0, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """Best rank-R approximation of (N, K) as up (N, R) and down (R, K), by a seeded randomized SVD; singular values split evenly."""
    n, k = matrix.shape
    q = min(rank + 10, n, k)
    if q >= min(n, k):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        y = matrix @ torch.randn(k, q, generator=generator).to(matrix)
        for _ in range(iterations):
            y = matrix @ (matrix.T @ torch.linalg.qr(y).Q)
        basis = torch.linalg.qr(y).Q
        small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ small
    root = s[:rank].clamp_min(0).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def with_branch(draft: Draft, up: Tensor, down: Tensor) -> Draft:
    """The draft with a branch given in the basis of its target: `down` is brought back to the raw basis, both to storage precision."""
    from qgen.kernels.reference import hadamard_blocks

    if draft.hadamard:
        down = hadamard_blocks(down, draft.hadamard)
    down = down[:, : draft.weight.shape[1]]
    if draft.smooth is not None:
        down = down / draft.smooth
    return replace(draft, up=draft.stored(up), down=draft.stored(down), qweight=None)
