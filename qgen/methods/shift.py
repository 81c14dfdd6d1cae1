r"""Unsigned activations: after GELU or SiLU inputs are bounded below, so a shift by that bound lets codes be 0..15 and not −7..7.

`Q(x + c) Wᵀ − c Σ_k W_k = x Wᵀ`: the constant folds into the bias; the low-rank branch sees the unshifted x. The spec's activation format
must be unsigned without zero points (uint4p_*). Bounds: GELU 0.171875, SiLU 0.2734375, as SVDQuant and its checkpoints use.
Li et al., 2024, https://arxiv.org/abs/2411.05007
"""

__all__ = ["BOUNDS", "Shift"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qgen import formats
from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site

BOUNDS = {
    "GELU": 0.171875,
    "SiLU": 0.2734375,
}  # gated ones (GEGLU, SwiGLU) have no bound: their fitted minimum is taken


@methods.register("shift")
@dataclass(frozen=True)
class Shift:
    """Makes inputs non-negative: by the bound of the activation function that made them, else by their smallest fitted value.

    Lowers the activation rounding error of one-sided inputs by up to 6 dB: sixteen levels cover what eight covered.
    """

    name: ClassVar[str] = "shift"
    of_inputs: ClassVar[bool] = True

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt = formats.get(draft.act) if draft.act else None
        if fmt is None or fmt.element.signed or fmt.zero_point:
            raise ValueError(
                f"shift needs an unsigned activation format without zero points (uint4p_g64), found {draft.act or 'float'}"
            )
        bound = BOUNDS.get(draft.sites[0].after)
        if bound is None:
            bound = max(0.0, -float(stats.fit.min()))
        return replace(draft, shift=draft.stored(torch.tensor(bound)), qweight=None)
