r"""Bit planes: weights of 8 bits whose first b planes are the same weights in b bits: `planes8_g64` … `planes1_g64`, and `switch`.

    u_b = ⌊2^b · (x / amax + 1) / 2⌋,    x ≈ (2 u_b + 1 - 2^b) / 2^b · amax,    u_b = u_8 >> (8 - b)

The grid has no zero: 2^b cells of equal width cover [-amax, amax], each code stands for the middle of its cell, and dropping the last bit
joins two neighbouring cells. So one stored tensor serves 1 to 8 bits, and fewer bits are read by reading fewer bytes of each row.

Bytes of a row: plane 0 (the most significant bits), plane 1, …, each K / 8 bytes; bit k % 8 of byte k // 8 of a plane belongs to column k.
A value exactly on the border of two cells belongs to the upper one.
Any-Precision LLM, Park et al., 2024, https://arxiv.org/abs/2402.10517
"""

__all__ = ["Planes", "switch"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgen.formats import packing
from qgen.formats.base import Irregular, QTensor, formats, get
from qgen.formats.table import Table


@dataclass(frozen=True)
class Planes(Irregular):
    """Middles of 2^b cells of [-amax, amax], stored plane by plane. scales: amax of each block."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.store(self.blocks(x).abs().amax(-1) * clip), None, None

    def pack(self, codes: Tensor) -> Tensor:
        if codes.shape[-1] % 8:
            raise ValueError(f"{self.name} needs K divisible by 8, found K={codes.shape[-1]}")
        bits = reversed(range(self.bits))
        return torch.cat([packing.pack((codes >> bit) & 1, 1) for bit in bits], -1)

    def unpack(self, packed: Tensor) -> Tensor:
        planes = [packing.unpack(p, 1) for p in packed.unflatten(-1, (self.bits, -1)).unbind(-2)]
        codes = planes[0]
        for plane in planes[1:]:
            codes = (codes << 1) | plane
        return codes

    @property
    def unit(self) -> int:
        return max(self.block or 8, 8)


def switch(q: QTensor, bits: int) -> QTensor:
    """The same weights in fewer bits: a view of the first `bits` planes of q, no number computed.

    Raises ValueError if q is no tensor of bit planes or has fewer.
    """
    fmt = get(q.format)
    if not isinstance(fmt, Planes) or not 1 <= bits <= fmt.bits:
        raise ValueError(
            f"switching to {bits} bits needs at least as many bit planes (planes8_g64, …), found {q.format}"
        )
    name = f"planes{bits}_{q.format.partition('_')[2]}"
    return replace(q, codes=q.codes[..., : q.codes.shape[-1] * bits // fmt.bits], format=name)


def _element(bits: int) -> Table:
    cells = 1 << bits
    return Table(f"cells{bits}", bits, tuple((2 * u + 1 - cells) / cells for u in range(cells)), upward=True)


for _bits in range(1, 9):
    for _block in (64, 128, None):
        _name = f"planes{_bits}_{f'g{_block}' if _block else 'row'}"
        _dtype = torch.bfloat16 if _block else torch.float32
        formats.add(_name, Planes(_name, _element(_bits), _block, _dtype))
