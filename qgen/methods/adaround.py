r"""AdaRound: each weight learns whether to take the grid point below or above it, so that the error of the output is least.

    Q = low + h(a) (high − low),   h(a) = clamp(sigmoid(a / s) (ζ − γ) + γ, 0, 1),   min  L(Q) / L(nearest) + λ Σ (1 − |2h − 1|^β) / numel

with ζ = 1.1, γ = −0.1 and a such that h starts at the exact position of the weight. β falls from 20 to 2 and pushes every h to 0 or 1; the
first fifth of the steps runs without that term. Low and high are neighbours in the grid of any format, so that one method serves integers
and floats. s, the distance of the two in units of weight, makes a step of Adam the same *change of weight* for wide and narrow gaps, and
the rate independent of a layer's size: FP4DiT's scale-aware form. With s = 1 (`scale_aware=False`) one rate hardly moves small weights.
Nagel et al., 2020, https://arxiv.org/abs/2004.10568 · FP4DiT, Chen et al., 2025, https://arxiv.org/abs/2503.15465
"""

__all__ = ["AdaRound"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Stats
from qgen.methods.grid import Grid, adam
from qgen.recipe import methods
from qgen.site import Draft, Site

_GAMMA, _ZETA = -0.1, 1.1


@methods.register("adaround")
@dataclass(frozen=True)
class AdaRound:
    """Lowers the output error over all fitted rows; kept only where it lowers the error on held-out rows. Put it where GPTQ would be.

    steps: of Adam on a. rate: its step in units of the layer's mean gap. weight: λ. warm: share of the steps without the term that decides.
    scale_aware: see above.
    """

    name: ClassVar[str] = "adaround"
    optional: ClassVar[bool] = True
    steps: int = 300
    rate: float = 0.06
    weight: float = 10.0
    warm: float = 0.2
    scale_aware: bool = True

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        grid = Grid.of(draft, stats)
        if grid is None:
            return draft
        rise, undecided = self._learn(grid)
        units = torch.where(rise, grid.high, grid.low)
        return replace(draft, qweight=grid.coded(units)).noted(undecided=f"{undecided:.2%}")

    def _learn(self, grid: Grid) -> tuple[Tensor, float]:
        """Which weights are rounded up (N, Kp), and the share of those whose h was not yet decided when steps ran out."""
        gap = grid.high - grid.low
        free = gap > 0
        reach = gap * grid.step  # ∂Q/∂h
        mean = float(reach[free].mean()) if bool(free.any()) else 1.0
        s = reach.clamp_min(1e-2 * mean) if self.scale_aware else torch.ones_like(reach)
        rest = torch.where(free, (grid.units - grid.low) / gap.clamp_min(1e-12), 0.5).clamp(1e-4, 1 - 1e-4)
        a = s * torch.logit((rest - _GAMMA) / (_ZETA - _GAMMA))
        nearest = max(grid.pull(grid.base.dequantize())[1], 1e-30)
        optimizer = adam(a, self.rate * mean)
        for step in range(self.steps):
            soft = torch.sigmoid(a / s)
            h = (soft * (_ZETA - _GAMMA) + _GAMMA).clamp_(0, 1)
            back, _ = grid.pull(grid.values(grid.low + h * gap))
            grad = back.mul_(reach).mul_(-2 / nearest)
            if step >= self.warm * self.steps:
                done = (step - self.warm * self.steps) / max((1 - self.warm) * self.steps, 1)
                beta, side = 20 - 18 * done, 2 * h - 1
                grad -= self.weight / a.numel() * 2 * beta * side.abs().pow(beta - 1) * side.sign()
            inside = (h > 0) & (h < 1) & free
            grad *= torch.where(inside, soft * (1 - soft) * (_ZETA - _GAMMA) / s, 0.0)
            optimizer.step(a, grad)
        h = (torch.sigmoid(a / s) * (_ZETA - _GAMMA) + _GAMMA).clamp_(0, 1)
        undecided = ((h > 0.05) & (h < 0.95) & free).float().mean()
        return (h >= 0.5) & free, float(undecided)
