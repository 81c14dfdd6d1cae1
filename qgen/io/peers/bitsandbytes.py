r"""bitsandbytes in: NF4 and FP4 with or without double quantization, and LLM.int8.

    weight uint8 (N·K/2, 1)                       codes of the flattened weight, the first of two in the high nibble
    weight.absmax float32 (B,) | uint8 (B,)       one for each block of the flattened weight; uint8 if nested
    weight.quant_map float32 (16,)                the table
    weight.nested_absmax (⌈B/256⌉,), weight.nested_quant_map (256,)    absmax = map[code] · nested[block // 256] + offset
    weight.quant_state.bitsandbytes__nf4 uint8    JSON: blocksize, shape, dtype, nested_offset, …

    weight int8 (N, K), SCB float32 (N,)          w = q · SCB / 127

4-bit weights whose rows are whole blocks stay packed as nf4_g…, bnb_fp4_g…, nf4_g…_dq, with the same values bit for bit. int8 becomes
int8_row with the scale SCB / 127, rounded to float32 once, where the library multiplies by SCB and then by 1/127: the last bit may differ.
Dettmers et al., 2023, https://arxiv.org/abs/2305.14314 · https://github.com/bitsandbytes-foundation/bitsandbytes
"""

__all__ = ["BitsAndBytes"]

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.formats import packing
from qgen.formats.nf4 import BNB_FP4, NF4
from qgen.formats.nf4_dq import CHUNK, DYNAMIC8, spread
from qgen.io.files import parse
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.layers import Whole, bias_of, check, emit, finite, floats, layer, stream

_STATE = ".quant_state.bitsandbytes__"
_LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_TABLES = {"nf4": NF4, "fp4": BNB_FP4}
_LONGEST_STATE = 4096  # bytes of JSON
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class BitsAndBytes:
    """The importer."""

    about = "bitsandbytes: NF4, FP4 and LLM.int8"

    def recognizes(self, source: Source) -> bool:
        return any(_STATE in name or _int8(source, name) for name in source.shapes)

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        fours = {name.partition(_STATE)[0]: name for name in source.shapes if _STATE in name}  # weight to its state
        eights = {name.removesuffix("SCB") + "weight" for name in source.shapes if _int8(source, name)}
        layers = {}
        for weight in (*fours, *eights):
            path = weight.rpartition(".")[0]
            own = (
                [f"{weight}.{leaf}" for leaf in _LEAVES]
                if weight in fours
                else [f"{path}.SCB", f"{path}.weight_format"]
            )
            names = (weight, *own, fours.get(weight, ""), f"{path}.bias")
            layers[weight] = tuple(name for name in names if name in source.shapes)
        return stream(
            source,
            layers,
            lambda weight: _four(source, weight, fours[weight]) if weight in fours else _eight(source, weight),
        )


def _int8(source: Source, name: str) -> bool:
    weight = name.removesuffix("SCB") + "weight"
    return name.endswith(".SCB") and source.dtypes.get(weight) == torch.int8


def _eight(source: Source, weight: str) -> Iterator[Layer | Plain]:
    path = weight.rpartition(".")[0]
    check(source, weight, None, torch.int8)
    shape = source.shapes[weight]
    if len(shape) != 2 or not all(shape):
        raise BadCheckpoint(f"{source.where}: {weight!r} must be a matrix, found the shape {list(shape)}")
    check(source, f"{path}.SCB", shape[:1], torch.float32)
    order = f"{path}.weight_format"
    if order in source.shapes and bool((source.read(order) != 0).any()):
        raise BadCheckpoint(
            f"{source.where}: {order!r} names a layout of tiles; load the model with bitsandbytes and save it again"
        )
    scales = finite(source, f"{path}.SCB", source.read(f"{path}.SCB"))[:, None] / 127
    yield from emit(
        path, Whole(source.read(weight), 8, shape[1], scales), bias=bias_of(source, path, shape[0]), said="LLM.int8"
    )


