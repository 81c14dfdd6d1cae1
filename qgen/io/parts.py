"""Parts of whatever is at hand, each in turn: of a peer's file, of a live module; and from packed layers back to floats.

float weight = residual · Hᵀ / smooth + up · down          float bias = bias + residual · ((shift / smooth) H)
"""

__all__ = [
    "Parts", "Reported", "check", "component", "config_of", "floats", "importer_for", "model_of", "of_module", "to_json", "unknown_file",
    "untimed",
]  # fmt: skip

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.errors import BadCheckpoint
from qgen.io.files import parse
from qgen.io.header import refuse_channel_scales
from qgen.io.peers.base import Importer, Layer, Model, Plain, Source, importers
from qgen.io.peers.floats import dequantized
from qgen.io.peers.source import json_beside
from qgen.nn.known import KNOWN
from qgen.nn.packed import BESIDE, FLOAT_SLOTS, Packed
from qgen.nn.parted import whole_path

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_TIMED = "{!r} has tables over timesteps, which no other format holds: quantize with bins=1 and export that"
_KNOWN = "{!r} keeps outputs of known rows, which no other format holds: quantize without the method start-token and export that"


@dataclass(frozen=True)
class Reported(Layer):
    """A layer with its row of the report, as in `module.qgen_report`."""

    row: dict = field(default_factory=dict)


class Parts(Iterator[Layer | Plain]):
    """An iterator that guesses its length, so that a writer can leave room for as many names."""

    def __init__(self, parts: Iterable[Layer | Plain], count: int):
        self._parts, self._count = iter(parts), count

    def __next__(self) -> Layer | Plain:
        return next(self._parts)

    def __length_hint__(self) -> int:
        return self._count


def importer_for(source: Source) -> tuple[str, Importer] | None:
    """The importer that recognizes a file, and its name; qgen's own first, then in alphabetical order. None if none does."""
    for name, importer in sorted(importers.items(), key=lambda item: (item[0] != "qgen", item[0])):
        if importer.recognizes(source):
            return name, importer
    return None


def unknown_file(source: Source) -> str:
    """One line for a file that no importer recognizes: what was found in it, and what could be read."""
    kinds: dict[str, int] = {}
    for dtype in source.dtypes.values():
        kinds[str(dtype)[6:]] = kinds.get(str(dtype)[6:], 0) + 1
    counted = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items(), key=lambda item: -item[1]))
    names = ", ".join(repr(name[:60]) for name in list(source.shapes)[:3])
    known = "; ".join(f"{name}: {importer.about}" for name, importer in importers.items())
    held = f"{len(source.shapes)} tensors ({counted}), {names}, …" if source.shapes else "no tensor"
    return f"{source.where}: is of no kind of quantized file that qgen knows; found {held}. Importers: {known}"


def model_of(source: Source) -> Model:
    """What a file says about its model: config.json beside it, or the texts that single files carry."""
    config = dict(source.config)
    text = source.metadata.get("config")
    if not config and text:
        config = parse(text, source.where)
    names = config.get("architectures")
    kind = (
        config.get("_class_name")
        or source.metadata.get("model_class")
        or (names[0] if isinstance(names, list) and names else "")
    )
    config.pop("quantization_config", None)
    return Model(kind if isinstance(kind, str) else "", config)


