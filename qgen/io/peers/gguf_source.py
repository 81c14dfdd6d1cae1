r"""A GGUF file as a `Source`: every claim of its header is checked before a byte of a tensor is read or allocated.

    "GGUF" | u32 version | u64 tensors | u64 texts | {key, type, value}… | {name, dims, type, offset}… | padding | data

All little-endian. Dims are written innermost first. A tensor of a block type (Q4_0, Q6_K, …) is handed out as it lies in the file: rows
of bytes, (…, bytes per row) uint8; `types` and `logical` say what they stand for. Tensors lie in the order of the header, each at a
multiple of the alignment, without gaps or overlaps, as ggml itself demands. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

__all__ = ["BLOCK_TYPES", "GGUFSource", "open_gguf"]

import struct
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, unknown

# name: (number in the file, values per block, bytes per block). Q8_1 and Q8_K, ggml's formats of activations, are in no file.
BLOCK_TYPES = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56),
    "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
}  # fmt: skip
PLAIN_TYPES = {
    "F32": (0, torch.float32), "F16": (1, torch.float16), "I8": (24, torch.int8), "I16": (25, torch.int16), "I32": (26, torch.int32),
    "I64": (27, torch.int64), "F64": (28, torch.float64), "BF16": (30, torch.bfloat16),
}  # fmt: skip
_BY_NUMBER = {number: name for name, (number, *_) in (BLOCK_TYPES | PLAIN_TYPES).items()}
_VALUES = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LONGEST_HEADER = 32 << 20  # bytes; vocabularies of language models take some megabytes
_LONGEST_NAME, _LONGEST_TEXT, _KEPT_ITEMS = 1024, 16 << 20, 16
_MOST_DIMS, _DEEPEST = 8, 4  # ggml knows 4 dims; image models' writers have used 5


class GGUFSource:
    """Fields as in `Source`.

    types: name of each tensor's type as in the file, "Q4_K" or "F16". logical: shape of the values a tensor stands for; that of the
    original model where the writer folded it to fill blocks. texts: the file's own keys, arrays of up to 16 numbers as tuples, longer
    ones left out. metadata: the same as texts, which is all that `Source` promises.
    """

    def __init__(self, path: Path):
        self.where, self.config = path, {}
        self.types: dict[str, str] = {}
        self.logical: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._at: dict[str, int] = {}
        with open(path, "rb") as file:
            reader = _Reader(file, path)
            count, keys = _opening(reader)
            self.texts = _texts(reader, keys)
            alignment = self.texts.get("general.alignment", 32)
            if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
                raise BadCheckpoint(
                    f"{path}: general.alignment must be a power of two from 8 to 65536, found {alignment}"
                )
            self._tensors(reader, count, alignment)
        self.metadata = {key: str(value) for key, value in self.texts.items()}
        self._unfold()

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own: numbers, or (…, bytes per row) uint8 of a block type."""
        if name not in self._at:
            raise ValueError(unknown("tensor", name, self._at))
        shape, dtype = self.shapes[name], self.dtypes[name]
        raw = torch.empty(_nbytes(shape, dtype), dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0
        try:
            with open(self.where, "rb", buffering=0) as file:
                file.seek(self._at[name])
                while done < len(view):
                    got = file.readinto(view[done : done + (1 << 30)])
                    if not got:
                        raise BadCheckpoint(f"{self.where}: became shorter while it was read: {name!r} is cut off")
                    done += got
        except OSError as error:
            raise BadCheckpoint(f"{self.where}: {name!r} cannot be read: {error}") from error
        return raw.view(dtype).reshape(shape)

    def _tensors(self, reader: "_Reader", count: int, alignment: int) -> None:
        offsets = {}
        for _ in range(count):
            name = reader.text(_LONGEST_NAME, "a tensor's name")
            if name in offsets or not name:
                raise BadCheckpoint(
                    f"{self.where}: holds the tensor {name!r} twice" if name else f"{self.where}: a tensor has no name"
                )
            offsets[name] = self._claim(reader, name)
        start = -(-reader.at // alignment) * alignment
        end = 0
        for name, offset in offsets.items():
            if offset != end:
                raise BadCheckpoint(f"{self.where}: {name!r} starts at byte {offset} of the data, wanted {end}")
            size = _nbytes(self.shapes[name], self.dtypes[name])
            if start + offset + size > reader.size:
                raise BadCheckpoint(
                    f"{self.where}: is truncated: {name!r} ends at byte {start + offset + size}, the file at {reader.size}"
                )
            self._at[name] = start + offset
            end = offset + -(-size // alignment) * alignment

    def _claim(self, reader: "_Reader", name: str) -> int:
        """Reads dims, type and offset of one tensor; returns the offset."""
        rank = reader.number("I")
        if rank > _MOST_DIMS:
            raise BadCheckpoint(f"{self.where}: {name!r} has {rank} dimensions, at most {_MOST_DIMS} are possible")
        dims = [reader.number("Q") for _ in range(rank)][::-1]
        number, offset = reader.number("I"), reader.number("Q")
        kind = _BY_NUMBER.get(number)
        if kind is None:
            raise BadCheckpoint(f"{self.where}: {name!r} is of type {number}, which this qgen does not know")
        if any(
            not 0 < dim <= reader.size * 64 for dim in dims
        ):  # no type has fewer bits than a 64th of a byte per value
            raise BadCheckpoint(
                f"{self.where}: {name!r} has the shape {dims}, which no file of {reader.size} bytes holds"
            )
        self.types[name], self.logical[name] = kind, tuple(dims)
        if kind in PLAIN_TYPES:
            self.shapes[name], self.dtypes[name] = tuple(dims), PLAIN_TYPES[kind][1]
            return offset
        _, block, nbytes = BLOCK_TYPES[kind]
        if not dims or dims[-1] % block:
            raise BadCheckpoint(
                f"{self.where}: {name!r} is {kind}, whose rows are multiples of {block}, found the shape {dims}"
            )
        self.shapes[name], self.dtypes[name] = (*dims[:-1], dims[-1] // block * nbytes), torch.uint8
        return offset

    def _unfold(self) -> None:
        """Shapes of the original model, where a writer for ComfyUI folded a tensor so that its rows fill blocks."""
        for name, folded in self.logical.items():
            shape = self.texts.get(f"comfy.gguf.orig_shape.{name}")
            if shape is None:
                continue
            whole = isinstance(shape, tuple) and all(type(i) is int and i > 0 for i in shape)
            if not whole or _product(shape) != _product(folded):
                raise BadCheckpoint(f"{self.where}: {name!r} of shape {folded} is said to have been {shape}")
            self.logical[name] = shape


def open_gguf(path: str | Path) -> GGUFSource:
    """A checked source over one GGUF file, with the config.json beside it if there is one. BadCheckpoint if anything is off."""
    from qgen.io.peers.source import json_beside

    source = GGUFSource(Path(path))
    source.config = json_beside(source.where.parent / "config.json")
    return source


class _Reader:
    """Numbers and texts from the start of a file, none beyond its end or `_LONGEST_HEADER`."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path, self.at = file, path, 0
        self.size = file.seek(0, 2)
        file.seek(0)

    def bytes(self, count: int) -> bytes:
        self._room(count)
        found = self.file.read(count)
        if len(found) != count:
            raise BadCheckpoint(f"{self.path}: became shorter while it was read")
        return found

    def skip(self, count: int) -> None:
        self._room(count)
        self.file.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q")
        if length > longest:
            raise BadCheckpoint(f"{self.path}: {what} is said to have {length} bytes, at most {longest} are possible")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError:
            raise BadCheckpoint(f"{self.path}: {what} at byte {self.at - length} is no UTF-8") from None

    def _room(self, count: int) -> None:
        self.at += count
        if self.at > min(self.size, _LONGEST_HEADER):
            raise BadCheckpoint(
                f"{self.path}: is truncated or damaged: its header ends beyond byte {min(self.size, _LONGEST_HEADER)}"
            )


def _opening(reader: _Reader) -> tuple[int, int]:
    """Counts of tensors and of texts. A text takes at least 13 bytes, a tensor 24."""
    if reader.bytes(4) != b"GGUF":
        raise BadCheckpoint(f"{reader.path}: is no GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        swapped = "; it is big-endian, convert it first" if version in (2 << 24, 3 << 24) else ""
        raise BadCheckpoint(f"{reader.path}: is GGUF of version {version}, this qgen reads 2 and 3{swapped}")
    count, keys = reader.number("Q"), reader.number("Q")
    if count > reader.size // 24 or keys > reader.size // 13:
        raise BadCheckpoint(f"{reader.path}: claims {count} tensors and {keys} texts in a file of {reader.size} bytes")
    return count, keys


def _texts(reader: _Reader, keys: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text(_LONGEST_TEXT, "a key")
        if key in found:
            raise BadCheckpoint(f"{reader.path}: {key[:80]!r} appears twice")
        found[key] = _value(reader, key, reader.number("I"), 0)
    return {key: value for key, value in found.items() if value is not None}


def _value(reader: _Reader, key: str, kind: int, depth: int) -> Any:
    """One value; None for an array of texts or of more than `_KEPT_ITEMS` numbers, which is passed over."""
    if kind in _VALUES:
        return reader.number("B") != 0 if kind == 7 else reader.number(_VALUES[kind])
    if kind == _STRING:
        return reader.text(_LONGEST_TEXT, f"the text {key[:80]!r}")
    if kind != _ARRAY or depth == _DEEPEST:
        raise BadCheckpoint(f"{reader.path}: {key[:80]!r} is of type {kind} at depth {depth}, which no reader knows")
    inner, count = reader.number("I"), reader.number("Q")
    if inner in _VALUES:
        size = struct.calcsize("<" + _VALUES[inner])
        if count <= _KEPT_ITEMS:
            return tuple(_value(reader, key, inner, depth) for _ in range(count))
        reader.skip(count * size)
        return None
    if count > reader.size // 8:  # a text or an array takes at least 8 bytes
        raise BadCheckpoint(
            f"{reader.path}: {key[:80]!r} is said to have {count} items in a file of {reader.size} bytes"
        )
    for _ in range(count):
        _value(reader, key, inner, depth + 1)
    return None


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return _product(shape) * dtype.itemsize
