"""`qgen inspect CHECKPOINT`: the table of layers from a checkpoint's headers; no weights are read and no model is built."""

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized pipeline, model or module.")],
) -> None:
    """Show per layer what a quantized checkpoint holds, without loading its weights."""
    from rich.console import Console

    from qgen.show.summary import table

    console = Console()
    console.print(table(read(checkpoint), console.width))


def read(folder: Path) -> Any:
    """The `Summary` of a checkpoint's headers. Kernels are those of the computer that saved it. QgenError for anything else."""
    from qgen.cli.common import parts, quantized
    from qgen.errors import QgenError
    from qgen.io.files import scan
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
