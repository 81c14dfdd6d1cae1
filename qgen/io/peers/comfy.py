"""ComfyUI's own quantized checkpoints, read: any file that stock ComfyUI loads, with names as they are in it.

Layers stay packed, bit for bit; see the file of each format for what that means. Ordinary float8 tensors without a mark have no scale and
become bfloat16, which holds them exactly. Tensors that no format knows pass as they are.
"""

__all__ = ["ComfyImporter"]

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.comfy_formats import of_mark
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_marks import is_mark, marked, marks

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ComfyImporter:
    """Reads marked layers."""

    about: str = "ComfyUI native: fp8, nvfp4, mxfp8, int8, convrot_w4a4, svdquant_w4a4, awq_w4a16"

    def recognizes(self, source: Source) -> bool:
        return marked(source)

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        """The parts, each layer where its first tensor stands. BadCheckpoint naming the tensor if something does not fit."""
        layers = {path: Found(source, path, mark) for path, mark in marks(source).items()}
        natives = {
            path: of_mark(found) for path, found in layers.items()
        }  # unknown formats first: nothing was read yet
        names: dict[str, list[str]] = {path: [] for path in layers}
        for name in source.shapes:
            if (path := name.rpartition(".")[0]) in names:
                names[path].append(name)
        for name in source.shapes:
            path = name.rpartition(".")[0]
            if path not in layers:
                if not is_mark(name):
                    yield _plain(source, name)
            elif path in names:
                found, mine = layers[path], names.pop(path)
                yield from natives[path].load(found)
                used = {found.name(suffix) for suffix in found.used}
                yield from (_plain(source, other) for other in mine if other not in used and not is_mark(other))


def _plain(source: Source, name: str) -> Plain:
    tensor = source.read(name)
    if tensor.dtype in _FLOAT8:
        return Plain(name, tensor.to(torch.bfloat16), f"{str(tensor.dtype)[6:]} without a scale, as bfloat16")
    return Plain(name, tensor)


importers.add("comfy", ComfyImporter())
