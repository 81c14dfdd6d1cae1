r"""Sums of binary bases: `binary2_row`, `binary3_row`, and `binary2_g64`, …: each sign plane has a scale of its own.

    x ≈ s₁ b₁ + s₂ b₂ + …,    b_i ∈ {−1, +1},    b_i = sign(rest before it),    s_i = mean |rest before it|

Two bases are a 2-bit code whose four values are not equally spaced, and which follow each block: with s₁ > s₂ every value is reached by its
nearest code. Of Gaussian weights one basis leaves 1 − 2 / π = 0.363 of the energy, two leave 0.131, three 0.05. sign(0) is +1.
Bit i of a code is basis i. scales: s₁ (N, G); further ones are in `zero` (N, G · (bases − 1)), a block's side by side.
BinaryDM's learnable multi-basis binarizer, Zheng et al., 2024, https://arxiv.org/abs/2404.05662 · Guo et al., 2017, https://arxiv.org/abs/1706.02021
"""

__all__ = ["MultiBasis"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import Irregular, formats
from qgen.formats.integer import UINT2, UINT3


@dataclass(frozen=True)
class MultiBasis(Irregular):
    """As many bases as the element has bits."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """clip is a factor on every scale."""
        rest, scales = self.blocks(x), []
        for _ in range(self.bits):
            scales.append(self.store(rest.abs().double().mean(-1).float() * clip))
            rest = rest - signs(rest) * scales[-1].float()[..., None]
        return scales[0], None, torch.stack(scales[1:], -1).flatten(-2)

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        rest, codes = self.blocks(x), torch.zeros_like(self.blocks(x), dtype=torch.uint8)
        for i, s in enumerate(self.each(scales, zero)):
            b = signs(rest)
            codes |= (b > 0).to(torch.uint8) << i
            rest = rest - b * s
        return codes.flatten(-2)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        blocks = self.blocks(codes)
        return sum((((blocks >> i) & 1).float() * 2 - 1) * s for i, s in enumerate(self.each(scales, zero))).flatten(-2)

    def each(self, scales: Tensor, zero: Tensor) -> list[Tensor]:
        """The scale of each basis, (…, G, 1) float32."""
        return [scales.float()[..., None], *zero.float().unflatten(-1, (-1, self.bits - 1)).split(1, -1)]

    def bits_per_value(self, k: int) -> float:
        width = 8 * torch.empty(0, dtype=self.scale_dtype).element_size()
        return self.bits * (1 + width / (self.block or k))

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        extra = k // (self.block or k) * (self.bits - 1)
        return super().shapes(n, k) | {"zero": ((n, extra), self.scale_dtype)}


def signs(x: Tensor) -> Tensor:
    """±1, of 0 +1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


for _element in (UINT2, UINT3):
    for _block in (64, 128, None):
        _name = f"binary{_element.bits}_{f'g{_block}' if _block else 'row'}"
        formats.add(_name, MultiBasis(_name, _element, _block, torch.bfloat16 if _block else torch.float32))
