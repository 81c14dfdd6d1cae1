"""Bytes of the key/value cache, counted from the tensors that it holds after reading a prompt.

Every tensor that the cache reaches (its layers, their attributes, containers) counts once by its storage's bytes in use, so packed
codes and scales of a quantized cache count as what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qgen.eval.perplexity import _device
from qgen.nn.cache_name import cache_of

__all__ = ["cache_bytes", "kv_bytes"]


@torch.inference_mode()
def kv_bytes(model: Any, ids: Tensor) -> int:
    """Bytes after the model has read ids (1, M)."""
    return cache_bytes(cache_of(model(input_ids=ids.to(_device(model)), use_cache=True)))


def cache_bytes(cache: Any) -> int:
    """Bytes of all distinct tensors in a cache."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in _tensors(cache, set())}.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    if id(thing) in seen or isinstance(thing, (Tensor, nn.Module, type, str, bytes, torch.device, torch.dtype)):
        return
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        inside = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    for each in inside:
        yield from _tensors(each, seen)
