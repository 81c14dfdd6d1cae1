"""From a peer's file into a live model: `load_peer`. Nothing of the model is touched before the whole file has been read and fits."""

__all__ = ["load_peer", "renamed"]

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qgen.errors import BadCheckpoint
from qgen.io import skeleton
from qgen.io.keys import Plan, plan
from qgen.io.keys.deferred import Deferred, rows, sources, value
from qgen.io.keys.fused import picked
from qgen.io.parts import check, component, config_of, importer_for, unknown_file
from qgen.io.peers.base import Layer, Source
from qgen.io.peers.source import open_source
from qgen.nn import QuantConv2d, QuantLinear, clock
from qgen.nn.packed import Packed

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def load_peer(path: str | Path, into: nn.Module) -> nn.Module:
    """Fills a live float module with a quantized file of any project that qgen imports, and returns it with packed layers.

    Arguments:
        path: the file or folder. Names of original layouts are turned into diffusers', fused layers are split.
        into: the float model of the same architecture; it keeps its device, and the dtype of what stays float.

    Raises BadCheckpoint if no importer knows the file or it does not fit, ValueError if `into` is quantized. Nothing is changed then.
    """
    source = open_source(component(Path(path)))
    found = importer_for(source)
    if found is None:
        raise BadCheckpoint(unknown_file(source))
    if any(isinstance(layer, Packed) for layer in into.modules()):
        raise ValueError(f"`into` is quantized already: pass a float {type(into).__name__}")
    layers: dict[str, Layer] = {}
    plains: dict[str, Tensor] = {}
    for part in found[1].parts(source):
        if isinstance(part, Layer):
            layers[part.path] = check(part)
        else:
            plains[part.name] = part.tensor
    wanted = into.state_dict()
    if not all(f"{path}.weight" in wanted for path in layers):
        layers, plains, _ = renamed(layers, plains, {"_class_name": type(into).__name__, **config_of(into)}, source)
    made = {path: _packed(into, path, layer, source) for path, layer in layers.items()}
    _fits(into, made, plains, source)
    device = next((p.device for p in into.parameters()), torch.device("cpu"))
    for path, layer in made.items():
        layer.fill({slot: t.to(device) for slot, t in layers[path].slots.items()})
        layer.prepare()
    skeleton.swap(into, skeleton.Plan(made))
    clock.wind(into)
    for name, tensor in plains.items():
        if name in wanted:
            wanted_dtype = wanted[name].dtype if {tensor.dtype, wanted[name].dtype} <= _FLOATS else tensor.dtype
            _assign(into, name, tensor.to(device, wanted_dtype))
    into.__dict__["qgen_report"] = [
        getattr(layer, "row", None) or {"path": p, "why": layer.note} for p, layer in layers.items()
    ]
    return into


def renamed(
    layers: dict[str, Layer], plains: dict[str, Tensor], config: dict, source: Source
) -> tuple[dict[str, Layer], dict[str, Tensor], Plan]:
    """Parts under diffusers' names: packed layers are cut by rows as the conversion cuts their weights. config: of the model, {} = unknown.

    Also returns the plan, which knows the model's class and config. Of the source only `where` is used, in errors.
    """
    shapes = {f"{path}.weight": layer.shape for path, layer in layers.items()} | {
        n: tuple(t.shape) for n, t in plains.items()
    }
    dtypes = {f"{path}.weight": layer.dtype for path, layer in layers.items()} | {n: t.dtype for n, t in plains.items()}
    biases = {f"{path}.bias": layer.slots["bias"] for path, layer in layers.items() if "bias" in layer.slots}
    shapes |= {name: tuple(t.shape) for name, t in biases.items()}
    dtypes |= {name: t.dtype for name, t in biases.items()}
    planned = plan(shapes, dtypes, source.where, config)
    made: dict[str, Layer] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in planned.tensors.items():
        path, _, leaf = name.rpartition(".")
        used = tensor.made if isinstance(tensor, Deferred) and isinstance(tensor.made, str) else ""
        stored = used.removesuffix(".weight")
        if used and used.endswith(".weight") and stored in layers:
            made[path] = replace(layers[stored], path=path)
        elif leaf == "weight" and (cut := _cut(tensor, layers, path, source)) is not None:
            made[path] = cut
        else:
            rest[name] = value(tensor, lambda n: plains[n] if n in plains else biases[n]).clone()
    rest = {name: t for name, t in rest.items() if not (name.endswith(".bias") and name[: -len(".bias")] in made)}
    return made, rest, planned


def _cut(tensor: Tensor, layers: dict[str, Layer], path: str, source: Source) -> Layer | None:
    """The rows of a packed layer that make the deferred weight; None if it is made of ordinary tensors."""
    stored = [name for name in sources(tensor) if name.removesuffix(".weight") in layers and name.endswith(".weight")]
    if not stored:
        return None
    try:
        name, chosen = rows(tensor)
    except ValueError as error:
        raise BadCheckpoint(f"{source.where}: {path!r} cannot be made of packed layers: {error}") from None
    layer = layers[name.removesuffix(".weight")]
    if chosen is None:
        return replace(layer, path=path)
    return picked(layer, chosen, path)


def _packed(into: nn.Module, path: str, layer: Layer, source: Source) -> Packed:
    """An empty packed layer on meta in the place of `into`'s float layer."""
    old = dict(into.named_modules(remove_duplicate=False)).get(path)
    wanted = nn.Conv2d if layer.kind == "conv2d" else nn.Linear
    kind = type(into).__name__
    if not isinstance(old, wanted) or not path:
        there = "no such layer" if old is None else f"a {type(old).__name__} there"
        raise BadCheckpoint(
            f"{source.where}: holds the quantized {path!r}, and {kind} has {there}; is it of another architecture?"
        )
    if tuple(old.weight.shape) != tuple(layer.shape):
        raise BadCheckpoint(
            f"{source.where}: {path!r} has the shape {layer.shape}, {kind} wants {tuple(old.weight.shape)}"
        )
    if old.bias is not None and not {"bias", "t_bias"} & layer.slots.keys():
        raise BadCheckpoint(f"{source.where}: {path!r} has no bias, and {kind} has one there")
    if wanted is nn.Conv2d:
        return QuantConv2d(old, layer.layout, layer.dtype)
    return QuantLinear(math.prod(layer.shape[1:]), layer.shape[0], layer.layout, layer.dtype)


def _fits(into: nn.Module, made: dict[str, Packed], plains: dict[str, Tensor], source: Source) -> None:
    kind, parameters = type(into).__name__, dict(into.named_parameters(remove_duplicate=False))
    for name, tensor in into.state_dict().items():
        if name.rpartition(".")[0] in made:
            continue
        if name not in plains:
            if name in parameters:
                raise BadCheckpoint(
                    f"{source.where}: lacks {name!r}, which {kind} wants; is it of another architecture?"
                )
        elif plains[name].shape != tensor.shape:
            raise BadCheckpoint(
                f"{source.where}: {name!r} has the shape {tuple(plains[name].shape)}, {kind} wants {tuple(tensor.shape)}"
            )


def _assign(into: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parent = into.get_submodule(path)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor
