r"""Eight-bit floats: e4m3 (max 448, no infinity) and e5m2, per row, per block or per tensor.

The grid is torch's own `float8_e4m3fn` / `float8_e5m2`. Scale = amax / max, so that the largest value of a block uses the last code.
OCP 8-bit floating point specification, https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1
"""

__all__ = ["E4M3", "E5M2", "Float8"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import Element, NumberFormat, formats


@dataclass(frozen=True)
class _TorchFloat8(Element):
    """An element whose casts are torch's own: the same grid, much quicker than a table."""

    dtype: torch.dtype = torch.float8_e4m3fn

    def encode(self, x: Tensor) -> Tensor:
        return x.float().clamp(self.min, self.max).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.view(self.dtype).to(dtype)


def _values(dtype: torch.dtype) -> tuple[float, ...]:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return tuple(values.where(values.isfinite(), torch.nan).tolist())


E4M3 = _TorchFloat8("e4m3", 8, _values(torch.float8_e4m3fn), torch.float8_e4m3fn)
E5M2 = _TorchFloat8("e5m2", 8, _values(torch.float8_e5m2), torch.float8_e5m2)


@dataclass(frozen=True)
class Float8(NumberFormat):
    """An 8-bit float with one float32 scale per row, or the same one in every row (`per_tensor`), as `torch._scaled_mm` takes them."""

    per_tensor: bool = False

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scales, _, _ = super().ranges(x, clip)
        return scales.amax().expand_as(scales).contiguous() if self.per_tensor else scales, None, None


for _element in (E4M3, E5M2):
    for _suffix, _per_tensor in (("row", False), ("tensor", True)):
        _name = f"fp8_{_element.name}_{_suffix}"
        formats.add(_name, Float8(_name, _element, None, torch.float32, per_tensor=_per_tensor))
