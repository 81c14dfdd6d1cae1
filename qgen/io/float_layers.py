"""Back to float: packed layers to ordinary ones with the values that the packed ones stand for."""

__all__ = ["dequantize"]

import torch
from torch import nn

from qgen.nn import QuantConv2d
from qgen.nn.packed import Packed


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every packed layer of `model`, in place, by a float layer in `dtype` (default: what the layer computes in).

    The new layers round no activations; their weights are the packed ones, low-rank branch included.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Packed):
            parent, _, name = path.rpartition(".")
            setattr(
                model.get_submodule(parent), name, _float(layer, dtype or layer.compute_dtype).train(layer.training)
            )
    for name in ("qgen_recipe", "qgen_report"):
        model.__dict__.pop(name, None)
    return model


def _float(layer: Packed, dtype: torch.dtype) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, QuantConv2d):
        made: nn.Module = nn.Conv2d(
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
    values = {"weight": layer.dequantize(dtype)} | ({"bias": layer.canonical()["bias"].to(dtype)} if bias else {})
    made.load_state_dict(values, assign=True)
    return made
