"""Importing, converting and exporting as one stream of parts, so that no more than a few tensors are ever in memory.

An *importer* turns a file of a peer into parts; a part is a quantized layer in qgen's canonical slots (`Layer`) or one ordinary tensor
(`Plain`). Whatever comes between may change parts on the way; an *exporter* takes parts and writes a file of a peer:

    exporter.write(quantized(importer.parts(source)), target)

A peer's tensors stay packed where their meaning is one of qgen's formats bit for bit; otherwise they become a `Plain` tensor of floats, and
its `note` says so. Files are untrusted: a `Source` has checked every dtype, shape and size before it hands out a tensor; an importer checks
that they fit together and raises BadCheckpoint naming the tensor.
"""

__all__ = ["Exporter", "Importer", "Layer", "Model", "Plain", "Source", "exporters", "importers"]

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qgen.nn.packed import Layout
from qgen.registry import Registry


@dataclass(frozen=True)
class Layer:
    """A quantized layer.

    path: of the module, as in the model that the file is for. shape: of the float weight, (N, K) or (N, C, kh, kw) for a convolution,
    whose K is C · kh · kw. slots: canonical tensors by the names of `qgen.nn.packed.STORED`. dtype: in which it computes.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout
    slots: dict[str, Tensor]
    dtype: torch.dtype = torch.bfloat16
    note: str = ""

    @property
    def kind(self) -> str:
        return "linear" if len(self.shape) == 2 else "conv2d"


@dataclass(frozen=True)
class Plain:
    """One tensor that is not quantized, under its whole name. note: what happened to it on the way, e.g. "dequantized: q6_K"."""

    name: str
    tensor: Tensor
    note: str = ""


class Source(Protocol):
    """A file or folder whose headers have been read and checked; tensors are read one at a time, each a copy of its own."""

    where: Path
    metadata: dict[str, str]  # the file's free texts
    config: dict[str, Any]  # config.json beside the file, {} if there is none
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor: ...


class Importer(Protocol):
    """Reads one kind of file. about: one line for people."""

    about: str

    def recognizes(self, source: Source) -> bool:
        """Whether the file is of this kind, from names, shapes, dtypes and texts alone."""
        ...

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        """The parts, in the file's order. BadCheckpoint if tensors do not fit together."""
        ...


class Exporter(Protocol):
    """Writes one kind of file."""

    about: str

    def write(self, parts: Iterable[Layer | Plain], target: Path, *, about: "Model") -> list[str]:
        """Writes `target` whole or not at all, and returns one line for each layer that could not be kept as it is ("dequantized: …").

        ValueError, before anything is written, for what the format cannot hold.
        """
        ...


@dataclass(frozen=True)
class Model:
    """What an exporter may need to know of the model beside its tensors. config: config.json of diffusers or transformers."""

    kind: str = ""  # class name, "FluxTransformer2DModel"
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


importers: Registry[Importer] = Registry("importer", "qgen.io.peers")
exporters: Registry[Exporter] = Registry("exporter", "qgen.io.peers")
