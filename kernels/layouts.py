r"""Where kernels want the bytes: bijections from the canonical layout, each with its exact inverse.

Group-major, half-split ("L0"), for integer tensor cores. K is cut into groups of 64; a group of one row is 32 bytes,
byte j holding column j in its low nibble and column j + 32 in its high one:

    canonical (rows, K / 2)  →  (K / 64, rows, 32)        8-bit codes: (rows, K)  →  (K / 64, rows, 64)

A dot product does not care in which order K is summed as long as both operands agree, so low nibbles meet low nibbles
and high meet high: one load, one mask and one shift per byte, no interleaving, and tiles whose rows are contiguous.

Scales follow as (K / 64, rows), one vector per step of the K loop. A format with larger blocks repeats them.

Swizzled scales ("L2"), for block-scaled FP4 tensor cores: 128 rows by 4 scales are stored as [32][4][4], row = 32 j +
i:

    (rows, G)  →  (rows / 128, G / 4, 32, 4, 4)           as cuBLAS and `tcgen05.cp` read them

https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
"""

__all__ = [
    "GROUP", "HADAMARDS", "codes_from_groups", "codes_to_groups", "grouped_scales", "offset_binary", "pad_rows", "round_up",
    "scales_from_groups", "swizzle_scales", "unswizzle_scales",
]  # fmt: skip

import torch
from torch import Tensor

from qgen.formats import packing

GROUP = 64  # columns in one step of the integer kernels
HADAMARDS = (16, 32, 64, 128, 256)  # sizes of the block transform that the activation kernel computes on its way


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def pad_rows(t: Tensor, rows: int) -> Tensor:
    """t (m, …) with zero rows appended up to `rows`."""
    if t.shape[0] == rows:
        return t
    return torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])


def codes_to_groups(codes: Tensor, bits: int) -> Tensor:
    """Canonical codes (rows, K · bits / 8) uint8 to group-major (K / 64, rows, 8 · bits); 4-bit codes are half-split.

    Raises ValueError if K is not a multiple of 64.
    """
    values = packing.unpack(codes, bits)
    if values.shape[-1] % GROUP:
        raise ValueError(f"group-major codes need K divisible by {GROUP}, found K={values.shape[-1]}")
    values = values.unflatten(-1, (-1, GROUP)).transpose(0, 1)  # (K / 64, rows, 64)
    if bits == 8:
        return values.contiguous()
    low, high = values[..., : GROUP // 2], values[..., GROUP // 2 :]
    return (low | (high << 4)).contiguous()


def codes_from_groups(groups: Tensor, bits: int) -> Tensor:
    """The inverse of `codes_to_groups`."""
    if bits == 8:
        return groups.transpose(0, 1).flatten(1).contiguous()
    values = torch.cat([groups & 0xF, groups >> 4], -1)
    return packing.pack(values.transpose(0, 1).flatten(1), bits)


def offset_binary(codes: Tensor) -> Tensor:
    """Bytes of two two's complement nibbles q to bytes of nibbles u = q + 8, and back: it is its own inverse."""
    return codes ^ 0x88


def grouped_scales(scales: Tensor, block: int) -> Tensor:
    """Scales (rows, K / block) to (K / 64, rows), repeated where a block spans several groups."""
    return scales.T.repeat_interleave(block // GROUP, 0).contiguous()


def scales_from_groups(scales: Tensor, block: int) -> Tensor:
    """The inverse of `grouped_scales`."""
    return scales[:: block // GROUP].T.contiguous()


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales (rows, G), one byte each, to (⌈rows / 128⌉, ⌈G / 4⌉, 32, 4, 4); what is padded is zero bytes."""
    rows, groups = scales.shape
    raw = torch.zeros(round_up(rows, 128), round_up(groups, 4), dtype=torch.uint8, device=scales.device)
    raw[:rows, :groups] = scales.view(torch.uint8)
    tiles = raw.view(raw.shape[0] // 128, 4, 32, raw.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.contiguous().view(scales.dtype)


def unswizzle_scales(tiles: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `swizzle_scales` for scales (rows, groups)."""
    raw = tiles.view(torch.uint8).permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, tiles.shape[1] * 4)
    return raw[:rows, :groups].contiguous().view(tiles.dtype)
