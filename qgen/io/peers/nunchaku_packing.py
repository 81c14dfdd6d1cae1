r"""The memory order of Nunchaku's files, as exact bijections: each `pack` undoes its `unpack`, bit for bit.

Its GEMM reads tiles of 128 outputs by 64 inputs, so that a thread finds the fragments of one tensor-core instruction side by side. A file's
tensor keeps the shape (N, K / 2), but its bytes are those of a tensor of tiles. Every order here is one sentence: view the file's bytes in
the shape of tiles, permute the axes, and flatten to rows and columns.

| kind | in the file | here |
|---|---|---|
| codes | (N, K / 2) int8 | (N, K / 2) uint8, canonical: low nibble = even column |
| scales of 64 | (K / 64, N) 16-bit | (N, K / 64) |
| scales of 16 | (K / 16, N) e4m3 | (N, K / 16) |
| vector of N or K | (N,) | (N,) |
| down | (K, R) | (R, K) |
| up | (N, R) | (N, R) |
| AWQ words | (N / 4, K / 2) int32 | (N, K / 2) uint8, canonical |
| rows of p parts | interleaved, (N / p) of p | part after part |

N and K are multiples of 128, R of 16; AWQ wants N of 4 and K of 64. AWQ's scales and zeros are (K / 64, N), plainly transposed.
Nunchaku and DeepCompressor, https://github.com/nunchaku-ai/nunchaku, of which this follows the order of the bytes alone.
"""

__all__ = [
    "ROWS", "deinterleave", "interleave", "pack_awq", "pack_codes", "pack_down", "pack_micro", "pack_scales", "pack_up", "pack_vector",
    "unpack_awq", "unpack_codes", "unpack_down", "unpack_micro", "unpack_scales", "unpack_up", "unpack_vector",
]  # fmt: skip

import torch
from torch import Tensor

from qgen.formats import packing

ROWS = 128  # outputs of one tile; inputs come in multiples of it too, for the sake of vectors along K
_CODES, _SCALES, _MICRO, _LOWRANK = (
    (0, 2, 5, 3, 1, 6, 4, 7),
    (0, 2, 4, 3, 5, 1),
    (0, 4, 3, 2, 1, 5),
    (0, 1, 4, 2, 5, 3, 6),
)


def unpack_codes(qweight: Tensor) -> Tensor:
    """Codes (N, K / 2) int8 of a file to canonical (N, K / 2) uint8. A 32-bit word holds eight neighbours along K, so bytes stay whole."""
    n, half = qweight.shape
    return _permuted(qweight.view(torch.uint8), _code_tiles(n, half), _CODES).reshape(n, half)


def pack_codes(codes: Tensor) -> Tensor:
    """Inverse of `unpack_codes`."""
    n, half = codes.shape
    return _restored(codes, _code_tiles(n, half), _CODES).reshape(n, half).view(torch.int8)


def unpack_scales(scales: Tensor) -> Tensor:
    """Scales (G, N) of a file, one per 64 inputs, to (N, G) in the same dtype."""
    g, n = scales.shape
    return _permuted(scales, _scale_tiles(n, g), _SCALES).reshape(n, g)


def pack_scales(scales: Tensor) -> Tensor:
    """Inverse of `unpack_scales`: (N, G) to (G, N)."""
    n, g = scales.shape
    return _restored(scales, _scale_tiles(n, g), _SCALES).reshape(g, n)


def unpack_micro(scales: Tensor) -> Tensor:
    """Scales (K / 16, N) of a file, one per 16 inputs, to (N, K / 16) in the same dtype."""
    g, n = scales.shape
    return _permuted(scales, _micro_tiles(n, g), _MICRO).reshape(n, g)


def pack_micro(scales: Tensor) -> Tensor:
    """Inverse of `unpack_micro`: (N, K / 16) to (K / 16, N)."""
    n, g = scales.shape
    return _restored(scales, _micro_tiles(n, g), _MICRO).reshape(g, n)


def unpack_vector(vector: Tensor) -> Tensor:
    """A vector (N,) or (K,) of a W4A4 layer, bias, smoothing or channel scales, to its natural order."""
    return unpack_scales(vector[None])[:, 0]


