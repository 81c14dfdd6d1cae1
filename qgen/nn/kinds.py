"""The layers that can be packed, in one place: what they are called, their weight as a matrix (N, K), their input as rows (M, K).

Beside torch's own there is the `Conv1D` of transformers (GPT-2 and its kin): a linear layer that stores its weight as (K, N). It is
known by its name and attributes, so that transformers need not be imported, and packed it is an ordinary `QuantLinear`.
"""

__all__ = ["empty", "is_layer", "kind_of", "matrix", "packable", "rows_of", "shape_of"]

import math
from typing import Any

import torch
from torch import Tensor, nn

from qgen.nn.conv import QuantConv2d, unfold
from qgen.nn.conv_nd import QuantConv1d, QuantConv3d, unfold_nd
from qgen.nn.linear import QuantLinear
from qgen.nn.packed import Layout, Packed

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
    """Whether a float layer can be packed, as far as its kind, geometry and dtype go; complex weights stay as they are.

    The output projection of `nn.MultiheadAttention` cannot: torch never calls it, and reads its weight.
    """
    if type(layer) is _READ_ONLY:
        return False
    return bool(kind_of(layer)) and not isinstance(layer, Packed) and packable(layer) and not layer.weight.is_complex()


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
    return unfold(x, layer)[0] if kind == "conv2d" else unfold_nd(x, layer)[0]


def empty(layer: Any, layout: Layout, dtype: torch.dtype) -> Packed:
    """An empty packed layer on meta for a float one, to be filled by a loader."""
    kind = kind_of(layer)
    if kind in CONVOLUTIONS:
        return CONVOLUTIONS[kind][1](layer, layout, dtype)
    n, k = shape_of(layer)
    return QuantLinear(k, n, layout, dtype)


def _transposed(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and not isinstance(layer, nn.Conv1d)
