r"""Clipping: shrink each block's range where saturating a few weights costs less than coarse steps for all.

For every block of the target and every factor c of a grid, the cost is Σ_k h_k (w_k − Q_c(w)_k)², h = the diagonal of H: the output error
if columns were independent. Each block takes its cheapest factor; the result stays only where the held-out output error falls.
As in AWQ's weight clipping, Lin et al., 2023, https://arxiv.org/abs/2306.00978
"""

__all__ = ["Clip"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qgen import formats
from qgen.methods.base import Stats
from qgen.methods.gptq import hessian
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("clip")
@dataclass(frozen=True)
class Clip:
    """Lowers the diagonal approximation of the output error, per block of weights. Put it before methods that round."""

    name: ClassVar[str] = "clip"
    optional: ClassVar[bool] = True
    factors: tuple[float, ...] = (0.75, 0.8, 0.85, 0.9, 0.95)

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt, target = formats.get(draft.spec.weight), draft.target()
        h = hessian(draft, stats).diagonal()
        clip, least = None, None
        for factor in (1.0, *self.factors):
            cost = fmt.blocks((fmt.fake(target, factor) - target).square() * h).sum(-1)  # (N, Kp / block)
            if least is None:
                clip, least = torch.ones_like(cost), cost
                continue
            clip = torch.where(cost < least, factor, clip)
            least = torch.minimum(cost, least)
        return replace(draft, clip=clip, qweight=None)
