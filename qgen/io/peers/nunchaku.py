"""Nunchaku's SVDQuant checkpoints, INT4 and NVFP4, to qgen's layers: one file, or a folder of the quantized and the other layers.

The file says which model it is for (its text "config" or "model_class", or config.json beside it); `nunchaku_names` says what that model's
files fuse. Fused layers are split along N, halves are joined along K, interleaved adaLN rows are put in order and the one of `1 + scale` is
taken out of the bias. What the kernels pad to 128 is cut to the sizes that the config tells.
"""

__all__ = ["Nunchaku", "added", "is_lite", "layers_of", "model_config"]

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.files import parse
from qgen.io.peers import nunchaku_packing as packing
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.nunchaku_join import joined
from qgen.io.peers.nunchaku_linear import FORMATS, Linear, floats_of
from qgen.io.peers.nunchaku_names import FAMILIES, Family, Place, family_named
from qgen.io.peers.nunchaku_read import TAILS, read_awq, read_svdq, refuse

_MOST = 1 << 20


@importers.register("nunchaku")
class Nunchaku:
    """Importer of Nunchaku's own files."""

    about = "Nunchaku SVDQuant: INT4 or NVFP4 layers with a low-rank branch, adaLN in W4A16"

    @staticmethod
    def recognizes(source: Source) -> bool:
        if is_lite(source.config):
            return False
        return any(
            name.endswith(".qweight") and source.dtypes[name] == torch.int8 and f"{name[:-8]}.wscales" in source.shapes
            for name in source.shapes
        )

    @staticmethod
    def parts(source: Source) -> Iterator[Layer | Plain]:
        family, config = _family(source)
        layers = layers_of(source)
        owner = {name: stem for stem, names in layers.items() for name in names.values()}
        done: set[str] = set()
        for name in source.shapes:
            stem = owner.get(name)
            if stem is None:
                yield from _plain(source, family, name)
            elif stem not in done:
                done.add(stem)
                yield from _quantized(source, family, config, layers, stem, done)


def layers_of(source: Source) -> dict[str, dict[str, str]]:
    """The quantized layers of a file: {stem: {tail in today's spelling: name of the tensor}}. BadCheckpoint if a tail is there twice."""
    stems = {name.removesuffix(".qweight") for name in source.shapes if name.endswith(".qweight")}
    found: dict[str, dict[str, str]] = {}
    for name in source.shapes:
        stem, _, tail = name.rpartition(".")
        if stem not in stems:
            continue
        tail = TAILS.get(tail, tail)
        other = found.setdefault(stem, {}).setdefault(tail, name)
        if other != name:
            raise BadCheckpoint(f"{source.where}: {name!r} and {other!r} are the same thing")
    return found


def model_config(source: Source) -> dict[str, Any]:
    """The model's config: from the file's text "config", else config.json beside it; {} if there is none."""
    text = source.metadata.get("config")
    return parse(text, source.where) if text else source.config


def is_lite(config: dict[str, Any]) -> bool:
    inner = config.get("quantization_config")
    return isinstance(inner, dict) and inner.get("quant_method") == "nunchaku_lite"


def _family(source: Source) -> tuple[Family, dict[str, Any]]:
    config = model_config(source)
    names = (config.get("_class_name"), source.metadata.get("model_class"), source.config.get("_class_name"))
    family = family_named(*(name for name in names if isinstance(name, str)))
    if family is None:
        known = ", ".join(family.models[0] for family in FAMILIES)
        told = next((f"{name!r}" for name in names if name), "no model")
        raise BadCheckpoint(f"{source.where}: a Nunchaku file for {told}; qgen knows the layers of {known}")
    return family, config


def _quantized(
    source: Source, family: Family, config: dict[str, Any], layers: dict[str, dict[str, str]], stem: str, done: set[str]
) -> Iterator[Layer | Plain]:
    found = family.of_file(stem)
    if found is None:
        yield from _read(source, layers, stem).parts(stem)
        return
    block, place = found
    if place.half is not None:
        yield from _halves(source, family, config, layers, block, place, done)
        return
    linear = _sized(source, config, layers, stem, place)
    if place.turns:
        linear = _in_order(source, linear, place, layers[stem]["qweight"])
    rows = linear.n // len(place.paths)
    if rows * len(place.paths) != linear.n:
        refuse(source, layers[stem]["qweight"], f"rows for {' and '.join(place.paths)}, equally many each")
    for index, path in enumerate(place.paths):
        part = linear if len(place.paths) == 1 else linear.rows(index * rows, (index + 1) * rows)
        yield from part.parts(f"{block}.{path}")


