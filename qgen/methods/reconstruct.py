r"""Fits the low-rank branch to what rounding lost *at the output*, and rounds again: a few rounds of alternation.

Given the rounded weight Q, the best rank-R correction of the output is the truncated SVD of (Ŵ − Q) S with S Sᵀ = H, taken back by S⁻¹:
the error is weighted by the inputs that really occur, where plain SVD weighs all directions alike. Rounding the new residual by GPTQ and
fitting again lowers both parts of the error in turn. H is damped; the number of rounds is chosen on held-out rows.
The whitened SVD is QERA-exact, Zhang et al., 2024, https://arxiv.org/abs/2410.06040
"""

__all__ = ["Reconstruct"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qgen.methods.base import Stats, rounds_for
from qgen.methods.gptq import GPTQ, factor
from qgen.methods.lowrank import low_rank, with_branch
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("reconstruct")
@dataclass(frozen=True)
class Reconstruct:
    """Lowers the output error on held-out rows by refitting the branch that `lowrank` made. Does nothing without a branch.

    damp: fraction of the mean diagonal of H, unless GPTQ before it has found one. rounds: alternations at most, one in layers of more than
    a million weights; the first that does not help on held-out rows is dropped and ends them.
    """

    name: ClassVar[str] = "reconstruct"
    optional: ClassVar[bool] = True
    damp: float = 0.1
    rounds: int = 2

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        if draft.up is None:
            return draft
        rank, damp = draft.up.shape[1], draft.log.get("damp", self.damp)
        whole = replace(draft, up=None, down=None).target()
        chosen, least = draft.rounded(), stats.judge.error(draft)
        root = factor(draft, stats, damp)  # S = L, in the order of the factor's columns
        current = chosen
        for round in range(rounds_for(draft, self.rounds)):
            lost = (whole - current.qweight.dequantize())[:, root.order] @ root.lower
            up, down = low_rank(lost, rank, stats.seed + round)
            fitted = torch.empty_like(down)
            fitted[:, root.order] = torch.linalg.solve_triangular(root.lower, down, upper=False, left=False)
            current = GPTQ(damps=(damp,)).refine(with_branch(draft, up, fitted), stats)
            error = stats.judge.error(current)
            if not error < least:
                break
            chosen, least = current.noted(reconstruct_rounds=round + 1), error
        return chosen