def _four(source: Source, weight: str, state_name: str) -> Iterator[Layer | Plain]:
    path, state = weight.rpartition(".")[0], _state(source, state_name)
    kind, block, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
    count = math.prod(shape)
    check(source, weight, (-(-count // 2), 1), torch.uint8)
    check(source, f"{weight}.quant_map", (16,), torch.float32)
    blocks = -(-count // block)
    table = finite(source, f"{weight}.quant_map", source.read(f"{weight}.quant_map"))
    nested = f"{weight}.nested_absmax" in source.shapes
    check(source, f"{weight}.absmax", (blocks,), torch.uint8 if nested else torch.float32)
    absmax = source.read(f"{weight}.absmax")
    if nested:
        inner = _nested(source, weight, state, blocks)
    else:
        finite(source, f"{weight}.absmax", absmax)
    raw = source.read(weight).reshape(-1)
    codes = torch.stack([raw >> 4, raw & 15], 1).reshape(-1)[:count]
    bias = bias_of(source, path, shape[0]) if len(shape) == 2 and weight.endswith(".weight") else None
    said = f"bitsandbytes {kind.upper()}{' with double quantization' if nested else ''}"
    rows = len(shape) == 2 and shape[1] % block == 0 and weight.endswith(".weight")
    known = torch.equal(table, torch.tensor(_TABLES[kind].values))
    name = f"{kind if kind == 'nf4' else 'bnb_fp4'}_g{block}"
    if rows and known:
        slots = {"codes": packing.pack(codes.view(shape), 4)}
        groups = torch.Size((shape[0], shape[1] // block))
        if nested and f"{name}_dq" in formats.formats and _same(*inner):
            slots |= {"scales": absmax.view(groups), "global_scale": spread(inner[1], inner[0], groups)}
            yield layer(path, shape, f"{name}_dq", slots, bias, dtype=_DTYPES[state["dtype"]], note=said)
            return
        if name in formats.formats:
            slots["scales"] = (_absmax(absmax, inner) if nested else absmax).view(groups)
            yield layer(path, shape, name, slots, bias, dtype=_DTYPES[state["dtype"]], note=said)
            return
    scales = _absmax(absmax, inner) if nested else absmax
    values = torch.nn.functional.pad(table[codes.long()], (0, -count % block)).view(-1, block) * scales[:, None]
    values = values.reshape(-1)[:count].reshape(shape)
    if len(shape) == 2 and weight.endswith(".weight"):
        yield from floats(path, values, bias, f"dequantized: {said} in blocks of {block}")
    else:
        yield Plain(weight, values, f"dequantized: {said} in blocks of {block}")
        if f"{path}.bias" in source.shapes:
            yield Plain(f"{path}.bias", source.read(f"{path}.bias"))


def _nested(source: Source, weight: str, state: dict[str, Any], blocks: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """(maxima of chunks, offset, table of 256, blocks per chunk) of absmax that are codes themselves."""
    chunk, offset = state.get("nested_blocksize"), state.get("nested_offset")
    whole = type(chunk) is int and 0 < chunk <= 1 << 20
    if not whole or type(offset) not in (int, float) or not -1e38 < offset < 1e38:
        raise BadCheckpoint(f"{source.where}: the state of {weight!r} lacks nested_blocksize or nested_offset")
    check(source, f"{weight}.nested_absmax", (-(-blocks // chunk),), torch.float32)
    check(source, f"{weight}.nested_quant_map", (256,), torch.float32)
    maxima, table = (
        finite(source, f"{weight}.{leaf}", source.read(f"{weight}.{leaf}"))
        for leaf in ("nested_absmax", "nested_quant_map")
    )
    return maxima, torch.tensor(offset, dtype=torch.float32), table, chunk


def _same(maxima: Tensor, offset: Tensor, table: Tensor, chunk: int) -> bool:
    """Whether the inner quantization is the one that nf4_g…_dq knows."""
    return chunk == CHUNK and torch.equal(table, torch.tensor(DYNAMIC8.values))


def _absmax(codes: Tensor, inner: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """(B,) float32 from codes (B,) uint8."""
    maxima, offset, table, chunk = inner
    return table[codes.long()] * maxima.repeat_interleave(chunk)[: len(codes)] + offset


def _state(source: Source, name: str) -> dict[str, Any]:
    check(source, name, None, torch.uint8)
    if len(source.shapes[name]) != 1 or source.shapes[name][0] > _LONGEST_STATE:
        raise BadCheckpoint(f"{source.where}: {name!r} of shape {list(source.shapes[name])} is no short text")
    state = parse(bytes(source.read(name).tolist()), f"{source.where}: {name}")
    kind, block, shape = state.get("quant_type"), state.get("blocksize"), state.get("shape")
    right = (
        isinstance(kind, str)
        and kind in _TABLES
        and type(block) is int
        and block in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        and isinstance(shape, list)
        and 0 < len(shape) <= 8
        and all(type(i) is int and 0 < i <= 1 << 32 for i in shape)
        and isinstance(state.get("dtype"), str)
        and state["dtype"] in _DTYPES
    )
    if not right:
        raise BadCheckpoint(f"{source.where}: {name!r} describes no 4-bit weight: {str(state)[:200]}")
    return state


importers.add("bitsandbytes", BitsAndBytes())
