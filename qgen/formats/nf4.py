r"""NF4 and the other four-bit table of bitsandbytes: `nf4_g64`, `bnb_fp4_g64`, and user tables through the same class.

NF4: sixteen quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: `x ≈ table[code] · absmax`. The table is
Φ⁻¹ at 9 even points of [1/2, δ] for the positive side and at 8 for the negative one, δ = 0.9677083, divided by the largest.
FP4 of bitsandbytes is not e2m1: its magnitudes, in the order of their codes, are 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths.

absmax is float32 and neither rounded nor clamped, x is multiplied by 1 / absmax, and midpoints take the lower value: all as bitsandbytes
does, so that codes are its codes. In one place only do they differ: bitsandbytes on the CPU gives tiny positive values of FP4 the code of
-0 (8) and we that of +0; the value is 0 for both.

QLoRA, Dettmers et al., 2023, https://arxiv.org/abs/2305.14314 · https://github.com/bitsandbytes-foundation/bitsandbytes
"""

__all__ = ["BNB_FP4", "NF4", "Absmax"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import NumberFormat, formats
from qgen.formats.table import Table

NF4 = Table(
    "nf4",
    4,
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
BNB_FP4 = Table("bnb_fp4", 4, tuple(m / 12 for m in _TWELFTHS) + tuple(-m / 12 for m in _TWELFTHS))


@dataclass(frozen=True)
class Absmax(NumberFormat):
    """A table on [-1, 1] times the largest magnitude of a block, which is stored as it is, in float32."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.blocks(x).abs().amax(-1) * clip, None, None

    def normalize(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """x (…, K) · 1 / absmax, whatever `reciprocal` says."""
        inverse = 1.0 / self.step(scales, global_scale).clamp(min=1e-38)  # a block of zeros has absmax 0
        return (self.blocks(x) * inverse[..., None]).flatten(-2)


for _block in (32, 64, 128, 256):
    for _element in (NF4, BNB_FP4):
        _name = f"{_element.name}_g{_block}"
        formats.add(_name, Absmax(_name, _element, _block, torch.float32))
