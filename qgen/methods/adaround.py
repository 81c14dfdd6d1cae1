r"""AdaRound: each weight learns whether to take the grid point below or above it, so that the error of the output is least.

    Q = low + h(a) (high − low),   h(a) = clamp(sigmoid(a / s) (ζ − γ) + γ, 0, 1),   min  L(Q) / L(nearest) + λ Σ (1 − |2h − 1|^β) / numel

with ζ = 1.1, γ = −0.1 and a such that h starts at the exact position of the weight. β falls from 20 to 2 and pushes every h to 0 or 1; the
first fifth of the steps runs without that term. Low and high are neighbours in the grid of any format, so that one method serves integers
and floats. s, the distance of the two in units of weight, makes a step of Adam the same *change of weight* for wide and narrow gaps, and
the rate independent of a layer's size: FP4DiT's scale-aware form. With s = 1 (`scale_aware=False`) one rate hardly moves small weights.

With `step_rate` > 0 a factor on each block's step is learned together with the roundings, as in Genie: a block whose weights all want to be
a little smaller need not round them all down. It takes formats whose scales are floats; of others the steps stay.
Nagel et al., 2020, https://arxiv.org/abs/2004.10568 · FP4DiT, Chen et al., 2025, https://arxiv.org/abs/2503.15465
Genie, Jeon et al., 2023, https://arxiv.org/abs/2212.04780
"""

__all__ = ["AdaRound"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.methods.base import Stats
from qgen.methods.grid import Grid, adam
from qgen.methods.rectified import GAMMA, ZETA, beta, place, rectified
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("adaround")
@dataclass(frozen=True)
class AdaRound:
    """Lowers the output error over all fitted rows; kept only where it lowers the error on held-out rows. Put it where GPTQ would be.

    steps: of Adam on a. rate: its step in units of the layer's mean gap. weight: λ. warm: share of the steps without the term that decides.
    scale_aware: see above. step_rate: of Adam on the logarithm of the steps' factors; 0 leaves steps alone.
    """

    name: ClassVar[str] = "adaround"
    optional: ClassVar[bool] = True
    steps: int = 300
    rate: float = 0.06
    weight: float = 10.0
    warm: float = 0.2
    scale_aware: bool = True
    step_rate: float = 0.0

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        grid = Grid.of(draft, stats)
        if grid is None:
            return draft
        rise, factor, undecided = self._learn(grid)
        made = grid.coded(torch.where(rise, grid.high, grid.low))
        if factor is not None:
            made = replace(made, scales=grid.fmt.store(made.scales.float() * factor))
        return replace(draft, qweight=made).noted(undecided=f"{undecided:.2%}")

    def _learn(self, grid: Grid) -> tuple[Tensor, Tensor | None, float]:
        """Which weights are rounded up (N, Kp), factors of the steps (N, Kp / block) or None, and the share of weights whose h was not yet
        decided when steps ran out."""
        gap = grid.high - grid.low
        free = gap > 0
        reach = gap * grid.step  # ∂Q/∂h
        mean = float(reach[free].mean()) if bool(free.any()) else 1.0
        s = reach.clamp_min(1e-2 * mean) if self.scale_aware else torch.ones_like(reach)
        rest = torch.where(free, (grid.units - grid.low) / gap.clamp_min(1e-12), 0.5).clamp(1e-4, 1 - 1e-4)
        a = s * place(rest)
        nearest = max(grid.pull(grid.base.dequantize())[1], 1e-30)
        optimizer = adam(a, self.rate * mean)
        learn_steps = (
            self.step_rate > 0 and grid.base.scales.is_floating_point() and grid.base.scales.element_size() > 1
        )
        logs = torch.zeros_like(grid.base.scales, dtype=torch.float32)
        stretch = adam(logs, self.step_rate)
        for step in range(self.steps):
            soft = torch.sigmoid(a / s)
            h = (soft * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
            units, factor = grid.low + h * gap, 1.0
            if learn_steps:
                factor = logs.exp()[..., None].expand(grid.fmt.blocks(units).shape).flatten(-2)
            scaled = units * grid.step * factor
            back, _ = grid.pull(grid.values(units) - units * grid.step + scaled if learn_steps else grid.values(units))
            if learn_steps:
                stretch.step(logs, grid.fmt.blocks(back * scaled).sum(-1) * (-2 / nearest))
            grad = back.mul_(reach * factor).mul_(-2 / nearest)
            if (b := beta(step / self.steps, self.warm)) is not None:
                side = 2 * h - 1
                grad -= self.weight / a.numel() * 2 * b * side.abs().pow(b - 1) * side.sign()
            inside = (h > 0) & (h < 1) & free
            grad *= torch.where(inside, soft * (1 - soft) * (ZETA - GAMMA) / s, 0.0)
            optimizer.step(a, grad)
        h = rectified(a / s)
        undecided = ((h > 0.05) & (h < 0.95) & free).float().mean()
        return (h >= 0.5) & free, logs.exp() if learn_steps else None, float(undecided)
