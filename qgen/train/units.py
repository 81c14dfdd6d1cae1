"""Units: the blocks of a denoiser whose layers are fitted together, in execution order.

A unit is the innermost entry of a `ModuleList` that holds two quantized layers or more: a transformer block, a ResBlock, an attention
block. Layers in no such entry (embedders, heads, convolutions between stages) are units of their own. A model without any is one unit.
"""

__all__ = ["Unit", "units_of"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qgen.calibration.base import Call
from qgen.train.student import Student
from qgen.train.twin import Twin


@dataclass(frozen=True)
class Unit:
    """path: of the module, "" = the denoiser. twins: of its layers."""

    path: str
    twins: tuple[Twin, ...]


def units_of(student: Student, calls: Iterable[Call]) -> list[Unit]:
    """Units in the order in which the first of `calls` that reaches each comes to them; those that none reaches are left out."""
    blocks = _blocks(student.module, list(student.twins))
    found: dict[str, list[Twin]] = {}
    for path, twin in student.twins.items():
        inside = [block for block in blocks if within(path, block)]
        own = max(inside, key=len) if inside else path if blocks else ""
        found.setdefault(own, []).append(twin)
    return [Unit(path, tuple(found[path])) for path in _reached(student.module, list(found), calls)]


def within(path: str, block: str) -> bool:
    """Whether a module is a block or lies in it."""
    return path == block or path.startswith(block + ".")


def _blocks(module: nn.Module, layers: list[str]) -> list[str]:
    lists = {path for path, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    entries = [path for path, _ in module.named_modules() if path.rpartition(".")[0] in lists and path]
    several = [e for e in entries if sum(within(path, e) for path in layers) > 1]
    return [e for e in several if not any(other != e and within(other, e) for other in several)]


@torch.no_grad()
def _reached(module: nn.Module, paths: list[str], calls: Iterable[Call]) -> list[str]:
    order: dict[str, None] = {}

    def noting(path: str) -> Callable:
        return lambda *_: order.setdefault(path)

    hooks = [module.get_submodule(path).register_forward_pre_hook(noting(path)) for path in paths]
    try:
        for call in calls:
            if len(order) == len(paths):
                break
            call.run(module)
    finally:
        for handle in hooks:
            handle.remove()
    return list(order)
