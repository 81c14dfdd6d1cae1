"""The tensors of one marked layer, each checked against what its format wants before it is read."""

__all__ = ["SCALAR", "Found"]

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Source
from qgen.io.peers.comfy_marks import Mark

SCALAR = ((), (1,))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Found:
    """One layer of a file: `found.read("weight_scale", dtypes, shapes)`. Every error is a BadCheckpoint that names the tensor.

    used: suffixes that were read; what is left over is no part of the layer's meaning.
    """

    def __init__(self, source: Source, path: str, mark: Mark):
        self.source, self.path, self.mark = source, path, mark
        self.used: set[str] = set()
        if not self.has("weight"):
            raise BadCheckpoint(f"{source.where}: {self.name('comfy_quant')!r} marks a layer whose weight is absent")

    def name(self, suffix: str) -> str:
        """The whole name in the file."""
        suffix = self.mark.names.get(suffix, suffix)
        return f"{self.path}.{suffix}" if self.path else suffix

    def has(self, suffix: str) -> bool:
        return self.name(suffix) in self.source.shapes

    def shape(self, suffix: str, ndims: tuple[int, ...] = (2,)) -> tuple[int, ...]:
        """Shape of a tensor that must be there, have one of `ndims` dimensions, and hold something."""
        if not self.has(suffix):
            raise BadCheckpoint(f"{self.source.where}: {self.name(suffix)!r} is absent, {self.mark.format} needs it")
        shape = self.source.shapes[self.name(suffix)]
        if len(shape) not in ndims or 0 in shape:
            raise self.bad(suffix, f"{' or '.join(map(str, ndims))} dimensions, none of them empty")
        return shape

    def dtype(self, suffix: str) -> torch.dtype:
        return self.source.dtypes[self.name(suffix)]

    def read(self, suffix: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> Tensor:
        """A tensor that must be there, of one of the dtypes and shapes. Float values must be finite."""
        if not self.has(suffix):
            raise BadCheckpoint(f"{self.source.where}: {self.name(suffix)!r} is absent, {self.mark.format} needs it")
        name = self.name(suffix)
        if self.dtype(suffix) not in dtypes:
            raise self.bad(suffix, " or ".join(str(dtype)[6:] for dtype in dtypes))
        if self.source.shapes[name] not in shapes:
            raise self.bad(suffix, " or ".join(str(list(shape)) for shape in shapes))
        self.used.add(suffix)
        tensor = self.source.read(name)
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e8m0fnu and not bool(_finite(tensor)):
            raise BadCheckpoint(f"{self.source.where}: {name!r} holds NaN or infinity")
        return tensor

    def maybe(self, suffix: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> Tensor | None:
        """The same for a tensor that may be absent."""
        return self.read(suffix, dtypes, shapes) if self.has(suffix) else None

    def bias(self, n: int) -> Tensor | None:
        return self.maybe("bias", FLOATS, ((n,),))

    def drop(self, suffix: str, why: str) -> str:
        """Leaves a tensor out on purpose: the note that says so, "" if it is not there."""
        if not self.has(suffix):
            return ""
        self.used.add(suffix)
        return f"{suffix} dropped: {why}"

    def option(self, key: str, default: int | str | bool, allowed: tuple) -> int | str | bool:
        """An entry of the mark's JSON, of the type of its default and among the allowed ones."""
        value = self.mark.options.get(key, default)
        if type(value) is not type(default) or value not in allowed:
            raise BadCheckpoint(
                f"{self.source.where}: {self.name('comfy_quant')!r} wants {key!r} as one of {allowed}, found {str(value)[:40]}"
            )
        return value

    @property
    def compute(self) -> torch.dtype:
        """The dtype in which the layer computes: that of a 16-bit bias, else bfloat16."""
        dtype = self.dtype("bias") if self.has("bias") else None
        return torch.float16 if dtype == torch.float16 else torch.bfloat16

    def bad(self, suffix: str, wanted: str) -> BadCheckpoint:
        name = self.name(suffix)
        found = f"{str(self.source.dtypes[name])[6:]} {list(self.source.shapes[name])[:9]}"
        return BadCheckpoint(f"{self.source.where}: {name!r} wants {wanted} for {self.mark.format}, found {found}")


def _finite(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all()
