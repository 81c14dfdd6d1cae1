"""The canonical byte order, in files and in `state_dict`.

Codes are unsigned integers of 1, 2, 4 or 8 bits, row-major along K. Narrow codes are packed little end first: column k of a 4-bit
row lives in byte k // 2, in the low nibble if k is even. Signed codes are stored in two's complement of their width.
"""

__all__ = ["pack", "unpack"]

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (…, K) uint8, each < 2**bits, into bytes (…, K * bits / 8) uint8.

    Raises ValueError if `bits` does not divide 8 or K does not fill whole bytes.
    """
    per = _codes_per_byte(bits)
    if per == 1:
        return codes
    if codes.shape[-1] % per:
        raise ValueError(f"packing {bits}-bit codes needs K divisible by {per}, found K={codes.shape[-1]}")
    lanes = codes.unflatten(-1, (-1, per))
    packed = lanes[..., 0].clone()
    for lane in range(1, per):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The exact inverse of `pack`: bytes (…, B) uint8 to codes (…, B * 8 / bits) uint8."""
    per = _codes_per_byte(bits)
    if per == 1:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (bits * lane)) & mask for lane in range(per)], -1).flatten(-2)


def _codes_per_byte(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"codes of 1, 2, 4 or 8 bits can be packed, found {bits}")
    return 8 // bits