def _halves(
    source: Source,
    family: Family,
    config: dict[str, Any],
    layers: dict[str, dict[str, str]],
    block: str,
    place: Place,
    done: set[str],
) -> Iterator[Layer | Plain]:
    """Both halves of a layer, whichever came first in the file."""
    sides: list[Linear] = []
    for half in sorted(
        (p for p in family.places if p.paths == place.paths and p.half is not None), key=lambda p: p.half
    ):
        spellings = [f"{block}.{name}" for name in (half.file, *half.also)]
        stem = next((stem for stem in spellings if stem in layers), None)
        if stem is None:
            raise BadCheckpoint(
                f"{source.where}: lacks {spellings[0] + '.qweight'!r}, the other half of {block}.{place.paths[0]}"
            )
        done.add(stem)
        sides.append(_sized(source, config, layers, stem, half))
    path = f"{block}.{place.paths[0]}"
    whole = joined(*sides)
    if whole is not None:
        yield from whole.parts(path)
        return
    if sides[0].n != sides[1].n:
        raise BadCheckpoint(f"{source.where}: the halves of {path} have {sides[0].n} and {sides[1].n} outputs")
    yield from _as_one(sides, path)


def _as_one(sides: list[Linear], path: str) -> Iterator[Plain]:
    why = "its halves do not fit into one layer"
    floats = [{p.name: p for p in floats_of(side.layer(path, FORMATS[side.kind]), why)} for side in sides]
    weight = [f[f"{path}.weight"] for f in floats]
    yield replace(weight[0], tensor=torch.cat([part.tensor.to(sides[0].dtype) for part in weight], 1))
    bias = [f[f"{path}.bias"] for f in floats if f"{path}.bias" in f]
    if bias:
        yield replace(bias[0], tensor=sum(part.tensor.float() for part in bias).to(sides[0].dtype))


def _read(source: Source, layers: dict[str, dict[str, str]], stem: str, gelu: bool = False) -> Linear:
    names = layers[stem]
    if source.dtypes[names["qweight"]] == torch.int32:
        return read_awq(source, stem, names)
    return read_svdq(source, stem, names, gelu)


def _sized(
    source: Source, config: dict[str, Any], layers: dict[str, dict[str, str]], stem: str, place: Place
) -> Linear:
    """A layer without the padding of the kernels."""
    linear = _read(source, layers, stem, place.gelu)
    heads, size = (config.get(key) for key in ("num_attention_heads", "attention_head_dim"))
    if linear.kind == "awq" or place.size is None or type(heads) is not int or type(size) is not int:
        return linear
    if not 0 < heads < _MOST or not 0 < size < _MOST:
        refuse(source, layers[stem]["qweight"], f"fewer than {_MOST} heads and channels, and the config tells others")
    hidden, parts = heads * size, len(place.paths)
    n, k = place.size[0] * hidden * parts, place.size[1] * hidden
    if (_up(n), _up(k)) != (linear.n, linear.k):
        refuse(
            source,
            layers[stem]["qweight"],
            f"{n} x {k}, as the config tells, each padded to a multiple of {packing.ROWS}",
        )
    linear = linear if n == linear.n else linear.rows(0, n)
    return linear if k == linear.k else linear.columns(k)


def _up(size: int) -> int:
    return -(-size // packing.ROWS) * packing.ROWS


def _in_order(source: Source, linear: Linear, place: Place, name: str) -> Linear:
    """Rows part after part, and biases without the one of `1 + scale`."""
    if linear.n % place.turns:
        refuse(source, name, f"rows in {place.turns} parts")
    if linear.bias is None:
        refuse(
            source, f"{name.removesuffix('.qweight')}.bias", f"a bias ({linear.n},), which holds the one of 1 + scale"
        )
    linear = linear.reordered(packing.deinterleave(torch.arange(linear.n), place.turns))
    return linear.with_bias(added(linear.bias, place, -1.0))


def added(bias: Tensor, place: Place, one: float) -> Tensor:
    """A bias (N,), part after part, with `one` added to the parts that are scales; in its own dtype, computed in float32."""
    parts = bias.float().reshape(place.turns, -1).clone()
    parts[list(place.scales)] += one
    return parts.flatten().to(bias.dtype)


def _plain(source: Source, family: Family, name: str) -> Iterator[Plain]:
    """An ordinary tensor, split if it is of a layer that the file fuses."""
    stem, _, tail = name.rpartition(".")
    found = family.of_file(stem)
    tensor = source.read(name)
    if found is None or found[1].half is not None or found[1].turns:
        yield Plain(family.to_model(name), tensor)
        return
    block, place = found
    if tensor.ndim == 0 or tensor.shape[0] % len(place.paths):
        refuse(source, name, f"rows for {' and '.join(place.paths)}, equally many each")
    for path, rows in zip(place.paths, tensor.chunk(len(place.paths)), strict=True):
        yield Plain(f"{block}.{path}.{tail}", rows.clone())
