r"""ggml's blocks to codes, scales and offsets, and back: where each bit of Q4_0 … Q8_0, the K-quants, MXFP4 and NVFP4 lies.

A weight comes as bytes (N, blocks, bytes per block). In a block of 32 with 4-bit codes, byte j holds value j in its low and value j + 16 in
its high nibble; fifth bits are the 32 bits of a little-endian word. A super-block of 256 holds 8 or 16 sub-blocks whose 6-bit (4-bit in
Q2_K) scales multiply one float16; the products are taken in float32, as ggml takes them. https://github.com/ggml-org/ggml
"""

__all__ = ["READERS", "blocks_of", "sound"]

from collections.abc import Callable

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import packing
from qgen.io.peers.base import Layer
from qgen.io.peers.layers import Whole


def _f16(raw: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: (N, blocks)."""
    return raw[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _lanes(raw: Tensor, bits: int) -> Tensor:
    """Bytes (…, B) to codes (…, 8 / bits, B): lane i holds bits i · bits … of every byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (raw[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)


def _halves(raw: Tensor) -> Tensor:
    """16 bytes to 32 nibbles, low ones first."""
    return _lanes(raw, 4).flatten(-2)


def _fifth(word: Tensor) -> Tensor:
    """4 bytes (…, 4) to 32 bits (…, 32), the first byte's low bit first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((word[..., None] >> shifts) & 1).flatten(-2)


def _signed(codes: Tensor, middle: int) -> Tensor:
    return codes.to(torch.int8) - middle


def _q4_0(raw: Tensor) -> Whole:
    return Whole(_signed(_halves(raw[..., 2:]), 8).flatten(1), 4, 32, _f16(raw, 0))


def _q4_1(raw: Tensor) -> Whole:
    return Whole(_halves(raw[..., 4:]).flatten(1), 4, 32, _f16(raw, 0), offset=_f16(raw, 2))


def _q5_0(raw: Tensor) -> Whole:
    codes = _halves(raw[..., 6:]) | (_fifth(raw[..., 2:6]) << 4)
    return Whole(_signed(codes, 16).flatten(1), 5, 32, _f16(raw, 0))


def _q5_1(raw: Tensor) -> Whole:
    codes = _halves(raw[..., 8:]) | (_fifth(raw[..., 4:8]) << 4)
    return Whole(codes.flatten(1), 5, 32, _f16(raw, 0), offset=_f16(raw, 2))


def _q8_0(raw: Tensor) -> Whole:
    return Whole(raw[..., 2:].contiguous().view(torch.int8).flatten(1), 8, 32, _f16(raw, 0))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K to 8 scales and 8 minima of 6 bits: four of each whole, the others in two pieces."""
    a, b, c = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1)
    return scales, minima


def _product(d: Tensor, sub: Tensor) -> Tensor:
    """float16 (N, blocks) times whole sub-scales (N, blocks, S), (N, blocks · S) float32."""
    return (d.float()[..., None] * sub.float()).flatten(1)


def _q4_k(raw: Tensor) -> Whole:
    scales, minima = _six_bits(raw[..., 4:16])
    codes = _lanes(raw[..., 16:].unflatten(-1, (4, 32)), 4)
    return Whole(codes.flatten(1), 4, 32, _product(_f16(raw, 0), scales), offset=-_product(_f16(raw, 2), minima))


def _q5_k(raw: Tensor) -> Whole:
    scales, minima = _six_bits(raw[..., 4:16])
    codes = _lanes(raw[..., 48:].unflatten(-1, (4, 32)), 4).flatten(-3, -2) | (_lanes(raw[..., 16:48], 1) << 4)
    return Whole(codes.flatten(1), 5, 32, _product(_f16(raw, 0), scales), offset=-_product(_f16(raw, 2), minima))


def _q6_k(raw: Tensor) -> Whole:
    low = _lanes(raw[..., :128].unflatten(-1, (2, 64)), 4).unflatten(-1, (2, 32)).flatten(-3, -2)  # (…, 2, 4, 32)
    high = _lanes(raw[..., 128:192].unflatten(-1, (2, 32)), 2)
    scales = raw[..., 192:208].contiguous().view(torch.int8)
    return Whole(_signed(low | (high << 4), 32).flatten(1), 6, 16, _product(_f16(raw, 208), scales))


def _q2_k(raw: Tensor) -> Whole:
    codes = _lanes(raw[..., 16:80].unflatten(-1, (2, 32)), 2)
    scales, minima = raw[..., :16] & 15, raw[..., :16] >> 4
    return Whole(codes.flatten(1), 2, 16, _product(_f16(raw, 80), scales), offset=-_product(_f16(raw, 82), minima))


def _q3_k(raw: Tensor) -> Whole:
    low = _lanes(raw[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3, -2)  # (…, 8, 32)
    codes = _signed(low | (_lanes(raw[..., :32], 1) << 2), 4)
    scales = _lanes(raw[..., 96:104], 4).flatten(-2) | (_lanes(raw[..., 104:108], 2).flatten(-2) << 4)
    return Whole(codes.flatten(1), 3, 16, _product(_f16(raw, 108), _signed(scales, 32)))


def _mxfp4(raw: Tensor) -> dict[str, Tensor]:
    return {"codes": packing.pack(_halves(raw[..., 1:]).flatten(1), 4), "scales": raw[..., 0].contiguous()}


def _nvfp4(raw: Tensor) -> dict[str, Tensor]:
    codes = _lanes(raw[..., 4:].unflatten(-1, (4, 8)), 4)  # low nibbles are the first 8 of 16, high ones the last
    scales = raw[..., :4].contiguous().view(torch.float8_e4m3fn).flatten(1)
    return {"codes": packing.pack(codes.flatten(1), 4), "scales": scales, "global_scale": torch.ones(())}


READERS: dict[str, Callable[[Tensor], Whole | dict[str, Tensor]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip


_KINDS = {"int4": "Q4_0", "uint4": "Q4_1", "int5": "Q5_0", "uint5": "Q5_1", "int8": "Q8_0"}


def sound(kind: str, scales: Tensor) -> bool:
    """Whether the 8-bit scales of MXFP4 or NVFP4 mean the same to ggml and to qgen: 255, NaN and signs do not."""
    top = 255 if kind == "MXFP4" else 127
    return int(scales.view(torch.uint8).max()) < top


def blocks_of(part: Layer) -> tuple[str | None, Tensor | None]:
    """Type and bytes (N, bytes per row) of a layer that is, bit for bit, of a ggml type that image software reads; or (None, None)."""
    name, extra = part.layout.weight, set(part.slots) - {"codes", "scales", "zero", "bias", "act_scale"}
    fmt = formats.get(name)
    kind = _KINDS.get(fmt.element.name)
    additive = type(fmt) is formats.NumberFormat and fmt.zero_point == (not fmt.element.signed)
    if kind is None or not additive or extra or part.layout.hadamard or part.kind != "linear":
        return None, None
    codes = packing.unpack(part.slots["codes"], fmt.bits)
    n, k = codes.shape
    block = fmt.block or k
    if k != part.shape[1] or block % 32:
        return None, None
    halves = [_half(part.slots[slot]) for slot in ("scales", "zero") if slot in part.slots]
    if any(half is None for half in halves):
        return None, None
    halves = [half.repeat_interleave(block // 32, 1).reshape(n, -1, 1).view(torch.uint8) for half in halves]
    codes = codes.reshape(n, -1, 32)
    if kind == "Q8_0":
        return kind, torch.cat([*halves, codes], -1).flatten(1)
    if fmt.element.signed:
        codes = codes ^ (1 << (fmt.bits - 1))  # two's complement to offset
    pieces = [] if fmt.bits == 4 else [packing.pack(codes >> 4, 1)]  # the fifth bits
    codes = codes & 15
    return kind, torch.cat([*halves, *pieces, codes[..., :16] | (codes[..., 16:] << 4)], -1).flatten(1)


def _half(scales: Tensor) -> Tensor | None:
    """Scales in float16 if it holds every one of them exactly."""
    half = scales.half()
    return half if torch.equal(half.float(), scales.float()) else None
