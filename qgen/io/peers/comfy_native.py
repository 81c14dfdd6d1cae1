"""Native: what each of ComfyUI's formats can do here, and the helpers they share.

A native format reads its tensors into a `Layer` (bit for bit, or a `Plain` with a note), tells whether it holds a `Layer` as it is, stores
it, and rounds a float weight when asked to. One file per format; `comfy_formats.py` is the table.
"""

__all__ = ["Native", "layer", "requantized", "rounded", "unlike", "with_bias"]

from typing import Any, Protocol

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.floats import dequantized
from qgen.kernels.ops import SLOTS
from qgen.nn.packed import Layout


class Native(Protocol):
    """name: what users ask for. format: ComfyUI's word in the mark. about: one line for people.

    stock: whether ComfyUI 0.30, which this was tried with, loads it; if not, it is written only for those who ask for it by name.
    """

    name: str
    format: str
    about: str
    stock: bool

    def load(self, found: Found) -> list[Layer | Plain]:
        """The parts of a marked layer. BadCheckpoint if its tensors do not fit together."""
        ...

    def fits(self, n: int, k: int) -> str:
        """ "", or why no weight (N, K) can be in this format."""
        ...

    def refusal(self, layer: Layer) -> str:
        """ "", or why the layer cannot be stored as it is."""
        ...

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A layer without refusal to tensors by suffix, and the options of its mark."""
        ...

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        """A float32 weight (N, K) that fits, rounded to nearest: a layer without refusal, without bias."""
        ...

    def refit(self, layer: Layer) -> Layer:
        """A layer with a refusal brought into this format, keeping of it what can be kept."""
        ...


def layer(
    path: str,
    weight: str,
    act: str,
    slots: dict[str, Tensor | None],
    k: int,
    dtype: torch.dtype,
    hadamard: int = 0,
    note: str = "",
) -> Layer:
    """A Layer from its slots; those that are None are left out."""
    slots = {name: slots[name].contiguous() for name in SLOTS if slots.get(name) is not None}
    rank = slots["down"].shape[0] if "down" in slots else 0
    layout = Layout(weight, act, rank, hadamard, tuple(name for name in slots if name not in ("codes", "scales")))
    return Layer(path, (slots["codes"].shape[0], k), layout, slots, dtype, note)


def rounded(
    path: str, q: QTensor, act: str, k: int, dtype: torch.dtype, hadamard: int = 0, **more: Tensor | None
) -> Layer:
    """A Layer from a QTensor and other slots."""
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero, **more}
    return layer(path, q.format, act, slots, k, dtype, hadamard)


def unlike(layer: Layer, weights: tuple[str, ...], acts: tuple[str, ...], allowed: tuple[str, ...] = ()) -> str:
    """ "", or in which respect a layer differs from what a format holds. allowed: optional slots beside the bias."""
    if layer.kind != "linear":
        return "a convolution"
    layout = layer.layout
    if layout.weight not in weights:
        return f"its weight is {layout.weight}"
    if layout.act not in acts:
        return f"its activations are {layout.act or 'float'}"
    if layer.slots["scales"].shape[1] * (formats.get(layout.weight).block or layer.shape[1]) != layer.shape[1]:
        return f"its {layer.shape[1]} columns are padded"
    extra = set(layout.slots) - {"bias", *allowed}
    if extra:
        return f"it has {', '.join(sorted(extra))}"
    return ""


def requantized(native: Native, layer: Layer, dtype: torch.dtype | None = None) -> Layer:
    """The layer dequantized, then rounded anew in another format. dtype: in which it shall compute, its own by default."""
    weight, bias = dequantized(layer)
    return with_bias(native.quantize(layer.path, weight, dtype or layer.dtype), bias)


def with_bias(made: Layer, bias: Tensor | None) -> Layer:
    """The layer with a bias (N,), in the dtype that it has."""
    if bias is None:
        return made
    slots = {**made.slots, "bias": bias}
    return layer(made.path, made.layout.weight, made.layout.act, slots, made.shape[1], made.dtype, made.layout.hadamard)
