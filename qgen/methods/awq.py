"""AWQ's scaling for weight-only layers: salient input channels get a finer grid because their weights are scaled up before rounding.

`s_j = mean|x_j|^α`, normalized to a geometric mean of 1; each α is scored by the error of the layer's output, as in `smooth`.
Lin et al., 2023, https://arxiv.org/abs/2306.00978
"""

__all__ = ["AWQ"]

from dataclasses import dataclass
from typing import ClassVar

import torch

from qgen.methods.base import Stats
from qgen.methods.smooth import factors, pick
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("awq")
@dataclass(frozen=True)
class AWQ:
    """Lowers the output error on held-out rows over a grid of exponents α; no scaling is among the candidates."""

    name: ClassVar[str] = "awq"
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    judge_rows: int = 256

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "absmax"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        one = torch.ones_like(stats.absmean)
        return pick(draft, stats, self.judge_rows, [None, *(factors(stats.absmean, one, a, 0.0) for a in self.alphas)])
