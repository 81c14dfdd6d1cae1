r"""Formats that exist because other projects' files hold them: their scales in the dtype of the file, so that no bit of a number changes.

    int4_g32_f16, uint4_g128_f32, …   a format of `integer.py`, its scales (and zeros) in float16 or float32
    uint4z_g128, …_f16, …_f32         x = (u - z) · scale with a whole zero point z, as GPTQ, AWQ and compressed-tensors have it
    int4o_g128, …_f16                 x = q · scale + zero with signed codes, as torchao has it

GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323 · AWQ: Lin et al., 2023, https://arxiv.org/abs/2306.00978
"""

__all__ = ["WholeZero"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats import integer
from qgen.formats.base import NumberFormat, QTensor, formats

BLOCKS = (16, 32, 64, 128, 256)
_HALF, _FLOAT = ("_f16", torch.float16), ("_f32", torch.float32)


@dataclass(frozen=True)
class WholeZero(NumberFormat):
    """Unsigned codes with a whole zero point: x = (u - zero) · scale, zero one of the codes, stored as a float.

    The range is widened to contain 0, so that 0 is exact: scale = (max - min) / levels, zero = round(-min / scale).
    """

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        blocks = self.blocks(x)
        low, high = blocks.amin(-1).clamp(max=0) * clip, blocks.amax(-1).clamp(min=0) * clip
        scales = self.store((high - low) / (self.element.max - self.element.min))
        step = scales.float()
        zero = torch.where(step > 0, -low / step, 0.0).round().clamp(self.element.min, self.element.max)
        return scales, None, zero.to(self.scale_dtype)

    def normalize(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        steps = super().normalize(x, scales, global_scale, None, reciprocal)
        return (self.blocks(steps) + zero.float()[..., None]).flatten(-2)

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (…, K). Overridden so that kernels which compute `code · scale + zero` themselves leave this format alone."""
        return super().dequantize(q, dtype)

    def scaled(self, values: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        steps = self.blocks(values) - zero.float()[..., None]
        return (steps * self.step(scales, global_scale)[..., None]).flatten(-2)


def _register() -> None:
    for element in _elements():
        for block in BLOCKS:
            name = f"{element.name}_g{block}"
            for suffix, dtype in (_HALF, _FLOAT):
                formats.add(
                    name + suffix, NumberFormat(name + suffix, element, block, dtype, zero_point=not element.signed)
                )
            name = f"{element.name}{'o' if element.signed else 'z'}_g{block}"
            kind = NumberFormat if element.signed else WholeZero
            for suffix, dtype in (("", torch.bfloat16), _HALF, _FLOAT):
                formats.add(name + suffix, kind(name + suffix, element, block, dtype, zero_point=True))
        if not element.signed:
            name = f"{element.name}z_row"
            formats.add(name, WholeZero(name, element, None, torch.float32, zero_point=True))


def _elements() -> list[integer.Integer]:
    """The integers of `integer.py`, whatever their width."""
    found = {e.name: e for e in vars(integer).values() if isinstance(e, integer.Integer)}
    return [found[name] for name in sorted(found)]


_register()
