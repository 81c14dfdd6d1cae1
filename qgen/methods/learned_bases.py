r"""Learnable multi-basis binarizer: the scales of binary planes, learned on the error of the output.

    ŵ = Σ_i s_i b_i,  b_i ∈ {−1, +1}        min over s  L(Ŵ) / L(start),    ∂L/∂s_i = −2 Σ_block (E H) b_i

Residual means are the best scales for the weights of a block taken alone; for the output, blocks make up for each other. Scales learn as
logarithms, so that they stay above zero, and the planes are taken anew from the nearest of the values every few steps. The best state is
kept, of which the start is one. For the formats of `qgen.formats.multibasis`; others pass.
BinaryDM, Zheng et al., 2024, https://arxiv.org/abs/2404.05662
"""

__all__ = ["LearnedBases"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.formats.multibasis import MultiBasis
from qgen.methods.base import Stats
from qgen.methods.gptq import hessian
from qgen.methods.grid import adam
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("learned-bases")
@dataclass(frozen=True)
class LearnedBases:
    """Lowers the output error over all fitted rows; kept only where it lowers the error on held-out rows.

    steps: of Adam on log s. rate: its step. anew: steps between two choices of the planes.
    """

    name: ClassVar[str] = "learned-bases"
    optional: ClassVar[bool] = True
    steps: int = 100
    rate: float = 0.02
    anew: int = 5

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt = formats.get(draft.spec.weight)
        if not isinstance(fmt, MultiBasis):
            return draft
        code, gain = self._learn(fmt, draft.target(), hessian(draft, stats), draft.clip)
        return replace(draft, qweight=code).noted(error_left=f"{gain:.3f}")

    def _learn(self, fmt: MultiBasis, target: Tensor, gram: Tensor, clip: Tensor | float) -> tuple[QTensor, float]:
        """The learned tensor, and the share of the fitted error that is left."""
        start = fmt.quantize(target, clip)
        logs = torch.stack([s.squeeze(-1) for s in fmt.each(start.scales, start.zero)], -1).clamp_min(1e-12).log()
        optimizer = adam(logs, self.rate)
        codes = best = None
        first = least = torch.inf
        for step in range(self.steps + 1):
            scales = logs.exp()  # (N, G, bases)
            if codes is None or step % self.anew == 0 or step == self.steps:
                codes = _nearest(fmt.blocks(target), scales)
            stored = self._stored(fmt, scales)
            made = fmt.decode(codes.flatten(-2), *stored)
            error = target - made
            back = error @ gram
            loss = float((back * error).sum())
            first = min(first, max(loss, 1e-30)) if step == 0 else first
            if loss < least:
                least, best = loss, QTensor(fmt.pack(codes.flatten(-2)), *stored, fmt.name)
            planes = torch.stack([((codes >> i) & 1).float() * 2 - 1 for i in range(fmt.bits)], -1)
            grad = -2 * (fmt.blocks(back)[..., None] * planes).sum(-2) * scales / first
            optimizer.step(logs, grad)
        return best, least / first

    @staticmethod
    def _stored(fmt: MultiBasis, scales: Tensor) -> tuple[Tensor, None, Tensor]:
        parts = [fmt.store(s) for s in scales.unbind(-1)]
        return parts[0], None, torch.stack(parts[1:], -1).flatten(-2)


def _nearest(blocks: Tensor, scales: Tensor) -> Tensor:
    """Codes uint8 of blocks (N, G, block): the sum of ± scales (N, G, bases) that lies nearest."""
    count = 1 << scales.shape[-1]
    signs = torch.tensor([[1.0 if c >> i & 1 else -1.0 for i in range(scales.shape[-1])] for c in range(count)]).to(
        scales
    )
    values = scales @ signs.T  # (N, G, 2^bases)
    best, least = torch.zeros_like(blocks, dtype=torch.uint8), torch.full_like(blocks, torch.inf)
    for code in range(count):
        far = (blocks - values[..., code, None]).abs()
        best, least = torch.where(far < least, code, best).to(torch.uint8), torch.minimum(far, least)
    return best
