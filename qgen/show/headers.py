"""The `Summary` of a quantized checkpoint's headers, qgen's own or a peer's; no model is built.

A checkpoint of qgen's tells all in its headers. A peer's importer is run on tensors without data, but for small ones and what stands beside
a layer's codes, which importers look at; where one must look at codes, the file is read once, tensor by tensor.
"""

__all__ = ["ours", "read", "read_peer"]

from pathlib import Path
from typing import Any

_SMALL = 1 << 16  # bytes of a tensor that is read in any case


def read(folder: Path) -> Any:
    """The `Summary` of a checkpoint's headers. Kernels are those of the computer that saved it. QgenError for anything else."""
    from qgen.errors import QgenError
    from qgen.io.files import scan
    from qgen.io.folders import parts, quantized
    from qgen.io.header import header_of
    from qgen.show.rows import Summary, build, totals

    if not folder.is_dir():
        raise QgenError(f"no folder {folder}")
    pipeline = (folder / "model_index.json").is_file()
    found = [part for part in parts(folder) if not pipeline or quantized(part)]
    if not found:
        raise QgenError(f"{folder}: no component was quantized by qgen")
    rows, outputs, rest = [], {}, 0
    for part in found:
        files = scan(part)
        header = header_of(files, part)
        name = part.name if pipeline else ""
        shapes = {row.get("path"): row.get("shape") for row in header.report if isinstance(row, dict)}
        facts = {entry.path: _facts(entry, files.tensors, shapes.get(entry.path)) for entry in header.layers}
        mine, output = build(name, header.report, facts, header.recipe)
        rows += mine
        if output is not None:
            outputs[name or str(header.model.get("class"))] = output
        inside = tuple(row["path"] + "." for row in mine)
        rest += sum(2 * _numel(entry) for path, entry in files.tensors.items() if not path.startswith(inside))
    return Summary(rows, totals(rows, rest, outputs))


def read_peer(path: Path) -> tuple[Any, list[str]]:
    """The `Summary` of any file that an importer recognizes, and lines about its origin. BadCheckpoint if none does."""
    from qgen.errors import BadCheckpoint
    from qgen.io.parts import importer_for, model_of, unknown_file
    from qgen.io.peers.base import Layer
    from qgen.io.peers.source import open_source
    from qgen.show.rows import Summary, build, printable, totals

    source = open_source(path)
    found = importer_for(source)
    if found is None:
        raise BadCheckpoint(unknown_file(source))
    name, importer = found
    facts: dict[str, dict] = {}
    notes: dict[str, int] = {}
    rest = plain = 0
    for part in _parts(importer, source):
        if isinstance(part, Layer):
            facts[part.path] = _facts_of(part)
            continue
        rest, plain = rest + 2 * part.tensor.numel(), plain + 1
        if part.note:
            notes[part.note] = notes.get(part.note, 0) + 1
    rows, _ = build("", None, facts)
    for row in rows:
        row["why"] = printable(facts[row["path"]]["note"])
    kind = model_of(source).kind
    writer = next(
        (source.metadata[k] for k in ("modelspec.architecture", "general.architecture") if k in source.metadata), ""
    )
    lines = [f"{name}: {importer.about}"]
    lines += [f"model: {printable(kind or writer)}"] if kind or writer else []
    lines += [f"{len(facts)} quantized layers and {plain} other tensors"]
    lines += [f"{count} tensors {printable(note)}" for note, count in sorted(notes.items())]
    return Summary(rows, totals(rows, rest, {})), lines


def ours(folder: Path) -> bool:
    """Whether a folder's files have qgen's header; damaged ones have not."""
    from qgen.errors import QgenError
    from qgen.io.header import KEY
    from qgen.io.peers.source import open_source

    try:
        return KEY in open_source(folder).metadata
    except QgenError:
        return False


def _parts(importer: Any, source: Any) -> list:
    """All parts without their data, if the importer can make them so."""
    import torch

    from qgen.io.peers.source import SafetensorsSource, nbytes

    def size(name: str) -> int:
        return nbytes(source.shapes[name], source.dtypes[name])

    largest: dict[str, str] = {}
    for name in source.shapes:
        path = name.rpartition(".")[0]
        if path not in largest or size(name) > size(largest[path]):
            largest[path] = name

    class Sketch:
        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        def read(self, name: str) -> Any:
            if size(name) <= _SMALL or largest[name.rpartition(".")[0]] != name:
                return source.read(name)
            return torch.empty(source.shapes[name], dtype=source.dtypes[name], device="meta")

    try:
        if isinstance(source, SafetensorsSource):
            return list(importer.parts(Sketch()))
    except Exception:  # it looked at values that are not there, or mixed real tensors with empty ones
        pass
    return [_empty(part) for part in importer.parts(source)]


def _empty(part: Any) -> Any:
    from dataclasses import replace

    from qgen.io.peers.base import Layer

    if isinstance(part, Layer):
        return replace(part, slots={slot: t.to("meta") for slot, t in part.slots.items()})
    return replace(part, tensor=part.tensor.to("meta"))


def _facts_of(layer: Any) -> dict:
    """What a layer's own tensors say."""
    n, k = layer.shape[0], 1
    for size in layer.shape[1:]:
        k *= size
    return {
        "kind": layer.kind,
        "shape": [n, k],
        "spec": f"{layer.layout.weight} x {layer.layout.act or 'float'}",
        "nbytes": sum(t.nbytes for t in layer.slots.values()),
        "lowrank_bytes": sum(layer.slots[slot].nbytes for slot in ("down", "up") if slot in layer.slots),
        "bytes16": 2 * (n * k + (n if "bias" in layer.slots else 0)),
        "note": layer.note,
    }


def _facts(entry: Any, tensors: dict, said: Any) -> dict:
    """What a layer's own tensors say. said: the shape in the report, believed where it fits: codes may be padded along K."""
    from qgen.formats import get

    prefix = entry.path + "." if entry.path else ""
    mine = {path[len(prefix) :]: tensor for path, tensor in tensors.items() if path.startswith(prefix)}
    n, width = mine["codes"].shape
    k = width * 8 // get(entry.layout.weight).bits
    if isinstance(said, list) and len(said) == 2 and said[0] == n and type(said[1]) is int and 0 < said[1] <= k:
        k = said[1]
    branch = sum(_numel(mine[slot]) * mine[slot].dtype.itemsize for slot in ("down", "up") if slot in mine)
    return {
        "kind": entry.kind,
        "shape": [n, k],
        "spec": f"{entry.layout.weight} x {entry.layout.act or 'float'}",
        "nbytes": sum(_numel(tensor) * tensor.dtype.itemsize for tensor in mine.values()),
        "lowrank_bytes": branch,
        "bytes16": 2 * (n * k + (n if "bias" in mine else 0)),
    }


def _numel(entry: Any) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count
