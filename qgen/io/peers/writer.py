"""`SafetensorsWriter`: a safetensors file written tensor by tensor, whole or not at all, the same bytes for the same tensors.

The header comes first in a file and is known last. So room is left for it, data follow as they come, and the header is put in place at the
end; where it outgrew the room, the data are moved up. Readers map files, and torch wants a tensor to start at a multiple of its item's size
without gaps between tensors: those whose bytes are no multiple of 8 wait for the end, widest items first.
"""

__all__ = ["SafetensorsWriter"]

import contextlib
import json
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, QgenError
from qgen.io.files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8  # bytes, the widest item
_ROOM = 16 << 10  # bytes left for a header of unknown length
_CHUNK = 8 << 20
_TAIL_IN_MEMORY = 16 << 20


class SafetensorsWriter:
    """`with SafetensorsWriter(target, metadata) as w: w.add(name, tensor)`.

    Arguments:
        target: the file. It is there, whole, when the block ends without an error, and as it was before otherwise (Ctrl-C included).
        metadata: free texts of the header; `w.metadata` may be changed until the block ends.
        room: bytes to leave for the header; a good guess saves moving the data.

    Raises QgenError in one line if the disk is full or the place cannot be written, BadCheckpoint if a name comes twice, ValueError for a
    dtype that safetensors lacks.
    """

    def __init__(self, target: str | Path, metadata: dict[str, str] | None = None, *, room: int = _ROOM):
        self.target, self.metadata = Path(target), dict(metadata or {})
        self.nbytes = 0  # of data so far
        self._room = 8 + -(-room // _ALIGN) * _ALIGN
        self._names: set[str] = set()
        self._entries: dict[str, dict[str, Any]] = {}
        self._late: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
        self._temporary: Path | None = None
        self._file: IO[bytes] | None = None
        self._tail: IO[bytes] | None = None

    def __enter__(self) -> "SafetensorsWriter":
        try:
            with self._plainly():
                if self.target.is_dir():
                    raise QgenError(f"{self.target} is a folder; name a file")
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self._temporary = self.target.with_name(f".{self.target.name[:200]}.writing-{secrets.token_hex(4)}")
                self._file = open(self._temporary, "x+b")
                self._file.write(b"\0" * self._room)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; it may be dropped afterwards."""
        if self._file is None:
            raise ValueError("tensors are added inside the `with` block of a SafetensorsWriter")
        if name in self._names or name == "__metadata__" or not _encodes(name):
            raise BadCheckpoint(f"{self.target}: cannot hold a tensor called {name!r}: names are UTF-8 and used once")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors cannot hold")
        if tensor.device.type == "meta":
            raise ValueError(f"{name!r} has no data: it is on the meta device")
        self._names.add(name)
        view = _bytes(tensor)
        with self._plainly():
            if len(view) % _ALIGN:
                if self._tail is None:
                    self._tail = tempfile.SpooledTemporaryFile(_TAIL_IN_MEMORY, dir=self.target.parent)  # noqa: SIM115 (closed by __exit__)
                at = self._tail.seek(0, os.SEEK_END)
                self._tail.write(view)
                self._late.append((name, tensor.dtype, tuple(tensor.shape), at, len(view)))
                return
            self._note(name, tensor.dtype, tuple(tensor.shape), len(view))
            self._file.write(view)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with self._plainly():
                    self._finish()
        finally:
            for file in (self._file, self._tail):
                if file is not None:
                    with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                        file.close()
            self._file = self._tail = None
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)

    def _note(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> None:
        claim = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self.nbytes, self.nbytes + size]}
        self._entries[name] = claim
        self.nbytes += size

    def _finish(self) -> None:
        for name, dtype, shape, at, size in sorted(self._late, key=lambda late: (-late[1].itemsize, late[0])):
            self._note(name, dtype, shape, size)
            self._tail.seek(at)
            for start in range(0, size, _CHUNK):
                self._file.write(self._tail.read(min(_CHUNK, size - start)))
        header = {"__metadata__": dict(sorted(self.metadata.items()))} if self.metadata else {}
        text = json.dumps({**header, **self._entries}, separators=(",", ":"), ensure_ascii=False)
        text = text.encode(errors="replace")
        room = max(self._room - 8, -(-len(text) // _ALIGN) * _ALIGN)
        if 8 + room > self._room:
            _move_up(self._file, self._room, self.nbytes, 8 + room - self._room)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", room) + text.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.target)
        self._temporary = None
        if os.name != "nt":  # Windows cannot open folders
            handle = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QgenError(f"could not write {self.target}: {error}; nothing was changed there") from error


def _encodes(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _move_up(file: IO[bytes], start: int, size: int, by: int) -> None:
    """Moves `size` bytes at `start` up by `by` bytes, from the last to the first."""
    for at in reversed(range(0, size, _CHUNK)):
        file.seek(start + at)
        piece = file.read(min(_CHUNK, size - at))
        file.seek(start + at + by)
        file.write(piece)
