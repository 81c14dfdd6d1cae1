"""Safetensors files of strangers: every claim in a header is checked before a byte of data is read.

A file is  u64 length of the header | header, JSON {name: {dtype, shape, data_offsets}} | data.  Sizes must agree with shapes, data must be
gapless and end where the file ends; an index of shards may name files of its own folder only, each tensor once. Nothing is unpickled.
"""

__all__ = ["DTYPES", "Entry", "Files", "canonical_header", "digest", "scan"]

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}  # fmt: skip
STEMS = ("diffusion_pytorch_model", "model")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor is, and what it claims to be."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Files:
    """The tensors of a checkpoint, in one file or several. metadata: free text of each file's header, by file."""

    tensors: dict[str, Entry]
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) pairs, on the CPU, each a copy of its own; one file is open at a time."""
        from safetensors import SafetensorError, safe_open

        for path in self.metadata:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in sorted(name for name, entry in self.tensors.items() if entry.file == path):
                        yield name, file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise BadCheckpoint(f"{path}: cannot be read: {error}") from error


def scan(folder: Path) -> Files:
    """The headers of a folder's safetensors files, checked. BadCheckpoint if there are none or one is damaged."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return scan_files(_shards(index), _weight_map(index))
        if (folder / f"{stem}.safetensors").is_file():
            return scan_files([folder / f"{stem}.safetensors"])
    wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise BadCheckpoint(f"{folder}: holds no checkpoint: wanted {wanted}, alone or as shards with their index")


def scan_files(paths: list[Path], weight_map: dict[str, str] | None = None) -> Files:
    """The headers of given files. weight_map: which file must hold which tensor, {name: file name}."""
    tensors: dict[str, Entry] = {}
    metadata = {}
    for path in paths:
        entries, metadata[path] = _header(path)
        for name, entry in entries.items():
            if name in tensors:
                raise BadCheckpoint(f"{path}: holds {name!r}, which {tensors[name].file.name} holds too")
            tensors[name] = entry
    if weight_map is not None:
        there = {name: entry.file.name for name, entry in tensors.items()}
        for name in sorted(weight_map.keys() ^ there.keys()) or [n for n in sorted(there) if there[n] != weight_map[n]]:
            told, found = weight_map.get(name, "no file"), there.get(name, "no file")
            raise BadCheckpoint(f"{paths[0].parent}: the index says that {told} holds {name!r}, and {found} does")
    return Files(tensors, metadata)


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def canonical_header(path: Path) -> None:
    """Sorts the free text of a file's header, which safetensors writes in an order that changes from run to run."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise BadCheckpoint(f"{path}: its header cannot be put in order: {len(text)} bytes for {length}")
        file.seek(8)
        file.write(text.ljust(length))


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise BadCheckpoint(f"{index}: names the shard {name!r}; shards are safetensors files in the same folder")
        if not (index.parent / name).is_file():
            raise BadCheckpoint(f"{index}: names the shard {name!r}, which is not there")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    data = parse(index.read_bytes(), index)
    found = data.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise BadCheckpoint(
            f"{index}: wanted a map from tensors to files under 'weight_map', found {type(found).__name__}"
        )
    return found


def parse(text: bytes | str, where: Path | str) -> dict:
    """A JSON object without repeated keys; BadCheckpoint otherwise."""

    def once(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            twice = next(a for a, b in itertools.pairwise(keys) if a == b)
            raise BadCheckpoint(f"{where}: {twice!r} appears twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=once, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{where}: wanted JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadCheckpoint(f"{where}: wanted a JSON object, found {type(data).__name__}")
    return data


def _whole(digits: str) -> int:
    """A whole number of JSON; ValueError for one that no file has bytes for, and that would take long to read or print."""
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            raise BadCheckpoint(
                f"{path}: is truncated or no safetensors file: header of {length} bytes in a file of {size}"
            )
        header = parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadCheckpoint(f"{path}: '__metadata__' must map names to texts")
    spans, entries = [], {}
    for name, claim in header.items():
        dtype, shape, span = _claim(name, claim, path)
        spans.append((*span, name))
        entries[name] = Entry(path, dtype, shape)
    end = 0
    for low, high, name in sorted(spans):
        if low != end:
            raise BadCheckpoint(f"{path}: {name!r} starts at byte {low}, wanted {end}")
        end = high
    if end != size - 8 - length:
        raise BadCheckpoint(
            f"{path}: is truncated or damaged: tensors take {end} bytes, the file holds {size - 8 - length}"
        )
    return entries, metadata


def _claim(name: str, claim: object, path: Path) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise BadCheckpoint(f"{path}: wanted dtype, shape and data_offsets for {name!r}, found {str(claim)[:80]}")
    dtype, shape, span = DTYPES.get(str(claim["dtype"])), claim["shape"], claim["data_offsets"]
    if dtype is None:
        raise BadCheckpoint(f"{path}: {name!r} has the dtype {str(claim['dtype'])[:40]!r}; known: {', '.join(DTYPES)}")
    numbers = (
        isinstance(shape, list) and isinstance(span, list) and all(type(i) is int and i >= 0 for i in [*shape, *span])
    )
    if not numbers or len(span) != 2 or len(shape) > 16:
        raise BadCheckpoint(f"{path}: {name!r} has the shape {str(shape)[:80]} at bytes {str(span)[:80]}")
    count = 1
    for i in shape:
        count *= i
    if span[1] - span[0] != count * dtype.itemsize:
        held = span[1] - span[0]
        raise BadCheckpoint(
            f"{path}: {name!r} of shape {shape} takes {count * dtype.itemsize} bytes, the file holds {held}"
        )
    return dtype, tuple(shape), (span[0], span[1])
