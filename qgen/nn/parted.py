r"""Parted: a layer that reads a concatenation, as one layer for each of the tensors that were joined.

    y = W [h, s] + b     =     (W_h h + b) + W_s s

In the decoder of a UNet `h` and the skip connection `s` differ in range by an order of magnitude, and one scale for both destroys the
smaller. As layers of their own each part has its own scales, of inputs and of weights, and whatever else a recipe does; in integers it is
the sum of two products. The parts are children named by their channels, `c0_640` and `c640_960`: a checkpoint's paths say where a layer was
parted, so that loaders need nothing else. Where that is was seen in the model: see `qgen.probe`.
Q-Diffusion's split shortcut: Li et al., 2023, https://arxiv.org/abs/2302.04304
"""

__all__ = ["Parted", "columns", "part", "rejoin", "repart", "whole_path"]

import math
import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qgen.nn.build import keep_hooks
from qgen.nn.kinds import CONVOLUTIONS, is_layer, kind_of
from qgen.nn.packed import Packed

_NAME = re.compile(r"c(\d+)_(\d+)")


class Parted(nn.Module):
    """Layers of the same kind, one for each run of input channels; x (B, C, …), or (…, C) for linear layers, to the sum of their outputs.

    The first holds the bias. `whole`: the float layer that they stand for, while they share its weight, else None.
    """

    def __init__(self, layer: Any, sizes: Sequence[int]):
        """sizes: input channels of the parts. ValueError if they do not add up to the layer's."""
        super().__init__()
        channels = layer.weight.shape[1]
        if sum(sizes) != channels or min(sizes) < 1 or len(sizes) < 2:
            raise ValueError(f"parts of a layer with {channels} input channels add up to them, found {tuple(sizes)}")
        start = 0
        for size in sizes:
            self.add_module(f"c{start}_{start + size}", _part_of(layer, start, start + size))
            start += size
        self.__dict__["whole"] = layer
        self.train(layer.training)

    @property
    def sizes(self) -> list[int]:
        """Input channels of each part."""
        return [stop - start for start, stop in map(_channels, self._modules)]

    def forward(self, input: Tensor) -> Tensor:
        first, *rest = self._modules.values()
        axis = -1 if kind_of(first) == "linear" else -1 - len(first.kernel_size)
        x, *others = input.split(self.sizes, axis)
        y = first(x)
        for layer, x in zip(rest, others, strict=True):
            y = y + layer(x)
        return y

    def joined(self) -> nn.Module:
        """One float layer with the weights of all parts. ValueError if one of them is packed."""
        layers: list[Any] = list(self._modules.values())
        if any(isinstance(layer, Packed) for layer in layers):
            raise ValueError("packed parts do not join: their scales differ")
        weight = torch.cat([layer.weight.detach() for layer in layers], 1)
        return _like(layers[0], weight, layers[0].bias)


def _channels(name: str) -> tuple[int, int]:
    start, stop = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    return int(start), int(stop)


def _part_of(layer: Any, start: int, stop: int) -> nn.Module:
    """The layer for channels start … stop, its weight a view."""
    return _like(layer, layer.weight[:, start:stop].detach(), None if start else layer.bias)


def _like(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A float layer with the geometry of `layer`, and these tensors."""
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    made: Any
    if (kind := kind_of(layer)) in CONVOLUTIONS:
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        made = CONVOLUTIONS[kind][0](weight.shape[1], weight.shape[0], *geometry, **options)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], **options)
    made.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return made.train(layer.training)


def part(module: nn.Module, path: str, sizes: Sequence[int]) -> Parted:
    """Puts a `Parted` in the place of the float layer at `path`, under all of its names, and returns it."""
    layer = module.get_submodule(path)
    made = Parted(layer, sizes)
    keep_hooks(made, layer)
    for alias in [p for p, found in module.named_modules(remove_duplicate=False) if found is layer]:
        _replace(module, alias, made)
    return made


def rejoin(module: nn.Module) -> None:
    """Puts back the layer of every `Parted` none of whose parts is packed; of the others lets go of it."""
    for path, found in list(module.named_modules(remove_duplicate=False)):
        if isinstance(found, Parted) and not any(isinstance(layer, Packed) for layer in found.children()):
            _replace(module, path, found.whole or found.joined())
    for found in module.modules():
        if isinstance(found, Parted):
            found.__dict__["whole"] = None


def repart(module: nn.Module, paths: Collection[str]) -> None:
    """Parts the float layers of which `paths`, those of a checkpoint's packed layers, name parts. What does not fit stays as it is."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        if parent and _NAME.fullmatch(name):
            found.setdefault(parent, []).append(_channels(name))
    known = dict(module.named_modules())
    for path, runs in found.items():
        layer, runs = known.get(path), sorted(runs)
        meets = runs[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(runs)) and len(runs) > 1
        if is_layer(layer) and meets and runs[-1][1] == layer.weight.shape[1] and all(a < b for a, b in runs):
            part(module, path, [stop - start for start, stop in runs])


def columns(layer: Any, sizes: Sequence[int]) -> list[slice]:
    """Columns of the layer's weight (N, K) that belong to each part."""
    taps = math.prod(getattr(layer, "kernel_size", ()))
    stops = [taps * sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def whole_path(path: str) -> str:
    """The path of the layer of which `path` names a part, or "" if it names none."""
    parent, _, name = path.rpartition(".")
    return parent if _NAME.fullmatch(name) else ""


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
