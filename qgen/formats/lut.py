r"""Learned scalar codebooks: every row has a table of 2^b values of its own, `lut4_row`, `lut3_row`, `lut2_row`.

    x[n, k] ≈ table[n, code] · amax[n]

The table is the least-squares quantizer of the row (Lloyd's two steps in turn: codes of the nearest value, values to the mean of their
codes), ascending, float16 on [-1, 1], kept in `scales` (N, 2^b); amax is `global_scale`, (N, 1) float32. Costs 16 · 2^b / K bits.
Starting from quantiles the result depends on the row alone; `importance` weighs the columns, e.g. by the mean square of their inputs.
SqueezeLLM, Kim et al., 2023, https://arxiv.org/abs/2306.07629 · Lloyd, 1957/1982, Least squares quantization in PCM
"""

__all__ = ["Lut", "lloyd"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import Irregular, formats
from qgen.formats.integer import UINT2, UINT3, UINT4

STEPS = 20


@dataclass(frozen=True)
class Lut(Irregular):
    """A table per row. clip narrows the row's range before the table is learned: values beyond take the outermost entries."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size = x.abs().amax(-1, keepdim=True) * clip
        unit = torch.where(size > 0, x / size, 0.0).clamp(-1, 1)
        return lloyd(unit, self.bits).half(), size, None

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """Nearest entry; ties to the lower one. Always divides."""
        unit = torch.where(global_scale > 0, x / global_scale, 0.0)
        return _nearest(unit.reshape(-1, x.shape[-1]), scales.float().reshape(-1, scales.shape[-1])).view(x.shape)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        return scales.float().gather(-1, codes.long()) * global_scale

    def bits_per_value(self, k: int) -> float:
        return self.bits + (16 * (1 << self.bits) + 32) / k

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().shapes(n, k) | {"scales": ((n, 1 << self.bits), self.scale_dtype)}


def lloyd(x: Tensor, bits: int, importance: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """Ascending tables (…, 2^bits) float32 of least squared error for the rows of x (…, K). importance: (K,) non-negative weights."""
    rows = x.float().reshape(-1, x.shape[-1])
    entries = 1 << bits
    at = (
        ((torch.arange(entries, dtype=torch.float32, device=x.device) + 0.5) / entries * (rows.shape[1] - 1))
        .round()
        .long()
    )
    table = rows.sort(-1).values[:, at].contiguous()
    weight = torch.ones_like(rows) if importance is None else importance.float().expand_as(rows).contiguous()
    for _ in range(steps):
        codes = _nearest(rows, table).long()
        mass = torch.zeros_like(table).scatter_add_(1, codes, weight)
        total = torch.zeros_like(table).scatter_add_(1, codes, weight * rows)
        table = torch.where(mass > 0, total / mass, table).sort(-1).values.contiguous()
    return table.view(*x.shape[:-1], entries)


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Codes (N, K) uint8 of the nearest entries of ascending tables (N, E); of equal entries the first."""
    mids = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    return torch.searchsorted(mids, rows.contiguous()).to(torch.uint8)


for _element in (UINT2, UINT3, UINT4):
    formats.add(f"lut{_element.bits}_row", Lut(f"lut{_element.bits}_row", _element, None, torch.float16, "row"))
