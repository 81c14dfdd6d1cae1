r"""Fits the low-rank branch to what rounding lost *at the output*, and rounds again: a few rounds of alternation.

Given the rounded weight Q, the best rank-R correction of the output is the truncated SVD of (Ŵ − Q) S with S Sᵀ = H, taken back by S⁻¹:
the error is weighted by the inputs that really occur, where plain SVD weighs all directions alike. Rounding the new residual by GPTQ and
fitting again lowers both parts of the error in turn. H is damped; damping and number of rounds are chosen on held-out rows.
The whitened SVD is QERA-exact, Zhang et al., 2024, https://arxiv.org/abs/2410.06040
"""

__all__ = ["Reconstruct"]

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Stats
from qgen.methods.gptq import GPTQ, hessian
from qgen.methods.lowrank import low_rank, with_branch
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("reconstruct")
@dataclass(frozen=True)
class Reconstruct:
    """Lowers the output error on held-out rows by refitting the branch that `lowrank` made. Does nothing without a branch.

    damps: candidates, as fractions of the mean diagonal of H. rounds: alternations at most, for each damping.
    """

    name: ClassVar[str] = "reconstruct"
    optional: ClassVar[bool] = True
    damps: tuple[float, ...] = (0.03, 0.3)
    rounds: int = 3

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        if draft.up is None:
            return draft
        rank, h = draft.up.shape[1], hessian(draft, stats)
        chosen, least = draft, draft.error(stats.judge)
        for damp in self.damps:
            root, inverse = _roots(h, damp)
            current = draft.rounded()
            for round in range(self.rounds):
                current = self._round(current, stats, rank, (root, inverse), damp, round)
                error = current.error(stats.judge)
                if not error < least:
                    break
                chosen, least = current.noted(reconstruct_damp=damp, reconstruct_rounds=round + 1), error
        return chosen

    def _round(self, draft: Draft, stats: Stats, rank: int, roots: tuple[Tensor, Tensor], damp: float, round: int) -> Draft:
        root, inverse = roots
        whole = with_branch(draft, torch.zeros_like(draft.up), torch.zeros(rank, draft.k_padded, device=draft.up.device)).target()
        lost = whole - draft.qweight.dequantize()
        up, down = low_rank(lost @ root, rank, stats.seed + round)
        fitted = with_branch(draft, up, down @ inverse)
        return GPTQ(damps=(damp,)).refine(fitted, stats)


def _roots(h: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of the damped H and its inverse, (K, K)."""
    values, vectors = torch.linalg.eigh(h)
    values = (values + damp * h.diagonal().mean()).clamp_min(1e-12 * values[-1].clamp_min(1e-30)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
