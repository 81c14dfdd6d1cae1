"""Quantized models by what they were made of, so that queueing again does not quantize again.

The key is content: the recipe, settings, conditioning, patches, and of the weights (too many bytes to read at every prompt) names, shapes,
dtypes and a sample of values. The last model is kept; others only while a graph holds them.
"""

__all__ = ["Cache", "fingerprint"]

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 4096  # values of a large tensor that are read
_WHOLE = 1 << 16  # bytes up to which a tensor is read as a whole


def fingerprint(*things: Any) -> str:
    """sha256 of nested tuples, lists, dicts, texts, numbers and tensors; other objects count by their class."""
    h = hashlib.sha256()
    _feed(h, things)
    return h.hexdigest()


def _feed(h: Any, thing: Any) -> None:
    if isinstance(thing, Tensor):
        h.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
        flat = thing.detach().reshape(-1) if thing.is_contiguous() else thing.detach().contiguous().reshape(-1)
        if flat.nbytes > _WHOLE:
            flat = flat[:: max(1, flat.numel() // _SAMPLED)]
        if flat.numel() and flat.device.type != "meta":
            h.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            h.update(f"{{{key}".encode())
            _feed(h, thing[key])
    elif isinstance(thing, (tuple, list)):
        h.update(f"[{len(thing)}".encode())
        for one in thing:
            _feed(h, one)
    elif isinstance(thing, (str, int, float, bool, bytes, type(None))):
        h.update(f"<{thing!r}>".encode())
    else:
        h.update(f"<{type(thing).__name__}>".encode())
        _feed(h, getattr(thing, "weights", None))  # ComfyUI's adapters


class Cache:
    """`get(key)` and `put(key, model, entry)`: the entry lives as long as the model (or its patcher), and the last one lives here."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[weakref.ref, Any]] = {}
        self._last: Any = None

    def get(self, key: str) -> tuple[Any, Any] | None:
        """(model, entry), or None."""
        ref, entry = self._entries.get(key, (None, None))
        model = ref() if ref else None
        if model is None:
            return None
        self._last = model
        return model, entry

    def put(self, key: str, model: Any, entry: Any) -> None:
        self._last = model
        self._entries[key] = (weakref.ref(model, lambda _: self._entries.pop(key, None)), entry)
