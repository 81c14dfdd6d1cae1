r"""BitMoD: every group of weights chooses one of four tables, by putting the useless code of -0 to use: `bitmod4_g128`, `bitmod3_g128`.

A sign-magnitude float has two zeros. The second one becomes a special value, chosen per group:

    4 bits: ± 0 .5 1 1.5 2 3 4 6  and one of +5, -5 (finer near the top), +8, -8 (one side reaches further)
    3 bits: ± 0 1 2 4             and one of +3, -3, +6, -6

    x ≈ table[choice][code] · scale,    scale = amax / max|table|,    choice: least squared error of the group

`zero` holds the choices, 2 bits each, four in a byte: (N, ⌈G / 4⌉) uint8. Scales are bfloat16. 4.14 bits per weight in groups of 128.
Of two equally near values the lower is taken.
BitMoD, Chen et al., 2024, https://arxiv.org/abs/2411.11745 · https://github.com/abdelfattah-lab/BitMoD-HPCA-25
"""

__all__ = ["BitMoD"]

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qgen.formats import packing
from qgen.formats.base import Irregular, formats
from qgen.formats.table import Table


@dataclass(frozen=True)
class BitMoD(Irregular):
    """Codes of `tables[choice]`, scales (…, G), zero (…, ⌈G / 4⌉) uint8 with the choices. `element` is the first table."""

    tables: tuple[Table, ...] = ()

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        amax = self.blocks(x).abs().amax(-1) * clip
        scales = [self.store(amax / max(abs(v) for v in table.values)) for table in self.tables]
        values = [self.scaled(t.round(self.normalize(x, s, None, None)), s, None, None) for t, s in self._each(scales)]
        errors = torch.stack([self.blocks((v - x).square()).sum(-1) for v in values])
        choice = errors.argmin(0)
        chosen = torch.stack(scales).gather(0, choice[None])[0]
        padded = pad(choice.to(torch.uint8), (0, -choice.shape[-1] % 4))
        return chosen, None, packing.pack(padded, 2)

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        units = self.blocks(self.normalize(x, scales, None, None, reciprocal))
        choice = self._choices(scales, zero)[..., None]
        codes = torch.zeros(units.shape, dtype=torch.uint8, device=x.device)
        for number, table in enumerate(self.tables):
            codes = torch.where(choice == number, table.encode(units), codes)
        return codes.flatten(-2)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        tables = torch.tensor([t.values for t in self.tables], dtype=torch.float32, device=codes.device)
        size = tables.shape[1]
        index = self._choices(scales, zero)[..., None].long() * size + self.blocks(codes).long()
        return self.scaled(tables.flatten()[index].flatten(-2), scales, None, None)

    def bits_per_value(self, k: int) -> float:
        return self.bits + 16 / self.block + 8 * -(-k // self.block // 4) / k

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().shapes(n, k) | {"zero": ((n, -(-(k // self.block) // 4)), torch.uint8)}

    def _each(self, scales: list[Tensor]) -> zip:
        return zip(self.tables, scales, strict=True)

    def _choices(self, scales: Tensor, zero: Tensor) -> Tensor:
        """(…, G) uint8."""
        return packing.unpack(zero, 2)[..., : scales.shape[-1]]


def _tables(name: str, bits: int, magnitudes: tuple[float, ...], specials: tuple[float, ...]) -> tuple[Table, ...]:
    negative = tuple(-m for m in magnitudes[1:])
    return tuple(Table(f"{name}{s:+g}", bits, (*magnitudes, s, *negative)) for s in specials)


_FOUR = _tables("bitmod4", 4, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (5.0, -5.0, 8.0, -8.0))
_THREE = _tables("bitmod3", 3, (0.0, 1.0, 2.0, 4.0), (3.0, -3.0, 6.0, -6.0))

for _t in (_FOUR, _THREE):
    for _block in (32, 64, 128):
        _name = f"bitmod{_t[0].bits}_g{_block}"
        formats.add(_name, BitMoD(_name, _t[0], _block, torch.bfloat16, tables=_t))
