r"""`float` out: every layer back to 16 bits, for software that knows nothing of quantization.

    W = residual · Hᵀ / smooth + up · down,    b = bias + Ŵ ((shift / smooth) H)

The weights are those the quantized layers stand for, so images are those of the quantized weights; activations are no longer rounded.
A target that ends in .safetensors is one file; another is a folder as diffusers and transformers read it, with config.json.
"""

__all__ = ["Floats", "dequantized"]

import json
import math
import operator
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from qgen.io.atomic import staged
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.writer import SafetensorsWriter
from qgen.kernels import reference

_FILES = {"transformers": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


class Floats:
    """The exporter. Layers are written in their compute dtype, float32 tensors stay what they are."""

    about = "plain 16-bit safetensors: every layer dequantized"

    def write(self, parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        target, notes = Path(target), []
        if target.suffix == ".safetensors":
            _write(parts, target, about, notes)
            return notes
        with staged(target) as folder:
            _write(parts, folder / weights_name(about), about, notes)
            write_config(folder, about.config)
        return notes


def weights_name(about: Model) -> str:
    """What the library of a model calls its file of weights."""
    return _FILES["transformers" if "architectures" in about.config else "diffusers"]


def write_config(folder: Path, config: dict, quantization: dict | None = None) -> None:
    """config.json without what said how the weights were quantized, or with what says it now. Nothing if there is nothing to say."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if quantization:
        kept["quantization_config"] = quantization
    if kept:
        (folder / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(parts: Iterable[Layer | Plain], path: Path, about: Model, notes: list[str]) -> None:
    with SafetensorsWriter(path, {"format": "pt"}, room=room_for(parts)) as writer:
        for part in parts:
            if isinstance(part, Plain):
                writer.add(part.name, part.tensor)
                continue
            weight, bias = dequantized(part)
            prefix = f"{part.path}." if part.path else ""
            writer.add(f"{prefix}weight", weight.to(part.dtype))
            if bias is not None:
                writer.add(f"{prefix}bias", bias)
            notes.append(f"{part.path}: dequantized: {part.layout.weight}{extras(part)} to {str(part.dtype)[6:]}")


def room_for(parts: Iterable[Layer | Plain]) -> int:
    """Bytes to leave for a header, if the parts know how many tensors there are: a file whose header fits is written once."""
    return (16 << 10) + 200 * min(operator.length_hint(parts, 0), 1 << 16)


def dequantized(part: Layer) -> tuple[Tensor, Tensor | None]:
    """The weight in its own shape, float32, and the bias (N,) in its stored dtype, of the float layer that a quantized one stands for."""
    slots, layout = part.slots, part.layout
    k = math.prod(part.shape[1:])
    bias = slots.get("bias")
    if "shift" in slots:  # the stored bias takes away what `shift` adds; without the one there is no need of the other
        rounded = reference.weight(
            slots["codes"], slots["scales"], slots.get("global_scale"), slots.get("zero"), layout.weight
        )
        rows = torch.zeros(1, k)
        moved = reference.transform_act(rows, rounded.shape[1], slots.get("smooth"), slots["shift"], layout.hadamard)
        undone = (moved @ rounded.T)[0]
        bias = (undone if bias is None else bias.float() + undone).to(part.dtype if bias is None else bias.dtype)
    w = reference.float_weight(slots, layout.weight, layout.hadamard, k)
    return w.reshape(part.shape), bias


def extras(part: Layer) -> str:
    """What a layer has beside codes and scales, for messages: " with rank 32 and smoothing"."""
    more = [f"rank {part.layout.rank}"] if part.layout.rank else []
    more += ["smoothing"] if "smooth" in part.slots else []
    more += [f"a Hadamard transform of {part.layout.hadamard}"] if part.layout.hadamard else []
    more += ["shifted inputs"] if "shift" in part.slots else []
    return f" with {' and '.join(more)}" if more else ""


exporters.add("float", Floats())
