"""From a float module and a header to a module with empty packed layers: compared first, changed after, filled last.

Every tensor that the changed module wants is compared by name, shape and dtype with what the files claim, before anything is changed or
allocated. The difference is the error message: a checkpoint of another architecture shows as the first layer that does not fit.
"""

__all__ = ["Plan", "fill", "finish", "plan", "swap", "without_memory"]

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.errors import BadCheckpoint
from qgen.io.files import Files
from qgen.io.header import Header, LayerEntry
from qgen.nn import attention, clock, keep_hooks
from qgen.nn.experts import restack, unstack
from qgen.nn.kinds import empty, kind_of
from qgen.nn.packed import FLOAT_SLOTS, Packed
from qgen.nn.parted import rejoin, repart

_NAMES = {"linear": "Linear", "conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """Empty packed layers, by path, that take the place of a module's float layers."""

    layers: dict[str, Packed]


def plan(module: nn.Module, header: Header, files: Files, where: Path, dtype: torch.dtype | None = None) -> Plan:
    """Compares a float module with a checkpoint and makes its packed layers, on meta. The module is not changed, but for stacks of experts
    that the checkpoint holds as layers, which become layers, and layers that it holds in parts; not if anything is raised.

    dtype: in which the layers shall compute; None = as saved. Raises BadCheckpoint with the first thing that does not fit.
    """
    paths = {entry.path for entry in header.layers}
    made = unstack(module, paths)
    repart(module, paths)
    try:
        return _plan(module, header, files, where, dtype)
    except BaseException:
        rejoin(module)
        restack(made)
        raise


def _plan(module: nn.Module, header: Header, files: Files, where: Path, dtype: torch.dtype | None) -> Plan:
    modules = dict(module.named_modules(remove_duplicate=False))
    try:
        (header.attention or attention.Choices()).check(module)
    except ValueError as error:
        raise BadCheckpoint(f"{where}: {error}; is it of another architecture?") from None
    layers = {entry.path: _empty(modules.get(entry.path), entry, module, where, dtype) for entry in header.layers}
    wanted = {
        name: t
        for name, t in module.state_dict().items()
        if name.rpartition(".")[0] not in layers and isinstance(t, Tensor)
    }
    wanted |= {f"{path}.{slot}": t for path, layer in layers.items() for slot, t in layer.slots().items()}
    kind = type(module).__name__
    held = {
        name
        for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    }
    if odd := {name for name in wanted if name.rpartition(".")[0] not in layers} - held:
        raise BadCheckpoint(
            f"{where}: {type(module).__name__} keeps {sorted(odd)[0]!r} in a way of its own, which cannot be filled"
        )
    for name in sorted((header.tensors.keys() | header.aliases.keys()) ^ wanted.keys()):
        told = (
            f"{kind} wants {name!r}, which the checkpoint lacks"
            if name in wanted
            else f"it holds {name!r}, which {kind} lacks"
        )
        raise BadCheckpoint(f"{where}: does not fit: {told}; is it of another architecture?")
    for name, tensor in wanted.items():
        entry = files.tensors[header.aliases.get(name, name)]
        if entry.shape != tuple(tensor.shape):
            raise BadCheckpoint(f"{where}: {name!r} has the shape {entry.shape}, {kind} wants {tuple(tensor.shape)}")
        path, _, slot = name.rpartition(".")
        if path in layers and entry.dtype not in (_FLOATS if slot in FLOAT_SLOTS else (tensor.dtype,)):
            raise BadCheckpoint(
                f"{where}: {name!r} is {str(entry.dtype)[6:]}, its format stores {str(tensor.dtype)[6:]}"
            )
        if path not in layers and entry.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise BadCheckpoint(f"{where}: {name!r} is {str(entry.dtype)[6:]}, {kind} wants {str(tensor.dtype)[6:]}")
    return Plan(layers)


def swap(module: nn.Module, plan: Plan) -> None:
    """Puts the plan's layers into the module."""
    for path, layer in plan.layers.items():
        parent, _, name = path.rpartition(".")
        layer.path = path
        keep_hooks(layer, module.get_submodule(path))
        setattr(module.get_submodule(parent), name, layer.train(module.training))


def fill(module: nn.Module, plan: Plan, tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    """Gives the plan's layers their tensors and kernels, puts them into the module, and assigns all other tensors by name.

    What can fail (no kernel serves) comes before the first change of the module. Tied names get one parameter.
    """
    for path, layer in plan.layers.items():
        layer.fill({slot: tensors[f"{path}.{slot}"] for slot in ("codes", "scales", *layer.layout.slots)})
        layer.prepare()
    swap(module, plan)
    made: dict[str, Tensor] = {}
    for name, source in {**{name: name for name in tensors}, **aliases}.items():
        path, _, leaf = name.rpartition(".")
        if path in plan.layers:
            continue
        parent = module.get_submodule(path)
        old = parent._parameters.get(leaf)
        if old is not None and source not in made:
            made[source] = nn.Parameter(tensors[source], requires_grad=old.requires_grad)
        (parent._buffers if old is None else parent._parameters)[leaf] = made.setdefault(source, tensors[source])


def finish(module: nn.Module, header: Header, buffers: bool = True) -> None:
    """Prepares packed layers that have no kernel yet; leaves recipe and report on the module.

    buffers: give buffers that files do not hold, and that were computed anew, the dtype that they had when the module was saved.
    """
    for name, buffer in list(module.named_buffers()):
        if buffers and name in header.buffers:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(getattr(torch, header.buffers[name]))
    for layer in module.modules():
        if isinstance(layer, Packed):
            for p in layer.parameters(recurse=False):
                p.requires_grad_(False)
            if layer.kernel is None:
                layer.prepare()
    rejoin(module)  # parts are packed by now; the float layers that they stand for go
    clock.wind(module)
    module.qgen_recipe, module.qgen_report = header.recipe, header.report
    if header.attention is not None:
        attention.install(module, header.attention)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Within the block, parameters of new modules are on meta; buffers, which files may not hold, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _empty(found: Any, entry: LayerEntry, module: nn.Module, where: Path, dtype: torch.dtype | None) -> Packed:
    """A packed layer on meta for the float layer `found`."""
    if kind_of(found) != entry.kind or isinstance(found, Packed) or not entry.path:
        there = "no such layer" if found is None else f"{type(found).__name__} there"
        whole = type(module).__name__
        raise BadCheckpoint(
            f"{where}: quantized {entry.path!r}, a {_NAMES[entry.kind]}, and {whole} has {there}; is it of another architecture?"
        )
    if found.bias is not None and not {"bias", "t_bias"} & set(
        entry.layout.slots
    ):  # the other way round is fine: methods may add a bias
        raise BadCheckpoint(
            f"{where}: {entry.path!r} was quantized without a bias, and {type(module).__name__} has one there"
        )
    try:
        return empty(found, entry.layout, dtype or entry.dtype)
    except ValueError as error:
        raise BadCheckpoint(f"{where}: {entry.path!r}: {error}") from None
