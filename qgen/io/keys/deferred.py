"""Tensors that remember how they are made instead of being made, so that a conversion written for whole models runs tensor by tensor.

diffusers' functions that turn an original checkpoint into its own names take and return dictionaries of tensors: rename, chunk,
concatenate. Given `Deferred` tensors (shapes on meta, no memory) they return expressions; each is computed alone, from the few tensors that
it reads:

    {"to_q.weight": cat([chunk(qkv.weight, 3, dim=0)[0]]), …}        →  value(expression, source.read)

The same expression, evaluated on the numbers of rows, tells which rows of a packed layer make the new one.
"""

__all__ = ["Deferred", "defer", "rows", "sources", "value"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint


@dataclass(frozen=True)
class _Made:
    """`func(*args, **kwargs)`, or its element number `pick`."""

    func: Callable
    args: tuple
    kwargs: dict
    pick: int | None = None


class Deferred(Tensor):
    """A meta tensor with a history: the name of a stored tensor, or an operation on other deferred tensors."""

    made: "str | _Made"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        changes = name.endswith("_") and not name.endswith("__")
        if changes or name in ("__setitem__", "__set__", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
            raise BadCheckpoint(
                f"its conversion reads or changes values ({name}), which cannot be done one tensor at a time"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return _deferred(result, _Made(func, args, kwargs))
        if isinstance(result, (tuple, list)) and result and all(isinstance(r, Tensor) for r in result):
            return tuple(_deferred(r, _Made(func, args, kwargs, i)) for i, r in enumerate(result))
        return result


def defer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
    """The stored tensor called `name`."""
    return _deferred(torch.empty(shape, dtype=dtype, device="meta"), name)


def value(tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    """What a deferred tensor stands for. read: gives stored tensors by name. Ordinary tensors are themselves."""
    if not isinstance(tensor, Deferred):
        return tensor
    if isinstance(tensor.made, str):
        return read(tensor.made)
    made = tensor.made
    with torch.no_grad():
        result = made.func(*_each(made.args, read), **_each(made.kwargs, read))
    return result if made.pick is None else result[made.pick]


def sources(tensor: Tensor) -> set[str]:
    """Names of the stored tensors that a deferred tensor reads."""
    names: set[str] = set()
    _walk(tensor, names)
    return names


def rows(tensor: Deferred) -> tuple[str, Tensor | None]:
    """The stored matrix that a deferred one takes rows from, and which rows (None = all, in order).

    ValueError if it does anything else: mixes several, or touches columns.
    """
    if isinstance(tensor.made, str):
        return tensor.made, None
    names = sources(tensor)
    shape = _leaf(tensor).shape if len(names) == 1 else ()
    if len(shape) < 1:
        raise ValueError(f"it is made of {', '.join(sorted(names)) or 'nothing'}")
    index = torch.arange(shape[0], dtype=torch.int32).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    taken = value(tensor, lambda _: index)
    first = taken.reshape(taken.shape[0], -1)[:, :1]
    if taken.shape[1:] != shape[1:] or not torch.equal(
        taken.reshape(taken.shape[0], -1), first.expand(-1, taken[0].numel())
    ):
        raise ValueError("it is no choice of whole rows")
    if len(shape) > 1:
        columns = torch.arange(shape[1:].numel(), dtype=torch.int32).reshape(shape[1:])
        kept = value(tensor, lambda _: columns.expand(shape))
        if not torch.equal(kept, columns.expand(kept.shape)):
            raise ValueError("it reorders columns")
    chosen = first[:, 0].long()
    return next(iter(names)), None if torch.equal(chosen, torch.arange(shape[0])) else chosen


def _deferred(meta: Tensor, made: "str | _Made") -> Deferred:
    tensor = torch.Tensor._make_subclass(Deferred, meta)
    tensor.__dict__["made"] = made
    return tensor


def _each(data: Any, read: Callable[[str], Tensor]) -> Any:
    """Arguments with every deferred tensor in them computed."""
    if isinstance(data, Deferred):
        return value(data, read)
    if isinstance(data, (tuple, list)):
        return type(data)(_each(item, read) for item in data)
    return {key: _each(item, read) for key, item in data.items()} if isinstance(data, dict) else data


def _walk(data: Any, names: set[str]) -> None:
    if isinstance(data, Deferred):
        data = data.made
    if isinstance(data, _Made):
        data = (data.args, data.kwargs)
    if isinstance(data, str):
        names.add(data)
    elif isinstance(data, dict):
        _walk(tuple(data.values()), names)
    elif isinstance(data, (tuple, list)):
        for item in data:
            if isinstance(item, (Deferred, tuple, list, dict)):
                _walk(item, names)


def _leaf(tensor: Deferred) -> Deferred:
    """Some stored tensor below a deferred one."""
    while not isinstance(tensor.made, str):
        stack = [tensor.made.args, tensor.made.kwargs]
        while stack:
            item = stack.pop()
            if isinstance(item, Deferred):
                tensor = item
                break
            stack += (
                list(item.values()) if isinstance(item, dict) else list(item) if isinstance(item, (tuple, list)) else []
            )
    return tensor
