r"""Pre-shifted exponent bias: per-channel ranges of activations for nothing, since a power of two only moves an exponent.

    k_c = clamp(round(log2(max|x_c| / ρ)), 0, 2^E − 1),    x Wᵀ = (x 2^−k)(W 2^k)ᵀ

ρ is the range of the quietest channel that counts, E the exponent bits of the activation's element. Channels then look alike to a scale
that a whole row or tensor shares. It is smoothing restricted to powers of two: exact in floating point, where other numbers round twice,
and foldable into a norm's weights bit for bit. A few ρ are tried on held-out rows, no shift among them.
LLM-FP4, Liu et al., 2023, https://arxiv.org/abs/2310.16836
"""

__all__ = ["PreShift", "shifts"]

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Stats
from qgen.methods.smooth import pick
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("preshift")
@dataclass(frozen=True)
class PreShift:
    """Lowers the output error on held-out rows over a few ranges ρ, no shift among them. Stands in the place of `smooth`.

    quantiles: of the channels' largest magnitudes, tried as ρ. bits: E, exponent bits of the element (2 for e2m1).
    """

    name: ClassVar[str] = "preshift"
    quantiles: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    bits: int = 2
    judge_rows: int = 256

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "absmax"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        alive = stats.absmax[stats.absmax > 0]
        if not len(alive):
            return draft
        tried = [torch.exp2(shifts(stats.absmax, float(alive.quantile(q)), self.bits)) for q in self.quantiles]
        return pick(draft, stats, self.judge_rows, [None, *tried])


def shifts(absmax: Tensor, rho: float, bits: int) -> Tensor:
    """k (K,): whole numbers from 0 to 2^bits − 1."""
    return (absmax.clamp_min(1e-30) / rho).log2().round().clamp(0, (1 << bits) - 1)
