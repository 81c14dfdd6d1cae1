r"""NF4 with double quantization, `nf4_g64_dq`: the absolute maxima of blocks are themselves 8-bit codes.

    absmax[n, g] ≈ map[code] · nested[chunk] + offset

`offset` is the mean of all absmax, `nested` the largest |absmax - offset| of 256 consecutive blocks, counted through the whole tensor, and
`map` bitsandbytes' dynamic 8-bit table: for e = 0 … 6 the midpoints of 2^e steps from 0.1 to 1, times 10^(e - 6), both signs, 0 and 1.

So that rows can be cut out of a tensor, each row carries what it needs: `global_scale` is (N, 2 + C) float32 with columns offset, first,
nested…, where `first` blocks of the row belong to its first chunk and further chunks follow every 256 blocks; C = how many chunks the
blocks of one row can touch (2 for K up to 16448). About 4.2 bits per weight against 4.5.

Offset, nested maxima and the values of given codes are bitsandbytes' own, bit for bit. It rounds two things otherwise. Weights: we
use the stored absmax, as all formats of this package do; bitsandbytes the exact one, before it is stored. absmax: its CPU kernel for
float32 finds neighbours through a coarse table and misses the nearest in 0.15 % of cases; we take the nearest, as its other paths do.
QLoRA, Dettmers et al., 2023, https://arxiv.org/abs/2305.14314
"""

__all__ = ["DYNAMIC8", "NF4Double", "collect", "spread"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import formats
from qgen.formats.nf4 import NF4, Absmax
from qgen.formats.table import Table

CHUNK = 256


def _dynamic() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10.0 ** (exponent - 6) * means).tolist()
    return tuple(sorted(values))


DYNAMIC8 = Table("dynamic8", 8, _dynamic())


@dataclass(frozen=True)
class NF4Double(Absmax):
    """NF4 codes, scales (…, G) uint8 codes of DYNAMIC8, global_scale (…, 2 + C) float32: offset, first, nested…"""

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (n, 2 + _chunks(k // self.block))
        return super().shapes(n, k) | {"global_scale": (shape, torch.float32)}

    def bits_per_value(self, k: int) -> float:
        return self.bits + 8 / self.block + 32 * (2 + _chunks(k // self.block)) / k

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        absmax, _, _ = super().ranges(x, clip)
        flat = absmax.reshape(-1)
        offset = flat.mean()
        centred = torch.nn.functional.pad(flat - offset, (0, -len(flat) % CHUNK)).view(-1, CHUNK)
        nested = centred.abs().amax(-1)  # (chunks of the tensor,)
        inverse = torch.where(nested > 0, 1.0 / nested, 0.0)
        codes = DYNAMIC8.encode((centred * inverse[:, None]).clamp(-1, 1)).view(-1)[: len(flat)]
        return codes.view(absmax.shape), spread(offset, nested, absmax.shape), None

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        first = global_scale[..., 1:2]
        block = torch.arange(scales.shape[-1], device=scales.device)
        chunk = torch.where(block < first, 0, 1 + torch.div(block - first, CHUNK, rounding_mode="floor")).long()
        nested = global_scale[..., 2:].gather(-1, chunk.clamp(max=global_scale.shape[-1] - 3))
        return DYNAMIC8.decode(scales) * nested + global_scale[..., :1]


def _chunks(groups: int) -> int:
    """How many chunks `groups` consecutive blocks can touch, wherever they start."""
    return (groups + CHUNK - 2) // CHUNK + 1


def spread(offset: Tensor, nested: Tensor, shape: torch.Size) -> Tensor:
    """What each row of absmax, `shape` (…, G), needs of the offset () and of the maxima of all chunks of the tensor: (…, 2 + C)."""
    groups, rows = shape[-1], shape[:-1].numel()
    start = torch.arange(rows, device=nested.device) * groups
    first = (CHUNK - start % CHUNK).clamp(max=groups)
    chunk = (start // CHUNK)[:, None] + torch.arange(_chunks(groups), device=nested.device)
    found = nested[chunk.clamp(max=len(nested) - 1)]
    return torch.cat([offset.expand(rows, 1), first[:, None].float(), found], 1).view(*shape[:-1], -1)


def collect(global_scale: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The inverse of `spread` for a whole tensor of G = `groups` blocks a row: offset () and the maxima of its chunks, in order."""
    rows = global_scale.reshape(-1, global_scale.shape[-1])
    chunks = -(-len(rows) * groups // CHUNK)
    row = torch.arange(chunks, device=rows.device) * CHUNK // groups  # the row in which a chunk begins
    return rows[0, 0], rows[row, 2 + torch.arange(chunks, device=rows.device) - row * groups // CHUNK]


for _block in (64, 128):
    formats.add(f"nf4_g{_block}_dq", NF4Double(f"nf4_g{_block}_dq", NF4, _block, torch.uint8, "row"))
