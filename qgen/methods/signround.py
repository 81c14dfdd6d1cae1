r"""SignRound: offsets of the rounding and clipping factors, learned together by the sign of their gradients.

    Q = s(c) round(W / s(c) + V),    V ∈ [−½, ½],    c ∈ [least, 1]

V shifts a weight to its other neighbour, c narrows the range of its block. With rounding passed straight through, ∂L/∂V = −2 s (E H) and
∂L/∂c = −2 Σ_block (E H) s₀ (q − W / s). Signs make the step size a plain length: `1 / steps`, falling to 0, is just enough to take V
from 0 to ±½. A factor moves all weights of its block at once and goes at 0.3 of that speed; at full speed FP4 and zero points gain less.
The best step is kept, of which step 0 is rounding to nearest; so the fitted loss never rises.
Cheng et al., 2023, https://arxiv.org/abs/2309.05516
"""

__all__ = ["SignRound"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import NumberFormat, QTensor
from qgen.methods.base import Stats
from qgen.methods.gptq import hessian
from qgen.recipe import methods
from qgen.site import Draft, Site

_CLIP = 0.3


@methods.register("signround")
@dataclass(frozen=True)
class SignRound:
    """Lowers the output error over all fitted rows; kept only where it lowers the error on held-out rows. Put it where GPTQ would be.

    steps: of sign descent. least: the smallest clipping factor; 1 leaves ranges alone.
    """

    name: ClassVar[str] = "signround"
    optional: ClassVar[bool] = True
    steps: int = 200
    least: float = 0.6

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt = formats.get(draft.spec.weight)
        if not fmt.plain:
            return draft
        code, clip = self._learn(draft.target(), hessian(draft, stats), fmt, draft.clip)
        return replace(draft, qweight=code).noted(clip=f"{float(clip.mean()):.3f}")

    def _learn(self, target: Tensor, gram: Tensor, fmt: NumberFormat, clip: Tensor | float) -> tuple[QTensor, Tensor]:
        start = torch.as_tensor(clip, device=target.device).float()
        factor = torch.ones_like(fmt.blocks(target)[..., 0]) * start
        offset = torch.zeros_like(target)
        best, least, kept = None, torch.inf, factor
        for step in range(self.steps + 1):
            ranges = fmt.ranges(target, factor)
            units = fmt.normalize(target, *ranges)
            q = fmt.element.round(units + offset)
            error = target - fmt.scaled(q, *ranges)
            back = error @ gram
            if (loss := float((back * error).sum())) < least:
                least, kept = loss, factor.clone()
                best = QTensor(fmt.pack(fmt.element.encode(q)), *ranges, fmt.name)
            rate = (1 - step / self.steps) / self.steps
            offset.add_(back.sign(), alpha=rate).clamp_(-0.5, 0.5)
            if self.least < 1:
                pull = fmt.blocks(back * (q - units)).sum(-1)
                factor = (factor + _CLIP * rate * pull.sign()).clamp(self.least, 1.0).minimum(start)
        return best, kept
