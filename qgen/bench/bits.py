"""Bits per weight, counted from a saved file: every tensor whose name starts with a layer's path belongs to that layer.

    bits = 8 · bytes of the layer's tensors / (N · K)

Codes, scales, zero points, low-rank parts, smoothing, codebooks and biases are all counted, whatever a peer calls them. A layer whose
`weight` lies there as a plain float matrix was not quantized.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qgen.errors import BadCheckpoint

__all__ = ["Size", "count"]

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Size:
    """nbytes: of the tensors of the layers to quantize; weights: N · K summed over them; other: bytes of all other tensors; file: of the
    files themselves, headers included. left: layers that were to be quantized and are floats; more: layers quantized beyond those."""

    nbytes: int
    weights: int
    other: int
    file: int
    left: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.weights

    def __add__(self, b: Size) -> Size:
        sums = (self.nbytes + b.nbytes, self.weights + b.weights, self.other + b.other, self.file + b.file)
        return Size(*sums, self.left + b.left, self.more + b.more)


def count(folder: Path, layers: Mapping[str, tuple[int, int]], keep: Iterable[str] = ()) -> Size:
    """Counts the .safetensors and .gguf files of a folder.

    Arguments:
        layers: {path: (N, K)} of the layers that were to be quantized. keep: paths of layers that were to stay float.

    Raises BadCheckpoint if there is no such file, or a layer has no tensor in them.
    """
    tensors: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".safetensors", ".gguf"))
    if not files:
        raise BadCheckpoint(f"{folder} holds no .safetensors and no .gguf file to count")
    for path in files:
        tensors |= _safetensors(path) if path.suffix == ".safetensors" else _gguf(path)
    mine, owner = dict.fromkeys(layers, 0), {}
    for name, (nbytes, _, _) in tensors.items():
        owner[name] = _owner(name, layers)
        if owner[name] is not None:
            mine[owner[name]] += nbytes
    if empty := [path for path, nbytes in mine.items() if not nbytes]:
        raise BadCheckpoint(f"{folder}: no tensor of the layer {empty[0]!r} ({len(empty)} such layers)")

    def is_float(path: str, shape: tuple[int, ...] | None) -> bool:
        _, dtype, found = tensors.get(f"{path}.weight", (0, "", ()))
        return dtype in FLOATS and (shape is None or found == tuple(shape))

    left = tuple(path for path, shape in layers.items() if is_float(path, shape))
    more = tuple(path for path in keep if not is_float(path, None))
    total = sum(nbytes for nbytes, _, _ in tensors.values())
    used = sum(mine.values())
    weights = sum(n * k for n, k in layers.values())
    return Size(used, weights, total - used, sum(p.stat().st_size for p in files), left, more)


def _owner(name: str, layers: Mapping[str, tuple[int, int]]) -> str | None:
    """The layer whose path is a whole beginning of a tensor's name."""
    parts = name.split(".")
    return next((p for p in (".".join(parts[:i]) for i in range(len(parts), 0, -1)) if p in layers), None)


def _safetensors(path: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """{name: (bytes, dtype, shape)} from a file's header alone, of whatever dtype."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        return {
            name: (t["data_offsets"][1] - t["data_offsets"][0], t["dtype"], tuple(t["shape"]))
            for name, t in header.items()
        }
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} is no safetensors file: {error}") from error


def _gguf(path: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    from gguf import GGUFReader

    return {
        t.name: (int(t.n_bytes), t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)))
        for t in GGUFReader(path).tensors
    }
