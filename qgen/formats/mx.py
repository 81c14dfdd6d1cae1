r"""The MX family: one power of two per 32 values, for elements of 4 to 8 bits: `mxfp6_e2m3`, `mxfp8_e4m3`, `mxint8`, `mxfp4_best`, …

    x ≈ element · 2^(s - 127),    s in a uint8 (e8m0; 255 would be NaN and is never written)

How the exponent follows from amax is not part of the format; files of all four kinds decode alike. emax is the exponent of the element's
largest power of two:

    (no suffix)  floor:  ⌊log2 amax⌋ - emax, as OCP MX v1.0 says; the largest value may saturate
    _rceil       ⌈log2(amax / max)⌉: never saturates; comfy-kitchen's mxfp8 and torchao's RCEIL
    _even        floor, of amax rounded to the element's mantissa; torchao's EVEN and compressed-tensors' mxfp4
    _best        floor or one more, whichever leaves the smaller squared error in the block: for weights

mxint8 is two's complement with 6 bits after the point, so its emax is 0. Elements round to nearest even and saturate. `fp4_e2m1_m1_g256` is
ZeroQuant-FP's M1: the rceil rule on larger blocks, so that FP4 turns into FP8 by a shift of the exponent.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf · ZeroQuant-FP, https://arxiv.org/abs/2307.09782
"""

__all__ = ["MX", "MXINT8"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import NumberFormat, formats
from qgen.formats.fp4 import E2M1
from qgen.formats.fp8 import E4M3, E5M2
from qgen.formats.integer import INT8, Integer
from qgen.formats.minifloat import E2M3, E3M2


@dataclass(frozen=True)
class _Fixed(Integer):
    """int8 with a binary point: code / 64."""

    def encode(self, x: Tensor) -> Tensor:
        return INT8.encode(x.float() * 64)

    def round(self, x: Tensor) -> Tensor:
        return INT8.round(x.float() * 64) / 64

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (INT8.decode(codes) / 64).to(dtype)


MXINT8 = _Fixed("mxint8", 8, tuple(v / 64 for v in INT8.values))


@dataclass(frozen=True)
class MX(NumberFormat):
    """An element with e8m0 scales, stored as exponent + 127 in a uint8. mode: floor, rceil, even or best; see above.

    mantissa: explicit mantissa bits of the element, which the mode `even` asks for.
    """

    mode: str = "floor"
    mantissa: int = 1

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        blocks = self.blocks(x)
        amax = blocks.abs().amax(-1) * clip
        exponent = {"rceil": self._rceil, "even": self._even}.get(self.mode, self._floor)(amax)
        stored = _stored(exponent, amax)
        if self.mode == "best":
            above = _stored(exponent + 1, amax)
            errors = [(self.scaled(self.element.round(self.normalize(x, s, None, None)), s, None, None) - x).square()
                      for s in (stored, above)]  # fmt: skip
            low, high = (self.blocks(e).sum(-1) for e in errors)
            stored = torch.where(high < low, above, stored)
        return stored, None, None

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        return torch.exp2(scales.float() - 127)

    @property
    def emax(self) -> int:
        """Exponent of the largest power of two of the element."""
        return math.frexp(self.element.max)[1] - 1

    def _floor(self, amax: Tensor) -> Tensor:
        return torch.frexp(amax)[1] - 1 - self.emax

    def _rceil(self, amax: Tensor) -> Tensor:
        """amax = m · 2^e and max = M · 2^E, m and M in [1/2, 1): the quotient exceeds 2^(e - E) exactly if m > M. Nothing is rounded."""
        significand, exponent = torch.frexp(amax)
        top, power = math.frexp(self.element.max)
        return exponent - power + (significand > top).to(exponent.dtype)

    def _even(self, amax: Tensor) -> Tensor:
        """Floor, once half a unit of the element's last mantissa bit has been added to amax: 1.75 for e2m1, 1.9375 for e4m3."""
        significand, exponent = torch.frexp(amax)  # in [1/2, 1)
        bump = 2 * significand >= 2 - 2.0 ** -(self.mantissa + 1)
        return exponent - 1 - self.emax + bump.to(exponent.dtype)


def _stored(exponent: Tensor, amax: Tensor) -> Tensor:
    return torch.where(amax > 0, (exponent + 127).clamp(0, 254), 0).to(torch.uint8)


_ELEMENTS = {"mxfp4": (E2M1, 1), "mxfp6_e2m3": (E2M3, 3), "mxfp6_e3m2": (E3M2, 2), "mxfp8_e4m3": (E4M3, 3), "mxfp8_e5m2": (E5M2, 2),
             "mxint8": (MXINT8, 6)}  # fmt: skip

for _family, (_element, _mantissa) in _ELEMENTS.items():
    for _mode in ("floor", "rceil", "even", "best"):
        _name = _family if _mode == "floor" else f"{_family}_{_mode}"
        if _name != "mxfp4":  # fp4.py has it
            formats.add(_name, MX(_name, _element, 32, torch.uint8, mode=_mode, mantissa=_mantissa))
for _block in (128, 256):
    formats.add(f"fp4_e2m1_m1_g{_block}", MX(f"fp4_e2m1_m1_g{_block}", E2M1, _block, torch.uint8, mode="rceil"))
