"""Checks that come before anything is changed."""

__all__ = ["check_weights", "parse_bytes", "refuse_quantized"]

import re
from typing import Any

import torch
from torch import nn

from qgen.errors import BadData, NotQuantizable
from qgen.nn.kinds import is_layer, kind_of
from qgen.nn.packed import Packed

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def refuse_quantized(module: nn.Module, name: str) -> None:
    """NotQuantizable if the module holds packed layers, or layers packed by another library."""
    if is_layer(module):
        raise NotQuantizable(
            f"a lone {type(module).__name__} cannot be replaced in place: pass its model, or nn.Sequential(layer)"
        )
    for path, layer in module.named_modules():
        if isinstance(layer, Packed):
            raise NotQuantizable(
                f"{name or type(module).__name__} is quantized already (layer {path}); load the 16-bit model first"
            )
        hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {})
        if any("group_offloading" in str(hook) for hook in hooks):
            raise NotQuantizable(
                f"{name or type(module).__name__} is offloaded by group: quantize it first, and call enable_group_offload then"
            )
        if kind_of(layer) and (other := _packed_as(layer)):
            raise NotQuantizable(
                f"{name or type(module).__name__}: layer {path} holds {other}, packed by another library"
            )


def _packed_as(layer: Any) -> str:
    """What a layer's weight is if another library packed it, or will when it is moved or first called: its dtype, or the class of a
    tensor or a parameter that only looks like a float one."""
    weight = layer.weight
    if not weight.is_complex() and not (weight.is_floating_point() and weight.itemsize > 1):
        return str(weight.dtype)
    kinds = [kind for kind in (type(weight), type(weight.data)) if kind.__module__.partition(".")[0] != "torch"]
    return f"a {kinds[0].__module__.partition('.')[0]} {kinds[0].__name__}" if kinds else ""


def check_weights(module: nn.Module, name: str) -> None:
    """BadData naming the first parameter that holds NaN or infinity, or that is on the meta device."""
    for path, p in module.named_parameters():
        if p.device.type == "meta":
            away = hasattr(module.get_submodule(path.rpartition(".")[0]), "_hf_hook")
            raise BadData(
                f"{name or type(module).__name__}: parameter {path} "
                + (
                    "is offloaded by accelerate: take the hooks off (pipe.remove_all_hooks()), or quantize the model before it is offloaded"
                    if away
                    else "has no data (meta device); load the weights first"
                )
            )
        if (
            p.is_floating_point()
            and not bool(torch.isfinite(p.detach().sum(dtype=torch.float32)))
            and not torch.isfinite(p).all()
        ):
            raise BadData(
                f"{name or type(module).__name__}: parameter {path} holds NaN or infinity; the weights are broken"
            )


def parse_bytes(text: int | str) -> int:
    """Bytes from a number or text such as "2GiB", "800 MB"; ValueError otherwise, or if not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(text), re.IGNORECASE)
    if not match or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"memory is a positive number of bytes or text such as '2GiB', found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
