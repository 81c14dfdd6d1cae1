r"""Codes to values and activations through their format, with few passes over memory: what the plain-torch CPU kernels share.

A byte of canonical codes holds one or two of them, so a table of 256 entries gives the values of a whole byte at once, in the right order:
`values[k..] = table[byte]`. One gather replaces the shifts, masks, interleaving and conversions of the general path.
"""

__all__ = ["decode", "fake_act", "fast_bf16", "has_int8", "weight"]

from functools import lru_cache

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import NumberFormat
from qgen.formats.base import Element
from qgen.formats.integer import Integer
from qgen.kernels import reference
from qgen.kernels.cpu_compile import capabilities

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def decode(codes: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """Canonical codes (N, Kp * bits / 8) uint8 to the values of the element, (N, Kp) in `dtype`. Elements of 4 and 8 bits."""
    values = torch.index_select(_table(element, dtype), 0, codes.flatten().int())
    return values.view(dtype).view(codes.shape[0], -1)


@lru_cache(maxsize=64)
def _table(element: Element, dtype: torch.dtype) -> Tensor:
    """(256,) words, each the values of one byte's codes."""
    per = 8 // element.bits
    byte = torch.arange(256, dtype=torch.int16)
    lanes = torch.stack([(byte >> (element.bits * lane)) & ((1 << element.bits) - 1) for lane in range(per)], -1)
    values = element.decode(lanes.to(torch.uint8), torch.float32).to(dtype).contiguous()
    return values.view(_WORDS[per * dtype.itemsize]).flatten()


def weight(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, name: str, dtype: torch.dtype
) -> Tensor:
    """`reference.weight` in `dtype`, rounded to it once: (N, Kp)."""
    fmt = formats.get(name)
    if not fmt.plain or fmt.bits not in (4, 8):
        return reference.weight(codes, scales, global_scale, zero, name).to(dtype)
    if dtype != torch.float32 and scales.dtype == dtype and global_scale is None and zero is None:
        return fmt.blocks(decode(codes, fmt.element, dtype)).mul_(scales[..., None]).flatten(-2)
    values = fmt.blocks(decode(codes, fmt.element, torch.float32)).mul_(fmt.step(scales, global_scale)[..., None])
    if zero is not None:
        values.add_(zero.float()[..., None])
    return values.flatten(-2).to(dtype)


def fake_act(x: Tensor, act: str, act_scale: Tensor | None) -> Tensor:
    """`reference.quantize_act(x, act, act_scale).dequantize()` for x (…, Kp) float32, with the same codes, without packing them."""
    fmt = formats.get(act)
    plain = type(fmt) is NumberFormat and isinstance(fmt.element, Integer)
    if not plain:
        return reference.quantize_act(x, act, act_scale).dequantize()
    if act_scale is None:
        scales, global_scale, zero = fmt.ranges(x)
    else:
        scales, global_scale = act_scale.float().expand(fmt.blocks(x).shape[:-1]), None
        zero = torch.zeros_like(scales) if fmt.zero_point else None
    q = fmt.blocks(fmt.normalize(x, scales, global_scale, zero, reciprocal=True))
    q = q.nan_to_num_(nan=fmt.element.max).round_().clamp_(fmt.element.min, fmt.element.max)
    q = q.mul_(fmt.step(scales, global_scale)[..., None])
    if zero is not None:
        q = q.add_(zero.float()[..., None])
    return q.flatten(-2)


@lru_cache(maxsize=1)
def fast_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; otherwise float32 is the quicker product."""
    return _capable("avx512_bf16", "amx_bf16")


@lru_cache(maxsize=1)
def has_int8() -> bool:
    """Whether the processor adds four int8 products exactly; older ones saturate in 16 bits, which changes numbers."""
    return _capable("avx512_vnni", "avx_vnni", "amx_int8")


def _capable(*names: str) -> bool:
    found = capabilities()
    return any(found.get(name) for name in names)
