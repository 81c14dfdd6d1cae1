"""`open_source(path)`: a safetensors file, a folder of shards, or a GGUF file, checked as a whole and then read one tensor at a time.

Headers are checked by `qgen.io.files` before a byte of data is read. A tensor is read into memory of its own: nothing stays mapped, so what
is resident is what the caller holds. Refused with what to do instead: pickles, which run code; links out of a folder, which a stranger's
archive may point anywhere; whole pipelines, which hold several models. A hub snapshot, whose links lead into its own blobs, is read.
"""

__all__ = ["SafetensorsSource", "json_beside", "open_source"]

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, QgenError, unknown
from qgen.io.files import STEMS, Files, _shards, _weight_map, parse, scan, scan_files
from qgen.io.peers.base import Source

PICKLES = (".pt", ".ckpt", ".bin", ".pth", ".pkl", ".pickle")
_PICKLED = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_LONGEST_LINE = 1000
_MOST_JSON = 64 << 20  # bytes of a config.json or an index


class SafetensorsSource:
    """The tensors of safetensors files whose headers have been checked. Fields as in `Source`, names in the files' order.

    files: who holds what. where: the file or folder that was asked for.
    """

    def __init__(self, files: Files, where: Path, config: dict[str, Any] | None = None):
        self.files, self.where, self.config = files, where, config or {}
        self.metadata: dict[str, str] = {}
        for texts in files.metadata.values():
            self.metadata = {**texts, **self.metadata}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._at: dict[str, int] = {}
        for path in files.metadata:
            for name, at in _offsets(path):
                entry = files.tensors.get(name)
                if entry is None or entry.file != path:
                    raise BadCheckpoint(f"{path}: changed while it was opened: {name!r} was not there before")
                self._at[name], self.shapes[name], self.dtypes[name] = at, entry.shape, entry.dtype

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own. ValueError for an unknown name, BadCheckpoint if the file became shorter."""
        if name not in self._at:
            raise ValueError(unknown("tensor", name, self._at))
        path, dtype, shape = self.files.tensors[name].file, self.dtypes[name], self.shapes[name]
        raw = torch.empty(nbytes(shape, dtype), dtype=torch.uint8)
        if raw.numel():
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(self._at[name])
                    _fill(file, memoryview(raw.numpy()), path, name)
            except OSError as error:
                raise BadCheckpoint(f"{path}: {name!r} cannot be read: {error}") from error
        if dtype == torch.bool:  # any byte may be in a stranger's file, and torch knows two
            return (raw != 0).reshape(shape)
        return raw.view(dtype).reshape(shape)


def open_source(path: str | Path) -> Source:
    """A checked source of tensors: a .safetensors file, a folder with one or with shards and their index, or a .gguf file.

    Raises QgenError if nothing is there, BadCheckpoint if a file is damaged, hostile or a pickle, ValueError if the folder is a pipeline.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise QgenError(f"no file or folder {path}")
        if not path.is_file():
            raise BadCheckpoint(f"{path}: is no ordinary file")
        return _file(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        why = getattr(error, "strerror", None) or error
        raise QgenError(f"{path}: cannot be read: {str(why)[:200]}") from error


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def json_beside(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is none. BadCheckpoint if it is something else."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MOST_JSON:
        raise BadCheckpoint(f"{path}: is too long for JSON: {path.stat().st_size} bytes")
    return parse(path.read_bytes(), path)


def _file(path: Path) -> Source:
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        from qgen.io.peers.gguf_source import open_gguf

        return open_gguf(path)
    _refuse_pickle(path, start)
    return SafetensorsSource(_checked(path, lambda: scan_files([path])), path, json_beside(path.parent / "config.json"))


def _folder(folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        raise ValueError(
            f"{folder} is a whole pipeline; name one model in it: {', '.join(parts) or 'none has a config.json'}"
        )
    inside = [p for p in sorted(folder.iterdir()) if p.name.endswith((".safetensors", ".safetensors.index.json"))]
    for path in [*inside, folder / "config.json"]:
        _inside(path, folder)
    if any((folder / f"{stem}.safetensors{end}").is_file() for stem in STEMS for end in ("", ".index.json")):
        files = _checked(folder, lambda: scan(folder))
    else:
        files = _checked(folder, lambda: _others(folder, inside))
    return SafetensorsSource(files, folder, json_beside(folder / "config.json"))


def _others(folder: Path, inside: list[Path]) -> Files:
    """Files under other names than diffusers' and transformers': those of an index, else all of them, which must not repeat a tensor."""
    indexes = [path for path in inside if path.name.endswith(".index.json")]
    if len(indexes) == 1:
        return scan_files(_shards(indexes[0]), _weight_map(indexes[0]))
    found = [path for path in inside if path.name.endswith(".safetensors")]
    if found:
        return scan_files(found)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise BadCheckpoint(f"{folder}: holds no safetensors file; name the GGUF file itself: {', '.join(ggufs[:5])}")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES and path.is_file():
            _refuse_pickle(path, b"")
    raise BadCheckpoint(f"{folder}: holds no .safetensors file")


def _checked(where: Path, read: Callable[[], Files]) -> Files:
    """What `read` returns. Errors that quote a stranger's numbers of thousands of digits, or cannot print them, are cut to a line."""
    try:
        return read()
    except ValueError as error:
        if isinstance(error, BadCheckpoint) and len(str(error)) < _LONGEST_LINE:
            raise
        raise BadCheckpoint(f"{where}: its header cannot be read: {str(error)[:200]}") from error


def _refuse_pickle(path: Path, start: bytes) -> None:
    """Pickles by name, or by first bytes, a pickle's or an archive's, that would be a header's length beyond the file."""
    whole = len(start) < 8 or struct.unpack("<Q", start)[0] <= path.stat().st_size
    if path.suffix.lower() in PICKLES or (not whole and (start[:4] == b"PK\x03\x04" or start[:2] in _PICKLED)):
        raise BadCheckpoint(
            f"{path}: is a pickle, which may run any code when it is opened, and qgen opens none: use the .safetensors file of the same "
            "model, or convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )


def _inside(path: Path, folder: Path) -> None:
    """BadCheckpoint if `path` is a link that leads out of the folder; a hub snapshot may point into its own repository's blobs."""
    if not os.path.lexists(path):
        return
    real, home = path.resolve(), folder.resolve()
    if home in real.parents:
        if stat.S_ISREG(real.stat().st_mode):
            return
        raise BadCheckpoint(f"{path}: is no ordinary file")
    for parent in home.parents:
        if parent.name == "snapshots" and real.parent == parent.parent / "blobs":
            return
    raise BadCheckpoint(f"{path}: is a link out of its folder, to {real}; if you trust it, name that file itself")


def _offsets(path: Path) -> Iterator[tuple[str, int]]:
    """(name, byte in the file) in the order of the data, from a header that `scan_files` has checked."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = parse(file.read(length), path)
    header.pop("__metadata__", None)
    starts = {name: claim["data_offsets"] for name, claim in header.items()}
    for name in sorted(starts, key=lambda n: (starts[n], n)):
        yield name, 8 + length + starts[name][0]


def _fill(file: Any, view: memoryview, path: Path, name: str) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            raise BadCheckpoint(f"{path}: became shorter while it was read: {name!r} lacks {len(view) - done} bytes")
        done += count
