"""qgen's own checkpoint as parts, and parts as qgen's own checkpoint, one tensor at a time.

The folder is the one that `qgen.save` writes and `qgen.load` and `from_pretrained` read: safetensors with the header of `qgen.io.header`
(layouts, and sha256 of each tensor, summed on the way) and, where the model's config is known, config.json.
"""

__all__ = ["QgenExporter", "QgenImporter"]

import json
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.io.atomic import staged
from qgen.io.config import QGenConfig
from qgen.io.files import Entry, Files, digest
from qgen.io.header import KEY, Header, LayerEntry, header_of, verify
from qgen.io.parts import Reported, check, to_json
from qgen.io.peers.base import Layer, Model, Plain, Source, exporters, importers
from qgen.io.peers.writer import SafetensorsWriter
from qgen.nn.packed import STORED
from qgen.recipe import Recipe

_ROOM_PER_TENSOR = 400  # bytes of header: name, place, sha256, a layer's share of layout and report


class QgenImporter:
    about = "qgen's own checkpoint"

    def recognizes(self, source: Source) -> bool:
        return KEY in source.metadata

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        """Every tensor is compared with its sha256. Tensors that are tied to others come last, as copies."""
        header = self.header(source)
        rows = {row.get("path"): row for row in header.report if isinstance(row, dict)}
        told = {path for path, row in rows.items() if _kernel_shape(row)}
        missing = any(entry.kind != "linear" and entry.path not in told for entry in header.layers)
        model = _convolutions(source, header) if missing else None

        def read(name: str) -> Tensor:
            tensor = source.read(name)
            verify(name, tensor, header, source.where)
            return tensor

        owner = {}
        for entry in header.layers:
            prefix = entry.path + "." if entry.path else ""
            owner |= {prefix + slot: (entry, slot) for slot in STORED if prefix + slot in header.tensors}
        done = set()
        for name in source.shapes:
            if name not in owner:
                yield Plain(name, read(name))
                continue
            entry, _ = owner[name]
            if entry.path in done:
                continue
            done.add(entry.path)
            prefix = entry.path + "." if entry.path else ""
            slots = {slot: read(prefix + slot) for slot in STORED if owner.get(prefix + slot, (None,))[0] is entry}
            row = rows.get(entry.path, {})
            shape = _shape(entry, slots, row, model, source)
            yield check(Reported(entry.path, shape, entry.layout, slots, entry.dtype, "", row))
        for name, other in sorted(header.aliases.items()):
            yield Plain(name, read(other), f"tied to {other}")

    def header(self, source: Source) -> Header:
        """The header, checked against the tensors that are there."""
        entries = {name: Entry(source.where, source.dtypes[name], shape) for name, shape in source.shapes.items()}
        return header_of(Files(entries, {source.where: source.metadata}), source.where)


def _shape(entry: LayerEntry, slots: dict[str, Tensor], row: dict, model: Any, source: Source) -> tuple[int, ...]:
    """Shape of the float weight. Codes may be padded along K: the report, or a slot that is not, tells the true K."""
    if slots["codes"].ndim != 2:
        raise BadCheckpoint(
            f"{source.where}: {entry.path!r}: codes have the shape {tuple(slots['codes'].shape)}, wanted (N, bytes)"
        )
    n, width = slots["codes"].shape
    if entry.kind != "linear" and (said := _kernel_shape(row)) and said[0] == n:
        return said
    if entry.kind == "conv2d":
        layer = dict(model.named_modules()).get(entry.path)
        if not isinstance(layer, torch.nn.Conv2d):
            raise BadCheckpoint(f"{source.where}: {entry.path!r} is no convolution in {type(model).__name__}")
        return tuple(layer.weight.shape)
    widest = width * 8 // formats.get(entry.layout.weight).bits
    unpadded = next(
        (
            slots[slot].shape[-1]
            for slot in ("smooth", "down", "t_shift", "known_x")
            if slot in slots and slots[slot].ndim
        ),
        None,
    )
    said = row.get("shape")
    if unpadded is None and isinstance(said, list) and len(said) == 2 and said[0] == n and type(said[1]) is int:
        unpadded = said[1]
    return (n, unpadded if unpadded is not None and 0 < unpadded <= widest else widest)


