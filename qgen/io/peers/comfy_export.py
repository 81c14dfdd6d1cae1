"""ComfyUI's own quantized checkpoints, written: what stock ComfyUI loads with its `UNETLoader`, without qgen.

    write(parts, target, about=model)           layers that a format of stock ComfyUI holds exactly stay, the others become floats
    … format="nvfp4"                            every layer in this format: kept if exact, else rounded anew
    … format="svdquant_w4a4,awq_w4a16"          the same; a layer that is exact in the second is kept in it
    … format="nvfp4", eligible=lambda n, s: …   float weights that the caller names are quantized on the way

The two of the third line are comfy-kitchen's, and newer than the ComfyUI that this was tried with (0.30): they are written when asked for.
Whatever is not kept is reported, one line for each layer. Names are those of the parts: ComfyUI wants those of the original layout.
"""

__all__ = ["ComfyExporter"]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qgen.errors import BadData
from qgen.io.peers import comfy_marks
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.comfy_formats import FORMATS, named
from qgen.io.peers.comfy_native import Native
from qgen.io.peers.floats import dequantized
from qgen.io.peers.writer import SafetensorsWriter

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OURS = ("qgen", comfy_marks.METADATA)  # texts of a header that would not be true of the new file


@dataclass(frozen=True)
class ComfyExporter:
    """Writes marked layers."""

    keys: str = "original"  # whose names of tensors ComfyUI wants
    about: str = f"ComfyUI native: {', '.join(FORMATS)}"

    def write(
        self,
        parts: Iterable[Layer | Plain],
        target: Path,
        *,
        about: Model,
        format: str | None = None,
        eligible: Callable[[str, tuple[int, ...]], bool] | None = None,
    ) -> list[str]:
        """Writes `target` whole or not at all, and returns one line for each layer that could not be kept as it is.

        Arguments:
            format: name of a native format, or several with commas, the preferred one first; None = keep what is exact in stock ones.
            eligible: which float tensors, by whole name and shape, are weights of linear layers to be quantized. None = none.

        Raises ValueError for an unknown format, or `eligible` without one, before anything is written; BadData for weights that hold NaN.
        """
        wanted = () if format is None else named(format)
        if eligible is not None and not wanted:
            raise ValueError(f"`eligible` float weights need a format to be quantized to: {', '.join(FORMATS)}")
        said: list[str] = []
        texts = {key: text for key, text in about.metadata.items() if key not in _OURS}
        with SafetensorsWriter(Path(target), texts) as writer:
            for part in parts:
                quantized = isinstance(part, Layer)
                tensors = _layer(part, wanted, said) if quantized else _plain(part, wanted, eligible, said)
                for name, tensor in tensors:
                    writer.add(name, tensor)
        return said


def _layer(layer: Layer, wanted: tuple[Native, ...], said: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer, by whole name."""
    exact = [native for native in wanted or FORMATS.values() if not native.refusal(layer)]
    for native in exact:
        if native in wanted or native.stock:
            yield from _stored(layer, native)
            return
    if wanted:
        why = "a convolution" if layer.kind != "linear" else wanted[0].fits(*layer.shape)
        if not why:
            said.append(f"requantized to {wanted[0].name}: {layer.path}: {wanted[0].refusal(layer)}")
            yield from _stored(wanted[0].refit(layer), wanted[0])
            return
    else:
        why = f"no format of ComfyUI's is {layer.layout.weight} x {layer.layout.act or 'float'} as it is"
        why = f"not every ComfyUI loads {exact[0].name}: ask for it by name" if exact else why
    said.append(f"dequantized: {layer.path}: {why}")
    prefix = f"{layer.path}." if layer.path else ""
    weight, bias = dequantized(layer)
    yield f"{prefix}weight", weight.to(layer.dtype)
    if bias is not None:
        yield f"{prefix}bias", bias


def _plain(
    part: Plain,
    wanted: tuple[Native, ...],
    eligible: Callable[[str, tuple[int, ...]], bool] | None,
    said: list[str],
) -> Iterator[tuple[str, Tensor]]:
    """One tensor as it is, or a float weight quantized."""
    tensor, path = part.tensor, part.name.rpartition(".")[0]
    weight = tensor.ndim == 2 and tensor.dtype in _FLOATS and part.name.rpartition(".")[2] == "weight"
    if not (weight and wanted and eligible is not None and eligible(part.name, tuple(tensor.shape))):
        yield part.name, tensor
        return
    native = next((n for n in wanted if not n.fits(*tensor.shape)), None)
    if native is None:
        said.append(f"left in {str(tensor.dtype)[6:]}: {path}: {wanted[0].fits(*tensor.shape)}")
        yield part.name, tensor
        return
    if not bool(tensor.isfinite().all()):
        raise BadData(f"{part.name!r} holds NaN or infinity and cannot be quantized")
    dtype = tensor.dtype if tensor.dtype == torch.float16 else torch.bfloat16
    yield from _stored(native.quantize(path, tensor.float(), dtype), native)


def _stored(layer: Layer, native: Native) -> Iterator[tuple[str, Tensor]]:
    prefix = f"{layer.path}." if layer.path else ""
    tensors, options = native.store(layer)
    for suffix, tensor in tensors.items():
        yield prefix + suffix, tensor
    yield prefix + comfy_marks.SUFFIX, comfy_marks.tensor(native.format, **options)


exporters.add("comfy", ComfyExporter())
