"""Weights that are no layers: experts stacked in one parameter (E, N, K), and those of `nn.MultiheadAttention`, which calls no layer;
and layers that compute something else than their base class does.

They stay float. The report lists them, so that a model whose size barely shrank says why.
"""

__all__ = ["stacked"]

from torch import nn

from qgen.nn.kinds import kind_of, shape_of, usual
from qgen.nn.packed import Packed

_HOW = {False: "stacked in one parameter, which are no layers", True: "that torch reads past their layers"}
_WIDE = 32  # smaller matrices are tables of positions or shifts


def stacked(module: nn.Module) -> list[dict]:
    """Rows of the report for modules that hold stacks of matrices as parameters, and for layers with a forward of their own."""
    rows = []
    for path, part in module.named_modules():
        if (kind := kind_of(part)) and not isinstance(part, Packed) and not usual(part):
            facts = {"path": path, "kind": kind, "block": "", "shape": list(shape_of(part)), "role": "inside"}
            nbytes = 2 * sum(p.numel() for p in part.parameters(recurse=False))
            why = f"{type(part).__name__} computes something else than its base class does"
            rows.append({**facts, "spec": "float", "kernel": "", "why": why, "nbytes": nbytes, "bytes16": nbytes})
        found = {
            name: p
            for name, p in part.named_parameters(recurse=False)
            if p.ndim == 3 and p.shape[0] > 1 and min(p.shape[1:]) >= _WIDE and not kind_of(part)
        }
        if isinstance(part, nn.MultiheadAttention):
            found = {name: p for name, p in part.named_parameters() if p.ndim == 2}
        if found:
            nbytes = 2 * sum(p.numel() for p in found.values())
            shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in found.items())
            why = f"{type(part).__name__} holds matrices {_HOW[isinstance(part, nn.MultiheadAttention)]}: {shapes}"
            facts = {
                "path": path,
                "kind": "stack",
                "block": "",
                "shape": list(next(iter(found.values())).shape),
                "role": "inside",
            }
            rows.append({**facts, "spec": "float", "kernel": "", "why": why, "nbytes": nbytes, "bytes16": nbytes})
    return rows
