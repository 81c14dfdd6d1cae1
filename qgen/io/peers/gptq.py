r"""GPTQ in (AutoGPTQ, GPTQModel): whole-number codes in int32 words, packed along the inputs.

    qweight int32 (K·b/32, N)   bit stream down each column, b = 2, 3, 4 or 8
    qzeros  int32 (G, N·b/32)   bit stream along N; "gptq" stores z - 1, "gptq_v2" stores z
    scales  (G, N)              w[n, k] = scales[g[k], n] · (q - z)
    g_idx   int32 (K,)          group of each column; in order unless the file was made with desc_act

Columns in order stay packed: symmetric ones (z = 2^(b-1)) as int{b}_g…, others as uint{b}z_g…. Reordered ones are dequantized, as qgen's
blocks are neighbours. Frantar et al., 2022, https://arxiv.org/abs/2210.17323 · https://github.com/AutoGPTQ/AutoGPTQ
"""

__all__ = ["GPTQ"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.layers import Whole, bias_of, check, compute_dtype, emit, finite, floats, stream, words_to_bits

_WIDTHS = (2, 3, 4, 8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class GPTQ:
    """The importer."""

    about = "GPTQ (AutoGPTQ, GPTQModel): 2, 3, 4 and 8 bits in int32 words"

    def recognizes(self, source: Source) -> bool:
        method = _config(source).get("quant_method")
        return method == "gptq" if method is not None else any(_fits(source, path) for path in triples(source))

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        config = _config(source)
        kind = config.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise BadCheckpoint(
                f"{source.where}: is GPTQ in the layout {str(kind)[:40]!r}; qgen reads gptq and gptq_v2: convert it with GPTQModel"
            )
        layers = layers_of(source)
        return stream(source, layers, lambda path: _parts(source, path, config, kind == "gptq"))


def triples(source: Source) -> list[str]:
    """Paths that have qweight, qzeros and scales: what GPTQ and AWQ files share."""
    paths = [name.removesuffix(".qweight") for name in source.shapes if name.endswith(".qweight")]
    return [path for path in paths if f"{path}.qzeros" in source.shapes and f"{path}.scales" in source.shapes]


def layers_of(source: Source) -> dict[str, tuple[str, ...]]:
    """{path: names of all its tensors} of the layers; BadCheckpoint if one lacks its zero points or scales."""
    layers = {}
    for path in (name.removesuffix(".qweight") for name in source.shapes if name.endswith(".qweight")):
        for leaf in ("qzeros", "scales"):
            check(source, f"{path}.{leaf}", None)
        names = (f"{path}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx", "bias"))
        layers[path] = tuple(name for name in names if name in source.shapes)
    return layers


def _config(source: Source) -> dict[str, Any]:
    found = source.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _fits(source: Source, path: str) -> bool:
    """Whether a triple is GPTQ's by its shapes: qweight is as wide as scales."""
    words, scales = source.shapes[f"{path}.qweight"], source.shapes[f"{path}.scales"]
    return source.dtypes[f"{path}.qweight"] == torch.int32 and len(words) == len(scales) == 2 and words[1] == scales[1]


def _parts(source: Source, path: str, config: dict[str, Any], minus_one: bool) -> Iterator[Layer | Plain]:
    check(source, f"{path}.qweight", None, torch.int32)
    check(source, f"{path}.scales", None, *_FLOATS)
    if not _fits(source, path) or not all(source.shapes[f"{path}.scales"]):
        raise BadCheckpoint(
            f"{source.where}: {path + '.qweight'!r} of shape {list(source.shapes[f'{path}.qweight'])} does not fit its scales"
        )
    rows = source.shapes[f"{path}.qweight"][0]
    groups, n = source.shapes[f"{path}.scales"]
    bits = _bits(source, path, config, rows, n)
    k = rows * 32 // bits
    block = _block(source, path, config, k, groups)
    check(source, f"{path}.qzeros", (groups, n * bits // 32), torch.int32)
    scales = finite(source, f"{path}.scales", source.read(f"{path}.scales")).T.contiguous()
    codes = words_to_bits(source.read(f"{path}.qweight").T, bits, k)  # (N, K)
    zero = words_to_bits(source.read(f"{path}.qzeros"), bits, n).T
    if minus_one:
        zero = (zero + 1) & ((1 << bits) - 1)  # 2^b - 1 is what is left of z = 0
    bias = bias_of(source, path, n)
    index = _order(source, path, k, groups, block)
    if index is not None:
        values = (codes.float() - zero.float()[:, index]) * scales.float()[:, index]
        yield from floats(path, values, bias, f"dequantized: GPTQ of {bits} bits with reordered columns")
        return
    whole = symmetric(codes, bits, block, scales, zero)
    yield from emit(path, whole, bias=bias, dtype=compute_dtype(scales), said=f"GPTQ of {bits} bits")


def symmetric(codes: Tensor, bits: int, block: int, scales: Tensor, zero: Tensor) -> Whole:
    """Signed codes where all zero points are in the middle, else unsigned ones."""
    middle = 1 << (bits - 1)
    if bool((zero == middle).all()):
        return Whole((codes.to(torch.int16) - middle).to(torch.int8), bits, block, scales)
    return Whole(codes, bits, block, scales, zero.contiguous())


def _bits(source: Source, path: str, config: dict[str, Any], rows: int, n: int) -> int:
    """Bits per code: those that make g_idx (or zero points) as long as they are; the config must agree."""
    if f"{path}.g_idx" in source.shapes:
        check(source, f"{path}.g_idx", None, torch.int32, torch.int64)
        able = [b for b in _WIDTHS if (rows * 32 // b,) == source.shapes[f"{path}.g_idx"] and rows * 32 % b == 0]
    else:
        able = [b for b in _WIDTHS if (n * b // 32,) == source.shapes[f"{path}.qzeros"][1:] and n * b % 32 == 0]
    said = config.get("bits", able[0] if able else None)
    if not able or said not in able:
        raise BadCheckpoint(
            f"{source.where}: {path + '.qweight'!r} has {rows} rows of words, which are no codes of {said or '2, 3, 4 or 8'} bits"
        )
    return said


def _block(source: Source, path: str, config: dict[str, Any], k: int, groups: int) -> int:
    said = config.get("group_size")
    block = said if type(said) is int and said > 0 else -(-k // max(groups, 1))
    if not 0 < block <= 1 << 24 or -(-k // block) != groups:
        raise BadCheckpoint(
            f"{source.where}: {path + '.scales'!r} has {groups} groups for {k} columns in groups of {block}"
        )
    return block


def _order(source: Source, path: str, k: int, groups: int, block: int) -> Tensor | None:
    """Group of each column, None if they lie in order."""
    if f"{path}.g_idx" not in source.shapes:
        return None
    check(source, f"{path}.g_idx", (k,), torch.int32, torch.int64)
    index = source.read(f"{path}.g_idx").long()
    if torch.equal(index, torch.arange(k) // block):
        return None
    if not bool(((index >= 0) & (index < groups)).all()):
        raise BadCheckpoint(f"{source.where}: {path + '.g_idx'!r} names groups beyond the {groups} that there are")
    return index


importers.add("gptq", GPTQ())