def _kernel_shape(row: dict) -> tuple[int, ...]:
    """Shape of a convolution's weight as its row tells it, () if it does not."""
    said = row.get("weight_shape")
    right = (
        isinstance(said, list)
        and 3 <= len(said) <= 5
        and all(type(size) is int and 0 < size < 1 << 24 for size in said)
    )
    return tuple(said) if right else ()


def _convolutions(source: Source, header: Header) -> Any:
    """The model on meta: files keep convolutions unfolded, and only the model knows their kernels."""
    from qgen.io.checkpoint import _build

    if header.model.get("library") not in ("diffusers", "transformers"):
        raise BadCheckpoint(
            f"{source.where}: has convolutions, whose kernels only its model knows; load it with into=, export the model"
        )
    folder = source.where if source.where.is_dir() else source.where.parent
    return _build(folder, header)


class QgenExporter:
    """`about.metadata` may hold "recipe", a Recipe as JSON, to be kept with the checkpoint."""

    about = "qgen's own checkpoint: a folder for qgen.load and from_pretrained"

    def write(self, parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        """Writes the folder `target`; every layer is kept as it is. Memory: the largest part."""
        config = {key: value for key, value in about.config.items() if key != "quantization_config"}
        library = "diffusers" if "_class_name" in config else "transformers" if "architectures" in config else "torch"
        text = about.metadata.get("recipe")
        recipe = Recipe.from_json(text) if text else Recipe(None, name="unknown", about="imported")
        name = "diffusion_pytorch_model" if library == "diffusers" else "model"
        layers: list[LayerEntry] = []
        report: list[dict] = []
        sums: dict[str, str] = {}
        dtypes: dict[torch.dtype, int] = {}
        with staged(Path(target)) as stage:
            room = 8192 + _ROOM_PER_TENSOR * min(operator.length_hint(parts, 0), 1 << 16)
            with SafetensorsWriter(stage / f"{name}.safetensors", {"format": "pt"}, room=room) as writer:
                for part in parts:
                    for key, tensor in _tensors(part):
                        writer.add(key, tensor)
                        sums[key] = digest(tensor)
                    dtype = part.tensor.dtype if isinstance(part, Plain) else part.dtype
                    if dtype.is_floating_point and dtype.itemsize > 1:
                        dtypes[dtype] = dtypes.get(dtype, 0) + 1
                    if isinstance(part, Layer):
                        layers.append(LayerEntry(part.path, part.kind, part.layout, part.dtype))
                        report.append(_row(part))
                usual = max(dtypes, key=dtypes.__getitem__, default=torch.float32)
                model = {"library": library, "class": about.kind, "dtype": str(usual)[6:]}
                header = Header(tuple(layers), dict(sorted(sums.items())), model=model, recipe=recipe, report=report)
                writer.metadata[KEY] = header.to_json()
            if config:
                config["quantization_config"] = QGenConfig(recipe).to_dict()
                (stage / "config.json").write_text(to_json(config), encoding="utf-8")
        return []


def _tensors(part: Layer | Plain) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Plain):
        yield part.name, part.tensor
        return
    prefix = check(part).path + "." if part.path else ""
    yield from ((prefix + slot, part.slots[slot]) for slot in STORED if slot in part.slots)


def _row(layer: Layer) -> dict:
    """The report's row of a layer; what the layer itself says, where nobody reported."""
    k = 1
    for size in layer.shape[1:]:
        k *= size
    made = {
        "path": layer.path,
        "kind": layer.kind,
        "shape": [layer.shape[0], k],
        "spec": f"{layer.layout.weight} x {layer.layout.act or 'float'}",
        "nbytes": sum(t.nbytes for t in layer.slots.values()),
        "bytes16": 2 * (layer.shape[0] * k + (layer.shape[0] if "bias" in layer.slots else 0)),
        "why": layer.note,
    }
    if layer.kind != "linear":
        made["weight_shape"] = list(layer.shape)
    given = {key: value for key, value in getattr(layer, "row", {}).items() if key != "kernel"}
    return json.loads(json.dumps({**made, **given}, default=str))


importers.add("qgen", QgenImporter())
exporters.add("qgen", QgenExporter())
