r"""Element, NumberFormat, QTensor: what a low-bit tensor means.

An *element* is the grid of one code: 2**bits values. A *format* adds scales: neighbours along K (a block) share one, so that

    x[n, k] ≈ element.decode(codes[n, k]) · scale[n, k // block] · global_scale (+ zero[n, k // block])

Scales are themselves stored in a scale element (bf16, e4m3, e8m0, …), and quantizing always divides by the *stored* scale, so that
`dequantize(quantize(x))` uses exactly what the file holds. Formats know numbers alone: no modules, no devices, no kernels.
"""

__all__ = ["Element", "Irregular", "NumberFormat", "QTensor", "formats", "get", "padded"]

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qgen.formats import packing
from qgen.registry import Registry

formats: Registry["NumberFormat"] = Registry("number format", "qgen.formats")


@dataclass(frozen=True)
class Element:
    """The grid of one code. `values[c]` is the value of code c; NaN marks a code that is never emitted.

    Encoding rounds to the nearest value, ties to the even mantissa (for integers: to the even integer), and saturates.
    """

    name: str
    bits: int
    values: tuple[float, ...]

    @property
    def max(self) -> float:
        """Largest finite value."""
        return max(v for v in self.values if v == v)

    @property
    def min(self) -> float:
        """Smallest finite value."""
        return min(v for v in self.values if v == v)

    @property
    def signed(self) -> bool:
        return self.min < 0

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes (…) uint8 to values (…) of `dtype`."""
        return _table(self, dtype, codes.device)[codes.long()]

    def round(self, x: Tensor) -> Tensor:
        """Values (…) to the nearest values of the grid, (…) float32: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """Values (…) to the nearest codes (…) uint8, ties to even, saturating. NaN becomes the code of the largest value."""
        _, mid, codes, even = _grid(self, x.device)
        x = x.float().contiguous()
        low = torch.bucketize(x, mid)  # number of midpoints below x: ties stay low
        tie = (x == mid[low.clamp(max=len(mid) - 1)]) & (low < len(mid))
        index = low + (tie & ~even[low]).long()
        return codes[index]


