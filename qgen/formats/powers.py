r"""Powers of two and sums of them: `pot4_g64`, `apot4_g64`, … Weights whose products are shifts and one addition.

pot of b bits: 0 and ± 2^-k for k = 0 … 2^(b-1) - 2, times the scale: amax is exact, the grid is dense only near zero.
apot: magnitudes are sums of one power of two from each of two (b = 4, 5) sets, so that the grid is dense near zero and still has steps
near the top. As parts of the largest:

    b = 3: 0 1/4 1/2 1      b = 4: 0 .1 .2 .3 .4 .6 .8 1      b = 5: 0 1/48 1/24 … 2/3 11/16 3/4 1

They are kept as halves and wholes, which bfloat16 holds exactly: 0 … 1, 0 … 5 and 0 … 24. Codes are a sign bit above the rank of the
magnitude. Rounding is to the nearest value, ties to the even rank; scales are amax / largest.
APoT, Li et al., 2019, https://arxiv.org/abs/1909.13144
"""

__all__ = ["APOT3", "APOT4", "APOT5", "POT3", "POT4"]

import torch

from qgen.formats.base import NumberFormat, formats
from qgen.formats.fp4 import SignMagnitude


def _element(name: str, bits: int, magnitudes: list[float]) -> SignMagnitude:
    values = sorted(magnitudes)
    return SignMagnitude(name, bits, (*values, *(-v for v in values)))


def _pot(bits: int) -> SignMagnitude:
    return _element(f"pot{bits}", bits, [0.0, *(2.0**-k for k in range(2 ** (bits - 1) - 1))])


def _apot(bits: int, *sets: tuple[float, ...]) -> SignMagnitude:
    sums = [0.0]
    for terms in sets:
        sums = [a + b for a in sums for b in terms]
    return _element(f"apot{bits}", bits, sums)


POT3, POT4 = _pot(3), _pot(4)
APOT3 = _apot(3, (0.0, 0.25, 0.5, 1.0))
APOT4 = _apot(4, (0.0, 4.0, 2.0, 0.5), (0.0, 1.0))
APOT5 = _apot(5, (0.0, 16.0, 4.0, 1.0), (0.0, 8.0, 2.0, 0.5))

for _e in (POT3, POT4, APOT3, APOT4, APOT5):
    for _block in (64, 128, None):
        _name = f"{_e.name}_{f'g{_block}' if _block else 'row'}"
        formats.add(_name, NumberFormat(_name, _e, _block, torch.bfloat16 if _block else torch.float32))
