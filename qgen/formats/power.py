r"""Power-exponent formats: integers after the magnitudes were raised to a power: `power4_row`, `power4_g128`, …

    q = round(m · sign(x) · |x / amax|^a),    x ≈ sign(q) · amax · |q / m|^(1 / a),    m = 2^(b-1) - 1

For a < 1 steps are fine near zero and coarse near amax; a = 1 is the integer format. a is one number of the tensor, kept as its
`global_scale`: of the grid 0.30, 0.35 … 1.00 the one with the least squared error. Powers are the automorphisms of multiplication, so that
products of such numbers are powers again; here they are decoded, by a table of m + 1 entries.
Rounding is to nearest even in the domain of the power, as in the papers, not to the nearest value.
PowerQuant, Yvinec et al., 2023, https://arxiv.org/abs/2301.09858 · NUPES, Yvinec et al., 2023, https://arxiv.org/abs/2308.05600
"""

__all__ = ["Power"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats import integer
from qgen.formats.base import Irregular, formats

EXPONENTS = tuple(a / 20 for a in range(6, 21))
_SAMPLES = 1 << 20


@dataclass(frozen=True)
class Power(Irregular):
    """Symmetric integers of |x / amax|^a. scales: amax; global_scale: a, () float32."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scales = self.store(self.blocks(x).abs().amax(-1) * clip)
        rows, sizes = x.reshape(-1, x.shape[-1]), scales.reshape(-1, scales.shape[-1])
        every = -(-rows.numel() // _SAMPLES)
        rows, sizes = rows[::every], sizes[::every]
        errors = []
        for a in EXPONENTS:
            exponent = torch.tensor(a, dtype=torch.float32, device=x.device)
            values = self.decode(self.encode(rows, sizes, exponent, None), sizes, exponent, None)
            errors.append((values - rows).square().sum())
        return scales, torch.tensor(EXPONENTS, dtype=torch.float32, device=x.device)[torch.stack(errors).argmin()], None

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        unit = self.normalize(x, scales, None, None, reciprocal)
        return self.element.encode(unit.sign() * unit.abs().pow(global_scale.float()) * self.element.max)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        steps = torch.arange(self.element.max + 1, device=codes.device, dtype=torch.float32) / self.element.max
        table = steps.pow(1 / global_scale.float())
        q = self.element.decode(codes)
        return self.scaled(q.sign() * table[q.abs().long()], scales, None, None)

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().shapes(n, k) | {"global_scale": ((), torch.float32)}


for _element in (integer.INT3, integer.INT4, integer.INT6, integer.INT8):
    for _block in (64, 128, None):
        _name = f"power{_element.bits}_{f'g{_block}' if _block else 'row'}"
        formats.add(_name, Power(_name, _element, _block, torch.bfloat16 if _block else torch.float32, "tensor"))
