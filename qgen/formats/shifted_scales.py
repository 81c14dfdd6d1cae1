r"""ZeroQuant-FP's M2: the scales of a row are its largest one, shifted: `fp4_e2m1_m2_g128`.

    scale[n, g] = row[n] · 2^-shift[n, g],    row = max_g s,    shift = ⌊log2(row / s)⌋,    s = amax / 6

Inside a row FP4 becomes FP8 by adding to the exponent, and one float per row stays for the epilogue; the row's largest block keeps
its scale exactly, where M1 (`fp4_e2m1_m1_g128`, in mx.py) rounds all of them up to powers of two. The paper rounds the shift up, to scales
that may be half of what their block asks for; rounded down, as here, nothing saturates.
scales: the shifts, uint8; global_scale: (N, 1) float32.
ZeroQuant-FP, Wu et al., 2023, https://arxiv.org/abs/2307.09782
"""

__all__ = ["Shifted"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import NumberFormat, formats
from qgen.formats.fp4 import E2M1


@dataclass(frozen=True)
class Shifted(NumberFormat):
    """One float32 scale per row and a whole shift per block."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ideal = self.blocks(x).abs().amax(-1) * clip / self.element.max
        row = ideal.amax(-1, keepdim=True)
        top, power = torch.frexp(row)
        significand, exponent = torch.frexp(ideal)
        shift = power - exponent - (significand > top).to(exponent.dtype)  # exact: nothing is divided
        return torch.where(ideal > 0, shift.clamp(0, 126), 0).to(torch.uint8), row, None

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        return global_scale.float() * torch.exp2(-scales.float())


for _block in (32, 64, 128, 256):
    formats.add(f"fp4_e2m1_m2_g{_block}", Shifted(f"fp4_e2m1_m2_g{_block}", E2M1, _block, torch.uint8, "row"))
