"""The canonical byte order, in files and in `state_dict`.

Codes are unsigned integers of 1 to 8 bits, row-major along K. A row is one little-endian bit stream: code k lies in bits
b·k … b·k + b - 1, bit i of the stream being bit i % 8 of byte i // 8. So column k of a 4-bit row lives in byte k // 2, in the low nibble
if k is even, and eight 3-bit codes fill three bytes, the third code straddling two of them. Rows are whole bytes. Signed codes are stored
in two's complement of their width.
"""

__all__ = ["pack", "unpack"]

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (…, K) uint8, each < 2**bits, into bytes (…, K * bits / 8) uint8.

    Raises ValueError if `bits` is not 1 … 8 or K does not fill whole bytes.
    """
    per = _codes_per_unit(bits)
    if bits == 8:
        return codes
    if codes.shape[-1] % per:
        raise ValueError(f"packing {bits}-bit codes needs K divisible by {per}, found K={codes.shape[-1]}")
    lanes = codes.unflatten(-1, (-1, per))
    if 8 % bits:
        return _split(sum(lanes[..., lane].long() << (bits * lane) for lane in range(per)), bits * per // 8)
    packed = lanes[..., 0].clone()
    for lane in range(1, per):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The exact inverse of `pack`: bytes (…, B) uint8 to codes (…, B * 8 / bits) uint8."""
    per = _codes_per_unit(bits)
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    word = packed
    if 8 % bits:  # a word of 3, 5, 6 or 7 bytes holds whole codes
        size = bits * per // 8
        if packed.shape[-1] % size:
            raise ValueError(f"rows of {bits}-bit codes are whole groups of {size} bytes, found {packed.shape[-1]}")
        lanes = packed.unflatten(-1, (-1, size))
        word = sum(lanes[..., byte].long() << (8 * byte) for byte in range(size))
    return torch.stack([((word >> (bits * lane)) & mask).to(torch.uint8) for lane in range(per)], -1).flatten(-2)


def _split(words: Tensor, size: int) -> Tensor:
    """Words (…, W) int64 to their `size` low bytes, little end first: (…, W * size) uint8."""
    return torch.stack([((words >> (8 * byte)) & 255).to(torch.uint8) for byte in range(size)], -1).flatten(-2)


def _codes_per_unit(bits: int) -> int:
    """How many codes fill whole bytes."""
    if bits not in range(1, 9):
        raise ValueError(f"codes of 1 to 8 bits can be packed, found {bits}")
    return 8 // math.gcd(8, bits)
