r"""Floats without a sign and with a zero point, for what is bounded below: `ufp4_e2m2_row`, `ufp4_e3m1_g64`, …

    x ≈ value · scale + zero,    zero = min of the block,    value = 2^(E − bias) · (1 + M / 2^m),  for E = 0:  2^(1 − bias) · M / 2^m

After SiLU or GELU nothing lies below −0.28 or −0.17, and most values lie just above: the bit of the sign serves better as one more of the
mantissa or the exponent, and a float's small steps are at its zero, which is moved to the minimum. e1m3 has equal steps: uint4 in all but
name. Mixup-sign quantization: MSFP, 2025, https://arxiv.org/abs/2505.21591
"""

__all__ = ["unsigned"]

import torch

from qgen.formats.base import Element, NumberFormat, formats


def unsigned(exponent: int, mantissa: int, bias: int) -> Element:
    """The element without a sign, so many exponent and mantissa bits, and this bias; all codes are finite."""
    values = []
    for code in range(1 << (exponent + mantissa)):
        e, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
        values.append(2.0 ** (e - bias) * (1 + fraction) if e else 2.0 ** (1 - bias) * fraction)
    return Element(f"ue{exponent}m{mantissa}", exponent + mantissa, tuple(values))


for _exponent, _mantissa, _bias in ((1, 3, 1), (2, 2, 1), (3, 1, 3)):
    _element = unsigned(_exponent, _mantissa, _bias)
    for _block in (32, 64, 128, None):
        _name = f"ufp4_{_element.name[1:]}_{f'g{_block}' if _block else 'row'}"
        _dtype = torch.bfloat16 if _block else torch.float32
        formats.add(_name, NumberFormat(_name, _element, _block, _dtype, zero_point=True))
