r"""Bias correction: the mean error of the output over calibration rows is taken off the bias.

Rounding errors of weights and of skewed activations have a mean, `E[ŷ − y]` per output channel, that one vector removes for free.
Nagel et al., 2019, https://arxiv.org/abs/1906.04721
"""

__all__ = ["BiasCorrection"]

from dataclasses import dataclass, replace
from typing import ClassVar

from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("bias")
@dataclass(frozen=True)
class BiasCorrection:
    """Lowers the output error by its mean; kept only where the error on held-out rows falls. Needs no change at run time but a bias."""

    name: ClassVar[str] = "bias"
    optional: ClassVar[bool] = True

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        draft = replace(draft.rounded(), bias_fix=None)
        x = draft.moved(stats.fit, stats.fit_bins)
        x, xq = (
            x.mean(0),
            draft.inputs(x, bins=stats.fit_bins).mean(0),
        )  # everything after the rounding of inputs is linear
        mean = draft.qweight.dequantize() @ xq - draft.weight @ x
        if draft.up is not None:
            mean = mean + draft.up @ (draft.down @ x)
        if (offset := draft.offset()) is not None:
            mean = mean + offset
        return replace(draft, bias_fix=-mean)
