r"""Floats of 4 and 6 bits beside e2m1, and small floats with plain scales: `fp4_e3m0_g64`, `fp6_e2m3_row`, `fp8_e4m3_g128`, …

A code is sign, E exponent bits and M mantissa bits. There is no infinity and no NaN:

    value = ± 2^(E - bias) · (1 + M / 2^m),    for E = 0:  ± 2^(1 - bias) · M / 2^m

e1m2 (bias 1) has equal steps of 1/4 up to 1.75 and is int4 in all but name; e3m0 (bias 3) is zero and seven powers of two up to 16; e2m3
(bias 1) ends at 7.5, e3m2 (bias 3) at 28. Ties go to the even code, the sign of zero is kept. Scales are amax / max: bfloat16 per block,
float32 per row. A power of two in the bias only moves the scale; biases are those of the OCP specification where it has the element.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

__all__ = ["E1M2", "E2M3", "E3M0", "E3M2", "minifloat"]

import torch

from qgen.formats.base import NumberFormat, formats
from qgen.formats.fp4 import E2M1, SignMagnitude
from qgen.formats.fp8 import E4M3, E5M2


def minifloat(exponent: int, mantissa: int, bias: int) -> SignMagnitude:
    """The element with a sign, so many exponent and mantissa bits, and this bias; all codes are finite."""
    magnitudes = []
    for code in range(1 << (exponent + mantissa)):
        e, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
        magnitudes.append(2.0 ** (e - bias) * (1 + fraction) if e else 2.0 ** (1 - bias) * fraction)
    values = (*magnitudes, *(-m for m in magnitudes))
    return SignMagnitude(f"e{exponent}m{mantissa}", 1 + exponent + mantissa, values)


E1M2, E3M0, E2M3, E3M2 = minifloat(1, 2, 1), minifloat(3, 0, 3), minifloat(2, 3, 1), minifloat(3, 2, 3)

for _element in (E2M1, E1M2, E3M0, E2M3, E3M2, E4M3, E5M2):
    for _block in (32, 64, 128, None):
        _name = f"fp{_element.bits}_{_element.name}_{f'g{_block}' if _block else 'row'}"
        if _element.bits < 8 or _block:  # fp8.py has the rows of eight bits
            formats.add(_name, NumberFormat(_name, _element, _block, torch.bfloat16 if _block else torch.float32))
