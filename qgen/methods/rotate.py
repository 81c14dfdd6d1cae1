r"""Rotation: a block Hadamard transform of inputs and weights, `x Wᵀ = (x H)(W H)ᵀ`; after smoothing, both kinds of balancing.

Smoothing evens out channels that are *always* large; a spike that appears in one token or at one step is in nobody's maximum and stays. A
rotation spreads whatever is large over its block, and leaves what smoothing has evened out as it is. So ViDiT-Q does both,

    x' = (x / s) D H,    W' = (W s) D H,    D = random signs

With D folded into s no slot and no instruction is added for it.
Zhao et al., 2024, https://arxiv.org/abs/2406.02540 · rotations of activations: QuaRot, Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456
"""

__all__ = ["Rotate"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("rotate")
@dataclass(frozen=True)
class Rotate:
    """Spreads outliers over blocks of `size` inputs; kept only where the error on held-out rows falls. Put it after smoothing.

    size: power of two, halved until padding stays below an eighth of K. signs: multiply smoothing by random signs, seeded by the layer.
    """

    name: ClassVar[str] = "rotate"
    of_inputs: ClassVar[bool] = True
    optional: ClassVar[bool] = True
    size: int = 128
    signs: bool = True

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        if self.size < 2 or self.size & (self.size - 1):
            raise ValueError(f"rotate needs a size that is a power of two, found {self.size}")
        k, size = draft.weight.shape[1], self.size
        while size > 2 and -(-k // size) * size - k > k // 8:
            size //= 2
        smooth = draft.smooth
        if self.signs:
            drawn = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(stats.seed)).to(draft.weight)
            smooth = (2 * drawn - 1) * (1.0 if smooth is None else smooth)
        return replace(draft, hadamard=size, smooth=smooth, down=None, up=None, qweight=None)
