r"""Logarithmic codes for values that are never negative: attention probabilities after softmax. `log2_4_row`, `logsqrt2_4_row`, …

    log2:      x ≈ s · 2^-q          q = round(-log2(x / s))
    log-√2:    x ≈ s · 2^(-q / 2)    q = round(-2 log2(x / s))

s is the largest value of the row (or block). Codes are 0 … 2^b - 2 in this sense; the last code is an exact zero, for masked and vanishing
probabilities, and takes everything that would round to q >= 2^b - 1. So rounding is to the nearest logarithm, not to the nearest value:
the boundaries are 2^-(q + 1/2), which no float is, hence there are no ties. Negative values become 0.

In RepQ-ViT the codes run to 2^b - 1 and zero is one more, which does not fit in b bits; in DGQ there is no zero.
log2: FQ-ViT, Lin et al., 2021, https://arxiv.org/abs/2111.13824 · log-√2: RepQ-ViT, Li et al., 2022, https://arxiv.org/abs/2212.08254
"""

__all__ = ["Logarithmic"]

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qgen.formats.base import Element, NumberFormat, formats


@dataclass(frozen=True)
class Logarithmic(Element):
    """Code q is base^-q, the last one 0; rounds the logarithm. per_octave: steps to a factor of two, 1 or 2."""

    per_octave: int = 1

    def encode(self, x: Tensor) -> Tensor:
        """NaN becomes code 0, the largest value."""
        bounds = _bounds(self, x.device)
        below = len(bounds) - torch.bucketize(x.float().contiguous(), bounds)
        return below.to(torch.uint8)


@lru_cache(maxsize=16)
def _bounds(element: Logarithmic, device: torch.device) -> Tensor:
    """2^(-(q + 1/2) / per_octave) for q from the last value down to 0, ascending: the largest float32 at or below each."""
    exact = [2.0 ** (-(q + 0.5) / element.per_octave) for q in reversed(range((1 << element.bits) - 1))]
    near = torch.tensor(exact, dtype=torch.float32, device=device)
    above = near.double() > torch.tensor(exact, dtype=torch.float64, device=device)
    return torch.where(above, torch.nextafter(near, torch.zeros_like(near)), near)


def _element(name: str, bits: int, per_octave: int) -> Logarithmic:
    last = (1 << bits) - 1
    values = [math.ldexp(1.0, -(q // per_octave)) * (math.sqrt(0.5) if q % per_octave else 1.0) for q in range(last)]
    return Logarithmic(f"{name}_{bits}", bits, (*values, 0.0), per_octave)


for _bits in (3, 4, 5, 8):
    for _kind, _per_octave in (("log2", 1), ("logsqrt2", 2)):
        _e = _element(_kind, _bits, _per_octave)
        for _block in (64, None):
            _name = f"{_e.name}_{f'g{_block}' if _block else 'row'}"
            formats.add(_name, NumberFormat(_name, _e, _block, torch.float32))
