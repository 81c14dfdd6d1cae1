"""Back to float: packed layers to ordinary ones with the values that the packed ones stand for."""

__all__ = ["dequantize"]

from typing import Any

import torch
from torch import nn

from qgen.io.peers.base import Layer
from qgen.io.peers.floats import dequantized
from qgen.nn.kinds import CONVOLUTIONS, kind_of
from qgen.nn.packed import Packed
from qgen.nn.parted import rejoin


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every packed layer of `model`, in place, by a float layer in `dtype` (default: what the layer computes in).

    The new layers round no activations; their weights are the packed ones, low-rank branch included, and
    biases no longer hold what undoes a shift of the inputs.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Packed):
            parent, _, name = path.rpartition(".")
            setattr(
                model.get_submodule(parent), name, _float(layer, dtype or layer.compute_dtype).train(layer.training)
            )
    rejoin(model)
    for name in ("qgen_recipe", "qgen_report"):
        model.__dict__.pop(name, None)
    return model


def _float(layer: Any, dtype: torch.dtype) -> nn.Module:
    canonical = layer.canonical()
    bias = layer.bias is not None or "shift" in canonical
    kind = kind_of(layer)
    if kind in CONVOLUTIONS:
        made: Any = CONVOLUTIONS[kind][0](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=bias,
            device="meta",
        )
    else:
        made = nn.Linear(layer.k, layer.n, bias=bias, device="meta")
    shape = tuple(made.weight.shape)
    weight, moved = dequantized(Layer("", shape, layer.layout, canonical, layer.compute_dtype))
    values = {"weight": weight.to(dtype)} | ({"bias": moved.to(dtype)} if moved is not None else {})
    made.load_state_dict(values, assign=True)
    return made
