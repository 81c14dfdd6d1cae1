"""The layers that can be packed, in one place: what they are called, their weight as a matrix (N, K), their input as rows (M, K).

Beside torch's own there is the `Conv1D` of transformers (GPT-2 and its kin): a linear layer that stores its weight as (K, N). It is
known by its name and attributes, so that transformers need not be imported, and packed it is an ordinary `QuantLinear`.
"""

__all__ = ["empty", "is_layer", "kind_of", "matrix", "packable", "rows_of", "shape_of", "usual"]

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from qgen.nn.conv import QuantConv2d, unfold
from qgen.nn.conv_nd import QuantConv1d, QuantConv3d, unfold_nd
from qgen.nn.linear import QuantLinear
from qgen.nn.packed import Layout, Packed, held_as

_READ_ONLY = nn.modules.linear.NonDynamicallyQuantizableLinear
CONVOLUTIONS: dict[str, tuple[type, type]] = {
    "conv1d": (nn.Conv1d, QuantConv1d),
    "conv2d": (nn.Conv2d, QuantConv2d),
    "conv3d": (nn.Conv3d, QuantConv3d),
}


def kind_of(layer: Any) -> str:
    """ "linear", "conv1d", "conv2d", "conv3d", or "" for a layer of none of these kinds."""
    if isinstance(layer, nn.Linear) or _transposed(layer):
        return "linear"
    return next((kind for kind, (base, _) in CONVOLUTIONS.items() if isinstance(layer, base)), "")


def is_layer(layer: Any) -> bool:
    """Whether a float layer can be packed, as far as its kind, geometry, dtype and forward go; complex weights stay as they are.

    The output projection of `nn.MultiheadAttention` cannot: torch never calls it, and reads its weight.
    """
    if type(layer) is _READ_ONLY or not kind_of(layer) or isinstance(layer, Packed):
        return False
    return packable(layer) and not layer.weight.is_complex() and usual(layer)


def usual(layer: Any) -> bool:
    """Whether a float layer computes what its kind says; a forward of its own is tried on random input.

    Of the subclasses in transformers FalconLinear multiplies and adds as `nn.Linear` does, Llama4Router returns the best few of its scores.
    """
    weight = layer.weight
    base: Any = type(layer) if _transposed(layer) else CONVOLUTIONS.get(kind_of(layer), (nn.Linear,))[0]
    inherits = "forward" not in vars(layer) and type(layer).forward is base.forward
    if inherits or not weight.is_floating_point() or weight.itemsize == 1:
        return True
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator, device="cpu")  # noqa: E731
    if weight.device.type == "meta":  # a model that is about to be loaded
        made = {n: p if p is None else nn.Parameter(rand(*p.shape), False) for n, p in layer._parameters.items()}
        layer = copy.copy(layer)
        layer.__dict__["_parameters"] = made
    taps = zip(getattr(layer, "dilation", ()), getattr(layer, "kernel_size", ()), strict=True)
    x = rand(2, layer.weight.shape[0 if _transposed(layer) else 1], *[step * (n - 1) + 3 for step, n in taps])
    x = x.to(layer.weight)
    try:
        with torch.no_grad():
            want, got = base.forward(layer, x), layer.forward(x)
    except Exception:  # it wants something else
        return False
    close = isinstance(got, Tensor) and got.shape == want.shape
    return close and float((got - want).float().norm()) <= 0.02 * float(want.float().norm())


def packable(layer: Any) -> bool:
    """Of convolutions, those with one group and zero padding; a linear layer always."""
    if kind_of(layer) == "linear":
        return True
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def matrix(layer: Any, weight: Tensor | None = None) -> Tensor:
    """The layer's weight, or another one in its place, as (N, K), a view."""
    weight = layer.weight.detach() if weight is None else weight.detach()
    return weight.T if _transposed(layer) else weight.flatten(1)


def shape_of(layer: Any) -> tuple[int, int]:
    """(N, K) of the weight."""
    n, *rest = reversed(layer.weight.shape) if _transposed(layer) else layer.weight.shape
    return n, math.prod(rest)


def rows_of(x: Tensor, layer: Any) -> Tensor:
    """What the layer multiplies with its weight, (…, K): x itself, or for a convolution its patches."""
    kind = kind_of(layer)
    if kind == "linear":
        return x
    x = x if x.ndim == layer.weight.ndim else x[None]  # one sample, as torch allows
    return unfold(x, layer)[0] if kind == "conv2d" else unfold_nd(x, layer)[0]


def empty(layer: Any, layout: Layout, dtype: torch.dtype) -> Packed:
    """An empty packed layer on meta for a float one, to be filled by a loader."""
    kind, dtype = kind_of(layer), held_as(dtype)
    if kind in CONVOLUTIONS:
        return CONVOLUTIONS[kind][1](layer, layout, dtype)
    n, k = shape_of(layer)
    return QuantLinear(k, n, layout, dtype)


def _transposed(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and not isinstance(layer, nn.Conv1d)
