r"""Smoothing: move outliers between activations and weights, `s_j = max|x_j|^α / max|w_j|^β`, `x Wᵀ = (x / s)(W s)ᵀ`.

Each (α, β) is scored by the error of the layer's output, with the low-rank branch, rounding and quantized activations inside the loop;
(0, 0), no smoothing, is always among the candidates, so that smoothing never hurts on the rows that judge it.
Xiao et al., 2022, https://arxiv.org/abs/2211.10438 · candidates as in SVDQuant, https://arxiv.org/abs/2411.05007
"""

__all__ = ["Smooth", "factors", "pick"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Judge, Stats, best
from qgen.methods.lowrank import LowRank
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("smooth")
@dataclass(frozen=True)
class Smooth:
    """Lowers the output error on held-out rows over a grid of exponents.

    alphas: exponents α of the activations; each is tried with β = 0 and β = 1 − α. judge_rows: at most so many rows score a candidate.
    """

    name: ClassVar[str] = "smooth"
    of_inputs: ClassVar[bool] = True
    alphas: tuple[float, ...] = (0.3, 0.5, 0.7)
    judge_rows: int = 256

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "absmax"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        wmax = draft.weight.abs().amax(0)
        pairs = [(a, b) for a in self.alphas for b in (0.0, 1 - a)]
        return pick(draft, stats, self.judge_rows, [None, *(factors(stats.absmax, wmax, a, b) for a, b in pairs)])


def factors(x: Tensor, w: Tensor, alpha: float, beta: float) -> Tensor:
    """`x^α / w^β` per channel (K,), geometric mean 1; dead channels get 1, and a vector that is not finite is all ones."""
    alive = (x > 0) & (w > 0)
    s = torch.where(alive, x.clamp_min(1e-30) ** alpha / w.clamp_min(1e-30) ** beta, 1.0)
    s = torch.where(alive, s / s[alive].log().mean().exp() if alive.any() else s, 1.0)
    s = s.clamp(1e-4, 1e4)
    return s if bool(torch.isfinite(s).all()) else torch.ones_like(s)


def pick(draft: Draft, stats: Stats, rows: int, candidates: list[Tensor | None]) -> Draft:
    """The draft with the best candidate smoothing (None = none) on the judge's rows, the recipe's own low-rank step inside."""
    branch = next(
        (replace(m, rounds=0, iterations=1, smaller=()) for m in draft.spec.methods if isinstance(m, LowRank)), None
    )
    judge = Judge(stats.judge.rows[:rows])

    def scored(smooth: Tensor | None) -> Draft:
        trial = replace(draft, smooth=None if smooth is None else draft.stored(smooth), qweight=None)
        return trial if branch is None else branch.refine(trial, stats)

    chosen = best(map(scored, candidates), judge)
    return replace(chosen, down=None, up=None, qweight=None)