def of_module(module: nn.Module, timed: bool = False) -> Parts:
    """The parts of a live module: its packed layers in canonical layout, then everything else in its state dict.

    timed: whether layers with tables over timesteps or known rows are parts too, as qgen's own checkpoint holds them; else they are a
    ValueError.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, Packed)}
    rows = {row.get("path"): row for row in getattr(module, "qgen_report", None) or () if isinstance(row, dict)}

    def parts() -> Iterator[Layer | Plain]:
        for path, layer in layers.items():
            if layer.codes.device.type == "meta":
                raise ValueError(f"{path!r} is offloaded and has no data here: remove offloading hooks, then export")
            if not timed:
                _plain(path, {slot for slot in BESIDE if getattr(layer, slot) is not None})
            refuse_channel_scales(path, layer)
            shape, slots = tuple(layer._weight_shape()), {name: t.cpu() for name, t in layer.canonical().items()}
            yield Reported(path, shape, layer.layout, slots, layer.compute_dtype, "", rows.get(path, {}))
        inside = tuple(path + "." for path in layers)
        for name, tensor in module.state_dict().items():
            if not name.startswith(inside) and isinstance(tensor, Tensor):
                yield Plain(name, tensor.detach())

    return Parts(parts(), 8 * len(layers))


def untimed(parts: Iterable[Layer | Plain]) -> Iterator[Layer | Plain]:
    """The parts, for whoever cannot hold tables over timesteps nor known rows; ValueError at a layer that has some."""
    for part in parts:
        if isinstance(part, Layer):
            _plain(part.path, part.slots.keys())
        yield part


def _plain(path: str, slots: Iterable[str]) -> None:
    """ValueError where one of a layer's slots stands beside its op, or the layer is a part of one."""
    if whole := whole_path(path):
        raise ValueError(f"{whole!r} is quantized in parts, which no other format holds: quantize without split first")
    for slot in slots:
        if slot in BESIDE:
            raise ValueError((_KNOWN if slot in KNOWN else _TIMED).format(path))


def check(layer: Layer) -> Layer:
    """The layer itself; BadCheckpoint unless each slot has the shape and dtype that the layout wants."""
    k = 1
    for size in layer.shape[1:]:
        k *= size
    wanted = layer.layout.empty(layer.shape[0], k, layer.dtype)
    for slot in sorted(wanted.keys() ^ layer.slots.keys()):
        raise BadCheckpoint(f"{layer.path!r}: its layout {'wants' if slot in wanted else 'lacks'} the slot {slot!r}")
    for slot, like in wanted.items():
        found = layer.slots[slot]
        right = found.dtype == like.dtype or (slot in FLOAT_SLOTS and found.dtype in _FLOATS)
        if not right or (found.shape != like.shape and not (slot == "shift" and tuple(found.shape) in ((), (k,)))):
            told = f"{str(found.dtype)[6:]} {tuple(found.shape)}"
            raise BadCheckpoint(f"{layer.path!r}: {slot} is {told}, wanted {str(like.dtype)[6:]} {tuple(like.shape)}")
    return layer


def floats(parts: Iterable[Layer | Plain], dtype: torch.dtype | None = None) -> Iterator[Plain]:
    """Every packed layer as its float weight and bias; ordinary tensors as they are."""
    for part in untimed(parts):
        if isinstance(part, Plain):
            yield part
            continue
        weight, bias = dequantized(check(part))
        prefix = part.path + "." if part.path else ""
        yield Plain(f"{prefix}weight", weight.to(dtype or part.dtype), f"dequantized: {part.layout.weight}")
        if bias is not None:
            yield Plain(f"{prefix}bias", bias.to(dtype or part.dtype))


def to_json(data: Any) -> str:
    """JSON text that depends on the content alone."""
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def config_of(module: nn.Module) -> dict:
    """config.json's content of a model of diffusers or transformers, {} for others."""
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):  # transformers
        return {**config.to_dict(), "architectures": [type(module).__name__]}
    if hasattr(module, "to_json_string") and hasattr(module, "config_name"):  # diffusers
        return json.loads(module.to_json_string())
    return {}


def component(path: Path) -> Path:
    """The folder of a pipeline's only quantized component; other paths as they are."""
    if not (path / "model_index.json").is_file():
        return path
    found = [
        config.parent
        for config in sorted(path.glob("*/config.json"))
        if isinstance(json_beside(config).get("quantization_config"), dict)
    ]
    if len(found) != 1:
        names = ", ".join(part.name for part in found) or "none of its components is quantized"
        raise ValueError(f"{path} is a pipeline; name one quantized component in it: {names}")
    return found[0]