@lru_cache(maxsize=64)
def _table(element: Element, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _grid(element: Element, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted distinct values, their midpoints, their codes (the first of equals: +0 before -0), and which rank wins a tie."""
    order: dict[float, int] = {}
    for code, value in enumerate(element.values):
        if value == value:
            order.setdefault(value + 0.0, code)
    values = sorted(order)
    mids = [(a + b) / 2 for a, b in pairwise(values)]
    codes = [order[v] for v in values]
    even = [_wins_tie(element, v, c) for v, c in zip(values, codes, strict=True)]
    return (
        torch.tensor(values, dtype=torch.float32, device=device),
        torch.tensor(mids, dtype=torch.float32, device=device),
        torch.tensor(codes, dtype=torch.uint8, device=device),
        torch.tensor(even, device=device),
    )


def _wins_tie(element: Element, value: float, code: int) -> bool:
    """Whether `value` is the even neighbour: its integer is even, or the last bit of its float code is 0."""
    integers = all(v == v and float(v).is_integer() for v in element.values if v == v)
    return int(value) % 2 == 0 if integers else code % 2 == 0


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor as a plain record; shapes for a weight (N, K) with `G = K / block`.

    codes: (N, K * bits / 8) uint8, canonical packing. scales: (N, G), stored dtype of the format.
    global_scale: () or (N, 1) float32, or None. zero: (N, G) in the dtype of `scales`, or None. format: name of the format.
    Formats with more to say use the same four places, in the shapes that `NumberFormat.shapes` gives: a learned codebook, an exponent and
    other things that a whole tensor or row shares are its `global_scale`, a second parameter of a block is its `zero`.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    zero: Tensor | None
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized tensor."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // get(self.format).bits)

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.global_scale, self.zero)
        return sum(p.nbytes for p in parts if p is not None)

    def rows(self, rows: slice | Tensor) -> "QTensor":
        """These rows of a weight (N, K), with what the whole tensor shares."""
        shared = self.global_scale
        if shared is not None and get(self.format).global_scale == "row":
            shared = shared[rows]
        zero = None if self.zero is None else self.zero[rows]
        return QTensor(self.codes[rows], self.scales[rows], shared, zero, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values (N, K) that the codes stand for, in `dtype` (computed in float32)."""
        return get(self.format).dequantize(self, dtype)


@dataclass(frozen=True)
class NumberFormat:
    """An element and its scaling. Subclasses override `scales` (and `stored`) where absmax / element.max is not the rule.

    block: neighbours along K that share a scale; None = the whole row.
    scale_dtype: dtype in which scales are stored.
    global_scale: "tensor" (one float32), "row" (one float32 per row) or None.
    zero_point: whether blocks have an offset, so that codes cover [min, max] and not [-amax, amax].
    """

    name: str
    element: Element
    block: int | None = None
    scale_dtype: torch.dtype = torch.bfloat16
    global_scale: str | None = None
    zero_point: bool = False

    @property
    def bits(self) -> int:
        """Bits per value of the codes: a row of K values takes K * bits / 8 bytes."""
        return self.element.bits

    @property
    def plain(self) -> bool:
        """Whether values are `element.decode(codes) · step + zero`, each from its own code: what kernels and GPTQ build upon."""
        kind = type(self)
        return kind.dequantize is NumberFormat.dequantize and kind.scaled is NumberFormat.scaled

    @property
    def unit(self) -> int:
        """K must be a multiple of this: whole blocks and whole bytes."""
        return math.lcm(self.block or 1, 8 // math.gcd(8, self.bits))

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{slot: (shape, dtype)} of the tensors of a QTensor of shape (n, k), for those that the format has."""
        groups = k // (self.block or k)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((n, k * self.bits // 8), torch.uint8),
            "scales": ((n, groups), self.scale_dtype),
        }
        if self.global_scale:
            found["global_scale"] = ((n, 1) if self.global_scale == "row" else (), torch.float32)
        if self.zero_point:
            found["zero"] = ((n, groups), self.scale_dtype)
        return found

    def bits_per_value(self, k: int) -> float:
        """Bits per weight for rows of `k` values, scales and zeros counted, per-tensor scales not."""
        block = self.block or k
        per_block = torch.empty(0, dtype=self.scale_dtype).element_size() * 8 * (2 if self.zero_point else 1)
        return self.bits + per_block / block + (32 / k if self.global_scale == "row" else 0)

    # -- quantize -----------------------------------------------------------------------------------------------------
    def quantize(
        self, x: Tensor, clip: Tensor | float = 1.0, like: QTensor | None = None, reciprocal: bool = False
    ) -> QTensor:
        """Rounds x (…, K) to the nearest codes.

        Arguments:
            x: any float dtype; computed in float32. K must be divisible by the block (ValueError otherwise).
            clip: factor on each block's range, a number or (…, K / block): below 1 it trades saturation for resolution.
            like: reuse the scales of this tensor; only codes are computed.
            reciprocal: multiply by 1 / scale, as fused kernels do for activations, and do not divide by the scale.
        """
        x = x.float()
        scales, global_scale, zero = (
            self.ranges(x, clip) if like is None else (like.scales, like.global_scale, like.zero)
        )
        codes = self.encode(x, scales, global_scale, zero, reciprocal)
        return QTensor(self.pack(codes), scales, global_scale, zero, self.name)

    def encode(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """x (…, K) float32 to codes uint8, not packed: (…, K) for all formats but vector quantization."""
        return self.element.encode(self.normalize(x, scales, global_scale, zero, reciprocal))

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of `encode` to the bytes of a QTensor."""
        return packing.pack(codes, self.bits)

    def unpack(self, packed: Tensor) -> Tensor:
        """The exact inverse of `pack`."""
        return packing.unpack(packed, self.bits)

    def normalize(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """x (…, K) in units of one code step: what `element.encode` rounds. Blocks of zero scale give 0."""
        step = self.step(scales, global_scale)[..., None]
        blocks = self.blocks(x)
        if zero is not None:
            blocks = blocks - zero.float()[..., None]
        if reciprocal:
            return (blocks * torch.where(step > 0, 1.0 / step, 0.0)).flatten(-2)
        return torch.where(step > 0, blocks / step, 0.0).flatten(-2)

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stored scales, global scale and zeros for x (…, K): absmax by default, min/max for formats with zero points."""
        blocks = self.blocks(x)
        if self.zero_point:
            low, high = blocks.amin(-1), blocks.amax(-1)
            centre, half = (high + low) / 2, (high - low) / 2 * clip
            span = self.element.max - self.element.min
            scales = self.store(2 * half / span)
            zero = (centre - half - self.element.min * scales.float()).to(self.scale_dtype)
            return scales, None, zero
        return self.store(blocks.abs().amax(-1) * clip / self.element.max), None, None

    def store(self, scales: Tensor) -> Tensor:
        """Float scales to the stored dtype. Positive scales never become zero, finite ones never infinite."""
        info = torch.finfo(self.scale_dtype)
        smallest = info.tiny if self.scale_dtype != torch.float32 else 1e-38
        bounded = torch.where(scales > 0, scales.clamp(smallest, info.max), 0.0)
        return bounded.to(self.scale_dtype)

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        """Effective float32 scale of each block from the stored ones."""
        step = scales.float()
        return step if global_scale is None else step * global_scale.float()

    # -- dequantize ---------------------------------------------------------------------------------------------------
    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (…, K) of a QTensor of this format, computed in float32 and returned in `dtype`."""
        values = self.element.decode(self.unpack(q.codes))
        return self.scaled(values, q.scales, q.global_scale, q.zero).to(dtype)

    def scaled(self, values: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Values of the element (…, K) to what they stand for, float32: the inverse of `normalize`, linear in `values`."""
        values = self.blocks(values) * self.step(scales, global_scale)[..., None]
        if zero is not None:
            values = values + zero.float()[..., None]
        return values.flatten(-2)

    def fake(self, x: Tensor, clip: Tensor | float = 1.0, reciprocal: bool = False) -> Tensor:
        """x there and back, in x's dtype: `quantize(x).dequantize(x.dtype)` without the packing. It has no gradient of its own."""
        ranges = self.ranges(x.float(), clip)
        return self.scaled(self.element.round(self.normalize(x.float(), *ranges, reciprocal)), *ranges).to(x.dtype)

    def blocks(self, x: Tensor) -> Tensor:
        """View of x (…, K) as (…, K / block, block); ValueError if the block does not divide K."""
        k = x.shape[-1]
        block = self.block or k
        if k % block:
            raise ValueError(
                f"{self.name} needs K divisible by its block of {block}, found K={k}; pad K or choose another block"
            )
        return x.unflatten(-1, (k // block, block))


@dataclass(frozen=True)
class Irregular(NumberFormat):
    """A format whose values are not `element · step + zero`, or whose bytes are in an order of their own.

    Subclasses override some of `encode`, `decode`, `pack` and `unpack`. Kernels that read codes by themselves leave such formats to those
    that call `dequantize`; see `NumberFormat.plain`. What needs the step of a code, as GPTQ does, gets a ValueError and no wrong number.
    """

    def step(self, scales: Tensor, global_scale: Tensor | None) -> Tensor:
        raise ValueError(
            f"{self.name} is no table of values times a step, so its codes cannot be chosen one by one: leave out methods that round, "
            "such as gptq, or choose another format"
        )

    def normalize(
        self, x: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, reciprocal: bool = False
    ) -> Tensor:
        """x (…, K) in units of the scales of its blocks."""
        return self._blockwise.normalize(x, scales, None, None, reciprocal)

    def scaled(self, values: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """values (…, K) times the scales of their blocks."""
        return self._blockwise.scaled(values, scales, None, None)

    @property
    def _blockwise(self) -> NumberFormat:
        return NumberFormat(self.name, self.element, self.block, self.scale_dtype)

    def decode(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Codes as `encode` gives them to values (…, K) float32."""
        return self.scaled(self.element.decode(codes), scales, global_scale, zero)

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.decode(self.unpack(q.codes), q.scales, q.global_scale, q.zero).to(dtype)

    def fake(self, x: Tensor, clip: Tensor | float = 1.0, reciprocal: bool = False) -> Tensor:
        ranges = self.ranges(x.float(), clip)
        return self.decode(self.encode(x.float(), *ranges, reciprocal), *ranges).to(x.dtype)


def get(name: str) -> NumberFormat:
    """The number format called `name`; ValueError with the nearest name if there is none."""
    return formats[name]


def padded(k: int, *names: str | None, multiple: int = 1) -> int:
    """K rounded up to what the blocks and whole bytes of the formats `names` need, and to `multiple`."""
    unit = math.lcm(multiple, *(get(name).unit for name in filter(None, names)))
    return -(-k // unit) * unit
