r"""GGUF in and out.

In: Q4_0 … Q8_0 and the K-quants stay packed, since each is codes times a scale (plus an offset) per 16 or 32 neighbours:

    Q4_0 Q5_0 Q8_0   q · d                      d float16               int4_g32_f16 …
    Q4_1 Q5_1        u · d + m                  d, m float16            uint4_g32_f16 …
    Q2_K Q4_K Q5_K   u · (d·sc) - (dmin·mn)     products in float32     uint4_g32_f32 …
    Q3_K Q6_K        q · (d·sc)                                         int6_g16_f32 …
    MXFP4 NVFP4      e2m1 · scale                                       mxfp4, nvfp4

and values are bit for bit those of the `gguf` package. What is no matrix, holds a table of embeddings, or is of another type (IQ…, TQ…) is
dequantized by that package. Out: int4 becomes Q4_0, uint4 Q4_1, int5 Q5_0, uint5 Q5_1, int8 Q8_0, where scales fit float16; other layers
are dequantized and rounded to Q8_0, or kept in 16 bits where rows do not fill its blocks.
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

__all__ = ["GGUF", "GGUFExport"]

import contextlib
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, QgenError
from qgen.io.peers import gguf_blocks
from qgen.io.peers.base import Layer, Model, Plain, Source, exporters, importers
from qgen.io.peers.floats import dequantized, extras
from qgen.io.peers.gguf_source import BLOCK_TYPES, GGUFSource
from qgen.io.peers.layers import bias_of, emit, layer, stream

# Last part of the path of tables that are looked up, never multiplied: they stay tensors.
TABLES = frozenset(
    {"token_embd", "position_embd", "embed_tokens", "token_embedding", "position_embedding", "wte", "wpe", "shared"}
)
_CHUNK = 1 << 24  # values that the `gguf` package dequantizes at once
_ARCHITECTURES = {
    "FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3", "AuraFlowTransformer2DModel": "aura", "WanTransformer3DModel": "wan",
    "LTXVideoTransformer3DModel": "ltxv", "HunyuanVideoTransformer3DModel": "hyvid", "QwenImageTransformer2DModel": "qwen_image",
    "Lumina2Transformer2DModel": "lumina2", "CosmosTransformer3DModel": "cosmos", "HiDreamImageTransformer2DModel": "hidream",
}  # fmt: skip


class GGUF:
    """The importer. Sources of other kinds than `GGUFSource` are none of its business."""

    about = "GGUF (llama.cpp, ComfyUI-GGUF, diffusers): Q4_0 to Q8_0 and K-quants, kept packed"

    def recognizes(self, source: Source) -> bool:
        return isinstance(source, GGUFSource)

    def parts(self, source: GGUFSource) -> Iterator[Layer | Plain]:
        layers = {}
        for name, kind in source.types.items():
            if kind in BLOCK_TYPES:
                bias = name.removesuffix("weight") + "bias"
                layers[name] = (name, bias) if _is_layer(source, name) and bias in source.shapes else (name,)
        return stream(source, layers, lambda name: _parts(source, name))


def _is_layer(source: GGUFSource, name: str) -> bool:
    """Whether a tensor is a weight whose rows are whole blocks and which a layer multiplies by."""
    path, _, leaf = name.rpartition(".")
    shape, kind = source.logical[name], source.types[name]
    k = math.prod(shape[1:])
    return (
        leaf == "weight"
        and len(shape) in (2, 4)
        and path.rpartition(".")[2] not in TABLES
        and kind in gguf_blocks.READERS
        and k % BLOCK_TYPES[kind][1] == 0
    )


def _parts(source: GGUFSource, name: str) -> Iterator[Layer | Plain]:
    kind, shape = source.types[name], source.logical[name]
    if not _is_layer(source, name):
        yield Plain(name, _dequantize(source, name), f"dequantized: {kind}")
        return
    path = name.rpartition(".")[0]
    bias = bias_of(source, path, shape[0])
    raw = source.read(name).reshape(shape[0], -1, BLOCK_TYPES[kind][2])  # (N, blocks, bytes)
    found = gguf_blocks.READERS[kind](raw)
    if isinstance(found, dict):
        if not gguf_blocks.sound(kind, found["scales"]):
            raise BadCheckpoint(f"{source.where}: {name!r} holds scales that are NaN, infinite or negative")
        yield layer(path, shape, kind.lower(), found, bias, note=kind)
        return
    for scales in (found.scales, found.offset):
        if scales is not None and not bool(scales.isfinite().all()):
            raise BadCheckpoint(f"{source.where}: {name!r} holds scales that are NaN or infinite")
    yield from emit(path, found, shape=shape, bias=bias, said=kind)


def _dequantize(source: GGUFSource, name: str) -> Tensor:
    """Values of a block type by the `gguf` package, some rows at a time, float32 in the original shape."""
    gguf = _package()
    raw = source.read(name)
    rows = raw.reshape(-1, raw.shape[-1]).numpy()
    kind = gguf.GGMLQuantizationType(BLOCK_TYPES[source.types[name]][0])
    values = torch.empty(math.prod(source.logical[name]), dtype=torch.float32)
    per_row = len(values) // len(rows)
    step = max(1, _CHUNK // per_row)
    try:
        with np.errstate(all="ignore"):  # a stranger's scales may be infinite
            for start in range(0, len(rows), step):
                piece = gguf.quants.dequantize(rows[start : start + step], kind)
                values[start * per_row : start * per_row + piece.size] = torch.from_numpy(piece.reshape(-1))
    except NotImplementedError:
        raise BadCheckpoint(
            f"{source.where}: {name!r} is {kind.name}, which the gguf package cannot dequantize"
        ) from None
    return values.reshape(source.logical[name])


class GGUFExport:
    """The exporter. rest: what layers become that no block type holds exactly."""

    about = "GGUF, read by diffusers' from_single_file and by ComfyUI-GGUF: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
    rest = "Q8_0"
    keys = "original"  # whose names of tensors ComfyUI-GGUF and diffusers' from_single_file want

    def write(self, parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        gguf = _package()
        target, notes = Path(target), []
        arch = _ARCHITECTURES.get(about.kind) or about.metadata.get("general.architecture") or "qgen"
        with _whole_file(target) as path, tempfile.TemporaryFile(dir=target.parent) as spool:
            writer = gguf.GGUFWriter(path, arch, use_temp_file=True)
            writer.temp_file = spool  # beside the target, since /tmp is often small
            try:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
                if about.kind:
                    writer.add_string("general.name", about.kind)
                for part in parts:
                    self._add(writer, gguf, part, notes)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
        return notes

    def _add(self, writer: Any, gguf: Any, part: Layer | Plain, notes: list[str]) -> None:
        if isinstance(part, Plain):
            _add_plain(writer, gguf, part.name, part.tensor)
            return
        name = f"{part.path}.weight" if part.path else "weight"
        kind, raw = gguf_blocks.blocks_of(part)
        if kind is None:
            weight, bias = dequantized(part)
            kind = self.rest if weight.ndim == 2 and weight.shape[1] % BLOCK_TYPES[self.rest][1] == 0 else None
            became = f"no GGUF type holds {part.layout.weight}{extras(part)} exactly; stored as {kind or '16 bits'}"
            notes.append(f"{part.path}: dequantized: {became}")
            if kind is None:
                _add_plain(writer, gguf, name, weight.to(part.dtype))
            else:
                raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
        else:
            bias = part.slots.get("bias")
            if part.layout.act:
                notes.append(f"{part.path}: activations are no longer rounded to {part.layout.act}")
        if kind is not None:
            writer.add_tensor(name, raw.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        if bias is not None:
            _add_plain(writer, gguf, f"{part.path}.bias" if part.path else "bias", bias)


def _add_plain(writer: Any, gguf: Any, name: str, tensor: Tensor) -> None:
    """Floats in the narrowest type that is exact and that readers take where such a tensor stands.

    Readers treat BF16 as a block type that only linear layers know; so it is for matrices, and the rest becomes F16 or F32.
    """
    tensor = tensor.detach().cpu().contiguous()
    table = name.removesuffix(".weight").rpartition(".")[2] in TABLES
    if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.ndim > 1:
        half = tensor.half()
        if torch.equal(half.to(tensor.dtype), tensor) and bool(half.isfinite().all()):
            writer.add_tensor(name, half.numpy())
            return
        if tensor.ndim == 2 and name.endswith(".weight") and not table:
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            return
    if tensor.dtype == torch.bool or not (tensor.is_floating_point() or tensor.dtype in _INTEGERS):
        raise ValueError(f"{name!r} is {str(tensor.dtype)[6:]}, which GGUF cannot hold; export to another format")
    writer.add_tensor(name, (tensor.float() if tensor.is_floating_point() else tensor).numpy())


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise QgenError("GGUF needs the package gguf: pip install gguf") from None
    return gguf


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A path to write to; it becomes `target` when the block ends without an error, and is gone otherwise."""
    if target.is_dir():
        raise QgenError(f"{target} is a folder; name a file")
    temporary = target.with_name(f".{target.name[:200]}.writing-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise QgenError(f"could not write {target}: {error}; nothing was changed there") from error
    finally:
        temporary.unlink(missing_ok=True)


importers.add("gguf", GGUF())
exporters.add("gguf", GGUFExport())
