r"""AWQ in (AutoAWQ, version "gemm"): 4-bit codes in int32 words, packed along the outputs in an order of their own.

    qweight int32 (K, N/8)   nibble t of word c holds output 8c + order[t], order = 0 2 4 6 1 3 5 7
    qzeros  int32 (G, N/8)   the same order
    scales  (G, N)           w[n, k] = scales[k // g, n] · (q - z)

Other versions (gemv, gemv_fast, marlin) lay out words otherwise and are refused by name.
Lin et al., 2023, https://arxiv.org/abs/2306.00978 · https://github.com/casper-hansen/AutoAWQ
"""

__all__ = ["AWQ"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.gptq import layers_of, symmetric, triples
from qgen.io.peers.layers import bias_of, check, compute_dtype, emit, finite, stream, words_to_bits

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble in which output i of eight lies: the inverse of `order`
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class AWQ:
    """The importer."""

    about = "AWQ (AutoAWQ, gemm): 4 bits in int32 words"

    def recognizes(self, source: Source) -> bool:
        method = _config(source).get("quant_method")
        return method == "awq" if method is not None else any(_fits(source, path) for path in triples(source))

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        config = _config(source)
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise BadCheckpoint(
                f"{source.where}: is AWQ of version {version[:40]!r} with {bits} bits; qgen reads gemm with 4: convert it with AutoAWQ"
            )
        return stream(source, layers_of(source), lambda path: _parts(source, path, config))


def _config(source: Source) -> dict[str, Any]:
    found = source.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _fits(source: Source, path: str) -> bool:
    """Whether a triple is AWQ's by its shapes: eight outputs to a word."""
    words, scales = source.shapes[f"{path}.qweight"], source.shapes[f"{path}.scales"]
    return (
        source.dtypes[f"{path}.qweight"] == torch.int32 and len(words) == len(scales) == 2 and words[1] * 8 == scales[1]
    )


def _parts(source: Source, path: str, config: dict[str, Any]) -> Iterator[Layer | Plain]:
    check(source, f"{path}.qweight", None, torch.int32)
    check(source, f"{path}.scales", None, *_FLOATS)
    if not _fits(source, path) or not all(source.shapes[f"{path}.scales"]) or not source.shapes[f"{path}.qweight"][0]:
        raise BadCheckpoint(
            f"{source.where}: {path + '.qweight'!r} of shape {list(source.shapes[f'{path}.qweight'])} does not fit its scales"
        )
    k = source.shapes[f"{path}.qweight"][0]
    groups, n = source.shapes[f"{path}.scales"]
    said = config.get("group_size", config.get("q_group_size"))
    block = said if type(said) is int and said > 0 else -(-k // groups)
    if -(-k // block) != groups:
        raise BadCheckpoint(
            f"{source.where}: {path + '.scales'!r} has {groups} groups for {k} columns in groups of {block}"
        )
    check(source, f"{path}.qzeros", (groups, n // 8), torch.int32)
    scales = finite(source, f"{path}.scales", source.read(f"{path}.scales")).T.contiguous()
    codes, zero = (_ordered(source.read(f"{path}.{leaf}")) for leaf in ("qweight", "qzeros"))
    whole, bias = symmetric(codes, 4, block, scales, zero), bias_of(source, path, n)
    yield from emit(path, whole, bias=bias, dtype=compute_dtype(scales), said="AWQ")


def _ordered(words: Tensor) -> Tensor:
    """Words (rows, N/8) int32 to codes (N, rows) uint8."""
    nibbles = words_to_bits(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))
    return nibbles[..., list(_PLACE)].flatten(1).T.contiguous()


importers.add("awq", AWQ())
