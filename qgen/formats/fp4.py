r"""Four-bit floats: NVFP4 (e2m1 codes, one e4m3 scale per 16, one float32 per tensor) and MXFP4 (e2m1 codes, one e8m0 scale per 32).

e2m1 has magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; the sign is bit 3, so code 8 is -0.
NVFP4: `scale = e4m3(min(amax / 6 / global, 448))`, `global = amax(tensor) / (6 · 448)`.
MXFP4: `scale = 2^(floor(log2 amax) - 2)`: rounded down as OCP MX v1.0 says, so the largest value of a block may saturate.
https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/BlockScaling.html · https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

__all__ = ["E2M1", "MXFP4", "NVFP4", "SignMagnitude"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import Element, NumberFormat, formats

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class SignMagnitude(Element):
    """Sign in the top bit, magnitude below it. Keeps the sign of what rounds to zero, as the hardware's conversions do."""

    def encode(self, x: Tensor) -> Tensor:
        x = x.float()
        codes = super().encode(x.abs())
        return codes | (x.signbit().to(torch.uint8) << (self.bits - 1))


E2M1 = SignMagnitude("e2m1", 4, _MAGNITUDES + tuple(-m for m in _MAGNITUDES))
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class NVFP4(NumberFormat):
    """e2m1 with an e4m3 scale per 16.

    global_scale: "tensor", one float32; "row", one per row, (…, 1), as Nunchaku's per-channel factors (`wcscales`) are; None, the
    dynamic form of activations: e4m3 scales alone.
    """

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        amax = self.blocks(x).abs().amax(-1)
        global_scale = None
        ideal = amax * clip / self.element.max
        if self.global_scale:
            top = amax.amax() if self.global_scale == "tensor" else amax.amax(-1, keepdim=True)
            global_scale = torch.where(top > 0, top / (self.element.max * _E4M3_MAX), 1.0).float()
            ideal = ideal / global_scale
        return ideal.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn), global_scale, None


@dataclass(frozen=True)
class MXFP4(NumberFormat):
    """e2m1 with a power-of-two scale per 32, stored as e8m0: exponent + 127 in a uint8, 255 = NaN."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        amax = self.blocks(x).abs().amax(-1) * clip
        _, exponent = torch.frexp(amax)  # amax = m · 2^exponent, m in [0.5, 1)
        stored = (exponent - 1 - 2 + 127).clamp(0, 254)  # 2 = floor(log2 6)
        return torch.where(amax > 0, stored, 0).to(torch.uint8), None, None

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        return torch.exp2(scales.float() - 127)


formats.add("nvfp4", NVFP4("nvfp4", E2M1, 16, torch.float8_e4m3fn, "tensor"))
formats.add("nvfp4_row", NVFP4("nvfp4_row", E2M1, 16, torch.float8_e4m3fn, "row"))
formats.add("nvfp4_dynamic", NVFP4("nvfp4_dynamic", E2M1, 16, torch.float8_e4m3fn))
formats.add("mxfp4", MXFP4("mxfp4", E2M1, 32, torch.uint8))