def pack_vector(vector: Tensor) -> Tensor:
    """Inverse of `unpack_vector`."""
    return pack_scales(vector[:, None])[0]


def unpack_up(up: Tensor) -> Tensor:
    """Low-rank factor (N, R) of a file to (N, R)."""
    tiles = _permuted(up, _lowrank_tiles(*up.shape), _LOWRANK).reshape(up.shape[0] // 16, up.shape[1] // 16, 16, 16)
    return tiles.permute(0, 2, 1, 3).reshape(up.shape)


def pack_up(up: Tensor) -> Tensor:
    """Inverse of `unpack_up`."""
    n, r = up.shape
    return _restored(up.reshape(n // 16, 16, r // 16, 16).permute(0, 2, 1, 3), _lowrank_tiles(n, r), _LOWRANK).reshape(
        n, r
    )


def unpack_down(down: Tensor) -> Tensor:
    """Low-rank factor (K, R) of a file to (R, K)."""
    k, r = down.shape
    tiles = _permuted(down, _lowrank_tiles(k, r), _LOWRANK).reshape(k // 16, r // 16, 16, 16)
    return tiles.permute(1, 2, 0, 3).reshape(r, k)


def pack_down(down: Tensor) -> Tensor:
    """Inverse of `unpack_down`: (R, K) to (K, R)."""
    r, k = down.shape
    return _restored(
        down.reshape(r // 16, 16, k // 16, 16).permute(2, 0, 1, 3), _lowrank_tiles(k, r), _LOWRANK
    ).reshape(k, r)


def unpack_awq(qweight: Tensor) -> Tensor:
    """AWQ words (N / 4, K / 2) int32 to canonical codes (N, K / 2) uint8.

    A 16-bit word holds the columns j, j + 8, j + 16 and j + 24 of 32, low nibble first; four rows take turns every 16 words.
    """
    n, k = qweight.shape[0] * 4, qweight.shape[1] * 2
    words = _permuted(qweight.view(torch.int16), (n // 4, k // 64, 4, 16), (0, 2, 1, 3)).reshape(-1, 1, 8)
    nibbles = (words >> torch.tensor([0, 4, 8, 12], dtype=torch.int16)[:, None]) & 15  # (…, 4, 8)
    return packing.pack(nibbles.to(torch.uint8).reshape(n, k), 4)


def pack_awq(codes: Tensor) -> Tensor:
    """Inverse of `unpack_awq`."""
    n, k = codes.shape[0], codes.shape[1] * 2
    nibbles = packing.unpack(codes, 4).reshape(-1, 4, 8).to(torch.int32)
    words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
    words = _restored(words.to(torch.int16), (n // 4, k // 64, 4, 16), (0, 2, 1, 3))
    return words.reshape(n // 4, k).view(torch.int32)


def deinterleave(rows: Tensor, parts: int) -> Tensor:
    """Rows (N, …) that go part 0, part 1, … in turn, to part after part: what a split in `parts` expects."""
    return rows.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1).contiguous()


def interleave(rows: Tensor, parts: int) -> Tensor:
    """Inverse of `deinterleave`."""
    return rows.unflatten(0, (parts, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def _code_tiles(n: int, half: int) -> tuple[int, ...]:
    return (n // 128, half // 32, 8, 8, 4, 2, 2, 4)


def _scale_tiles(n: int, g: int) -> tuple[int, ...]:
    return (n // 128, g, 8, 4, 2, 2)


def _micro_tiles(n: int, g: int) -> tuple[int, ...]:
    return (n // 128, g // 4, 8, 4, 4, 4)


def _lowrank_tiles(c: int, r: int) -> tuple[int, ...]:
    return (c // 16, r // 16, 8, 4, 2, 2, 2)


def _permuted(t: Tensor, tiles: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    return t.reshape(tiles).permute(order).contiguous()


def _restored(t: Tensor, tiles: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    back = sorted(range(len(order)), key=order.__getitem__)
    return t.reshape([tiles[axis] for axis in order]).permute(back).contiguous()
