r"""The order of block scales that tensor cores read: tiles of 128 rows by 4 scales, as cuBLAS documents it.

Rows are padded to 128 and scales to 4 with zeros. A tile takes 512 bytes; in it, scale c of row r lies at byte (r mod 32) · 16 + (r div 32)
· 4 + c. Tiles follow each other along a row of tiles first. Scales take one byte each (e4m3 or e8m0), whose bits are not touched.
cuBLAS, 1-D block scaling factors layout, https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
"""

__all__ = ["blocked", "blocked_shape", "unblocked"]

import torch
from torch import Tensor


def blocked_shape(n: int, groups: int) -> tuple[int, int]:
    """Shape of the tensor in a file: rows and scales of (N, G), rounded up."""
    return -(-n // 128) * 128, -(-groups // 4) * 4


def blocked(scales: Tensor) -> Tensor:
    """Scales (N, G) of one byte each to the order of the tiles, in the shape `blocked_shape`."""
    rows, columns = blocked_shape(*scales.shape)
    padded = torch.zeros(rows, columns, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(scales.dtype)


def unblocked(stored: Tensor, n: int, groups: int) -> Tensor:
    """The inverse: the scales (N, G) without padding."""
    return _rows(stored)[:n, :groups].contiguous().view(stored.dtype)


def _rows(stored: Tensor) -> Tensor:
    rows, columns = stored.shape
    tiles = stored.contiguous().view(torch.uint8).view(rows // 128, columns // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)
