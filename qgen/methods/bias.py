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
        draft = draft.rounded()
        plain = draft.output(stats.fit) if draft.bias is None else draft.output(stats.fit) - draft.bias
        mean = (plain - stats.fit @ draft.weight.T).mean(0)
        return replace(draft, bias_fix=-mean)
