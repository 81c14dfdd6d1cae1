r"""FP6 in the 4+2 layout: `fp6_42_row`, e3m2 codes whose low four and high two bits lie in two segments of the row.

A 6-bit code straddles bytes; a nibble and a pair of bits do not. Bytes of a row: K / 2 with the low nibbles (mantissa and the lowest
exponent bits; even column in the low half), then K / 4 with the high pairs (sign and top exponent bit; column k in bits 2 (k % 4) of byte
k // 4). Values, scales (float32 per row) and rounding are those of `fp6_e3m2_row`.

FP6-LLM goes on to order both segments for the fragments of its kernel; that is a layout of a kernel and not of a file.
FP6-LLM, Xia et al., 2024, https://arxiv.org/abs/2401.14112 · ZeroQuant(4+2), Wu et al., 2023, https://arxiv.org/abs/2312.08583
"""

__all__ = ["FP6Planes"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats import packing
from qgen.formats.base import Irregular, formats
from qgen.formats.minifloat import E3M2


@dataclass(frozen=True)
class FP6Planes(Irregular):
    """Six-bit codes as a nibble segment and a two-bit segment."""

    def pack(self, codes: Tensor) -> Tensor:
        if codes.shape[-1] % 4:
            raise ValueError(f"{self.name} needs K divisible by 4, found K={codes.shape[-1]}")
        return torch.cat([packing.pack(codes & 15, 4), packing.pack(codes >> 4, 2)], -1)

    def unpack(self, packed: Tensor) -> Tensor:
        nibbles = packed.shape[-1] // 3 * 2
        return packing.unpack(packed[..., :nibbles], 4) | (packing.unpack(packed[..., nibbles:], 2) << 4)


formats.add("fp6_42_row", FP6Planes("fp6_42_row", E3M2, None, torch.float32))
