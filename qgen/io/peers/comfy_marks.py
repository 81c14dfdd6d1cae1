"""ComfyUI's marks: how a file says which of its layers are quantized, and how.

    X.comfy_quant              uint8 tensor of JSON {"format": "nvfp4", …} beside the tensors of the layer X: what stock ComfyUI loads, and
                               what qgen writes
    _quantization_metadata     a text of the header, JSON {"format_version": "1.0", "layers": {X: {"format": …}}}: the same in one place
    scaled_fp8                 an older mark, an empty float8 tensor: every layer with an `X.scale_weight` is float8 with one scale

All three were checked against the running server. Names and JSON are untrusted: they are bounded, parsed once, and must be of this shape.
"""

__all__ = ["Mark", "is_mark", "marked", "marks", "tensor"]

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.files import parse
from qgen.io.peers.base import Source

SUFFIX, METADATA, OLD = "comfy_quant", "_quantization_metadata", "scaled_fp8"
_LONGEST = 1 << 16  # bytes of one layer's JSON, which is some thirty
_OLD_NAMES = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
_FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


@dataclass(frozen=True)
class Mark:
    """What a file says of one layer. format: ComfyUI's name. options: the rest of the JSON. names: of tensors with other names."""

    format: str
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def marked(source: Source) -> bool:
    """Whether the file bears any of the marks."""
    return METADATA in source.metadata or any(is_mark(name) for name in source.shapes)


def is_mark(name: str) -> bool:
    """Whether a tensor is a mark and no part of the model."""
    return name.rpartition(".")[2] in (SUFFIX, OLD)


def marks(source: Source) -> dict[str, Mark]:
    """The marks of all layers, by the layer's path. BadCheckpoint if one cannot be read, or if two differ."""
    found = _from_metadata(source)
    if any(name.rpartition(".")[2] == OLD for name in source.shapes):
        found |= _from_old(source)
    for name in source.shapes:
        path, _, leaf = name.rpartition(".")
        if leaf == SUFFIX:
            mark = _from_tensor(source, name)
            if found.setdefault(path, mark).format != mark.format:
                raise BadCheckpoint(
                    f"{source.where}: {name!r} says {mark.format}, the header says {found[path].format}"
                )
            found[path] = mark
    return found


def tensor(format: str, **options: Any) -> Tensor:
    """The `comfy_quant` tensor for a layer, uint8."""
    text = json.dumps({"format": format, **options}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def _from_tensor(source: Source, name: str) -> Mark:
    shape, dtype = source.shapes[name], source.dtypes[name]
    if dtype != torch.uint8 or len(shape) != 1 or not 0 < shape[0] <= _LONGEST:
        raise BadCheckpoint(
            f"{source.where}: {name!r} wants 1 to {_LONGEST} bytes of JSON, found {str(dtype)[6:]} {list(shape)[:9]}"
        )
    return _mark(bytes(source.read(name).tolist()), source, name)


def _from_metadata(source: Source) -> dict[str, Mark]:
    text = source.metadata.get(METADATA)
    if text is None:
        return {}
    layers = _parse(text, source, METADATA).get("layers")
    if not isinstance(layers, dict):
        raise BadCheckpoint(f"{source.where}: {METADATA!r} wants an object 'layers', found {type(layers).__name__}")
    return {path: _checked(data, source, f"{METADATA}: {path}") for path, data in layers.items()}


def _from_old(source: Source) -> dict[str, Mark]:
    found = {}
    for name in source.shapes:
        path, _, leaf = name.rpartition(".")
        if leaf == "scale_weight":
            format = _FLOAT8.get(source.dtypes.get(f"{path}.weight" if path else "weight"))
            if format is None:
                raise BadCheckpoint(f"{source.where}: {name!r} belongs to a float8 weight, which the file lacks")
            found[path] = Mark(format, names=_OLD_NAMES)
    return found


def _mark(text: bytes, source: Source, name: str) -> Mark:
    return _checked(_parse(text, source, name), source, name)


def _parse(text: str | bytes, source: Source, name: str) -> dict:
    try:
        return parse(text, source.where)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{error} in {name[:200]!r}") from None


def _checked(data: Any, source: Source, name: str) -> Mark:
    format = data.get("format") if isinstance(data, dict) else None
    if not isinstance(format, str):
        raise BadCheckpoint(f"{source.where}: {name[:200]!r} wants an object with 'format', found {str(data)[:80]}")
    return Mark(format, {key: value for key, value in data.items() if key != "format"})
