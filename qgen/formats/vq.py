r"""Vector quantization: d neighbours along K share one code, an entry of a codebook learned from the tensor. `vq2_d4`, `vq3_d2`, …

    (x[n, d·j], …, x[n, d·j + d - 1]) ≈ codebook[code[n, j]] · scale[n]

`vq{b}_d{d}` spends b bits per weight: 2^(b·d) entries, but not more than 256 in one codebook; vq2_d8 has two, the second for what the first
leaves (residual quantization), both codes in turn. The codebook is `global_scale`, (entries, d) float32, and is learned by k-means on the
rows divided by their root mean square, which is the scale (N, 1) float32. It costs 32 · entries · d / (N · K) bits per weight more.

k-means starts from vectors drawn far apart with a fixed seed and runs on at most 65536 of them; an entry that nobody chooses moves to the
vector that is served worst. The same tensor gives the same codebook.
k-means++, Arthur and Vassilvitskii, 2007 · GPTVQ, van Baalen et al., 2024, https://arxiv.org/abs/2402.15319 · VQ4DiT, Deng et al., 2024, https://arxiv.org/abs/2408.17131
"""

__all__ = ["VectorQuantizer", "kmeans"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats import packing
from qgen.formats.base import Element, Irregular, formats

STEPS, SAMPLES, CHUNK = 20, 65536, 16384
_UNIT = Element("vector", 8, (-math.inf, math.inf))  # no fixed grid: entries are learned


@dataclass(frozen=True)
class VectorQuantizer(Irregular):
    """Codes for vectors of `dims` neighbours. stages: codebooks whose entries are added up; each has 2^width entries."""

    dims: int = 2
    width: int = 4
    stages: int = 1

    @property
    def bits(self) -> int:
        return self.width * self.stages // self.dims

    @property
    def unit(self) -> int:
        return self.dims * _codes_per_bytes(self.width)

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """clip is a factor on the row's scale, which the codebook follows: it changes little."""
        self._check(x)
        scales = self.store(_rms(x) * clip)
        left, books = self._vectors(x, scales), []
        for _ in range(self.stages):
            books.append(kmeans(left, 1 << self.width))
            left = left - books[-1][_nearest(left, books[-1])]
        return scales, torch.cat(books), None

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """(…, K / dims · stages) uint8: the codes of a vector's stages lie side by side."""
        self._check(x)
        left, codes = self._vectors(x, scales), []
        for book in global_scale.split(1 << self.width):
            codes.append(_nearest(left, book))
            left = left - book[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:-1], -1).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        stages = codes.unflatten(-1, (-1, self.stages)).long().unbind(-1)
        books = global_scale.float().split(1 << self.width)
        vectors = sum(book[stage] for book, stage in zip(books, stages, strict=True))
        return vectors.flatten(-2) * scales.float()

    def pack(self, codes: Tensor) -> Tensor:
        return packing.pack(codes, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        return packing.unpack(packed, self.width)

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().shapes(n, k) | {"global_scale": ((self.stages << self.width, self.dims), torch.float32)}

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] % self.unit:
            raise ValueError(f"{self.name} needs K divisible by {self.unit}, found K={x.shape[-1]}; pad K")

    def _vectors(self, x: Tensor, scales: Tensor) -> Tensor:
        """(vectors, dims) of x in units of its rows' scales."""
        return self.normalize(x, scales, None, None).reshape(-1, self.dims)


def kmeans(vectors: Tensor, entries: int, importance: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """Codebook (entries, d) float32 of least squared distance to vectors (V, d), weighted by `importance` (V,) if given."""
    draw = torch.Generator().manual_seed(entries)
    if len(vectors) > SAMPLES:
        kept = torch.randperm(len(vectors), generator=draw)[:SAMPLES].to(vectors.device)
        vectors, importance = vectors[kept], None if importance is None else importance[kept]
    weight = torch.ones_like(vectors[:, 0]) if importance is None else importance.float()
    book = _spread_out(vectors.float(), entries, weight, draw)
    for _ in range(steps):
        codes = _nearest(vectors, book)
        mass = torch.zeros_like(book[:, 0]).index_add_(0, codes, weight)
        total = torch.zeros_like(book).index_add_(0, codes, weight[:, None] * vectors)
        distance = (vectors - book[codes]).square().sum(-1) * weight
        book = torch.where(mass[:, None] > 0, total / mass[:, None].clamp(min=1e-30), book)
        empty = (mass == 0).nonzero().flatten()[: len(vectors)]
        book[empty] = vectors[distance.topk(len(empty)).indices]
    return book


def _spread_out(vectors: Tensor, entries: int, weight: Tensor, draw: torch.Generator) -> Tensor:
    """Starting points: each is drawn with a probability in proportion to its squared distance from those before (k-means++)."""
    book = vectors[:1].repeat(entries, 1)
    distance = torch.full_like(weight, torch.inf)
    for entry in range(1, entries):
        distance = torch.minimum(distance, (vectors - book[entry - 1]).square().sum(-1) * weight)
        mass = distance.double().cumsum(0)
        at = torch.rand((), generator=draw, dtype=torch.float64).to(mass.device) * mass[-1]
        book[entry] = vectors[torch.searchsorted(mass, at).clamp(max=len(vectors) - 1)]
    return book


def _nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """(V,) int64: the entries of least distance, by |c|² - 2 v·c."""
    half = book.square().sum(-1) / 2
    return torch.cat([(half - part @ book.T).argmin(-1) for part in vectors.split(CHUNK)])


def _rms(x: Tensor) -> Tensor:
    """(…, 1): root mean square of rows; their largest magnitude is taken out first, so that no square overflows."""
    size = x.abs().amax(-1, keepdim=True)
    return torch.where(size > 0, x / size, 0.0).double().square().mean(-1, keepdim=True).sqrt().float() * size


def _codes_per_bytes(width: int) -> int:
    return next(n for n in (1, 2, 4, 8) if n * width % 8 == 0)


for _bits, _dims, _width, _stages in ((1, 8, 8, 1), (2, 2, 4, 1), (2, 4, 8, 1), (2, 8, 8, 2), (3, 2, 6, 1),
                                      (4, 2, 8, 1), (4, 4, 8, 2)):  # fmt: skip
    _name = f"vq{_bits}_d{_dims}"
    _q = VectorQuantizer(_name, _UNIT, None, torch.float32, "tensor", dims=_dims, width=_width, stages=_stages)
    formats.add(_name, _q)
