r"""Integer formats of 2 to 8 bits: `int4_g64`, `uint4_g128`, `int8_row`, `uint3_g64`, … for blocks along K, rows or the whole tensor.

int4: two's complement nibbles, symmetric, codes -7..7 (as SVDQuant and Nunchaku emit; -8 can be read, never written), scale = amax / 7.
uint4: codes 0..15 with a zero point per block, `x ≈ u · scale + zero`, covering [min, max].
int2 … int8 and uint2 … uint8 follow the same two rules: int of b bits emits -(2^(b-1) - 1) … 2^(b-1) - 1, uint all 2^b codes.
int8_tensor, uint8_tensor, int4_tensor, uint4_tensor: the same scale in every row.
uint4p: codes 0..15 for positive inputs, scale = amax / 15, no zero point: activations after GELU or SiLU, shifted by their minimum.
int4_s8: int4 whose block scales are themselves integers 1..16 times one float32 per row, so that `code · subscale` is an int8 and an
integer GEMM needs no float scale inside its loop.
"""

__all__ = [
    *("INT2", "INT3", "INT4", "INT5", "INT6", "INT7", "INT8"),
    *("UINT2", "UINT3", "UINT4", "UINT5", "UINT6", "UINT7", "UINT8"),
    *("IntSubscale", "Integer", "Tensorwise"),
]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import Element, NumberFormat, formats


@dataclass(frozen=True)
class Integer(Element):
    """Integers in two's complement (or unsigned): the same grid as the table, by arithmetic."""

    def encode(self, x: Tensor) -> Tensor:
        rounded = x.float().nan_to_num(nan=self.max).round_().clamp_(self.min, self.max)
        if not self.signed:
            return rounded.to(torch.uint8)
        return rounded.to(torch.int8).view(torch.uint8).bitwise_and_((1 << self.bits) - 1)

    def round(self, x: Tensor) -> Tensor:
        return x.float().nan_to_num(nan=self.max).round_().clamp_(self.min, self.max)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.signed:
            return codes.to(dtype)
        if self.bits == 8:
            return codes.view(torch.int8).to(dtype)
        sign = 1 << (self.bits - 1)
        return codes.bitwise_xor(sign).view(torch.int8).sub_(sign).to(dtype)


def _integer(bits: int, signed: bool) -> Integer:
    half = 1 << (bits - 1) if signed else 1 << bits
    values = [float(c if c < half else c - 2 * half) for c in range(1 << bits)]
    if signed:
        values[half] = float("nan")  # -2^(b-1) can be read but is never emitted, which keeps the grid symmetric
    return Integer(f"{'int' if signed else 'uint'}{bits}", bits, tuple(values))


INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (_integer(bits, True) for bits in range(2, 9))
UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (_integer(bits, False) for bits in range(2, 9))
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class IntSubscale(NumberFormat):
    """int4 codes, integer sub-scale 1..16 per block (uint8), one float32 per row: |code · subscale| <= 112 fits an int8.

    Each block takes the neighbour of its ideal sub-scale that leaves the smaller squared error.
    """

    levels: int = 16

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        blocks = self.blocks(x)
        ideal = blocks.abs().amax(-1) * clip / self.element.max  # (…, G)
        row = ideal.amax(-1, keepdim=True) / self.levels
        ratio = torch.where(row > 0, ideal / row, 1.0)
        candidates = [ratio.floor().clamp(1, self.levels), (ratio - 1e-4).ceil().clamp(1, self.levels)]
        down, up = ((self._round(blocks, sub * row) - blocks).square().sum(-1) for sub in candidates)
        return torch.where(down < up, *candidates).to(torch.uint8), row, None

    def _round(self, blocks: Tensor, step: Tensor) -> Tensor:
        step = step[..., None]
        return torch.where(step > 0, blocks / step, 0.0).round_().clamp_(-self.element.max, self.element.max) * step

    def bits_per_value(self, k: int) -> float:
        return self.bits + 8 / (self.block or k) + 32 / k


@dataclass(frozen=True)
class Tensorwise(NumberFormat):
    """One scale, and for unsigned codes one zero, for the whole tensor, repeated in every row. clip: a number, or its largest counts."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        clip = clip.amax() if isinstance(clip, Tensor) else clip
        scales, _, zero = super().ranges(x.reshape(1, -1), clip)
        rows = (*x.shape[:-1], 1)
        return scales.expand(rows).contiguous(), None, None if zero is None else zero.expand(rows).contiguous()


def _register() -> None:
    for element in (INT2, INT3, INT4, INT5, INT6, INT7, INT8, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8):
        zero = not element.signed
        for block in (*BLOCKS, None) if element.bits in (4, 8) else (32, 64, 128, None):
            name = f"{element.name}_{f'g{block}' if block else 'row'}"
            dtype = torch.bfloat16 if block else torch.float32  # one scale per row costs nothing
            formats.add(name, NumberFormat(name, element, block, dtype, zero_point=zero))
        if element.bits in (4, 8):
            name = f"{element.name}_tensor"
            formats.add(name, Tensorwise(name, element, None, torch.float32, zero_point=zero))
    for block in BLOCKS:
        name = f"uint4p_g{block}"
        formats.add(name, NumberFormat(name, UINT4, block))
    for block in (32, 64, 128):
        name = f"int4_s8_g{block}"
        formats.add(name, IntSubscale(name, INT4, block, torch.uint8, "row"))


_register()
