"""Which model drew this? A short hash over what a pipeline computes with.

Every tensor of every component enters with its name, shape, dtype and 64 values spread over it, and every component
with its class and its configuration. Reading a few values per tensor keeps it quick for tens of gigabytes, and quantizing, another
checkpoint or another scheduler changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]

SPREAD = 64


def fingerprint(pipe: Any) -> str:
    """Returns 16 hex digits for a pipeline or module; anything else is known by its class and `fingerprint` attribute."""
    total = hashlib.sha256()
    for name, part in _parts(pipe):
        total.update(f"{name}\0{type(part).__qualname__}\0{_settings(part)}\0".encode())
        if isinstance(part, nn.Module):
            for key, tensor in _tensors(part):
                total.update(f"{key}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
                total.update(_sample(tensor))
    return total.hexdigest()[:16]


def _parts(pipe: Any) -> Iterator[tuple[str, Any]]:
    found = getattr(pipe, "components", None)
    yield "", pipe
    if isinstance(found, dict):
        yield from sorted((name, part) for name, part in found.items() if part is not None)


def _settings(part: Any) -> str:
    """The configuration as text, without the paths and versions that diffusers keeps in it (keys that start with _)."""
    config = getattr(part, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, dict):
        return str(getattr(part, "fingerprint", ""))
    kept = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
    return json.dumps(kept, sort_keys=True, default=lambda value: type(value).__qualname__)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted((*module.named_parameters(), *module.named_buffers()), key=lambda item: item[0])


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.is_meta or not flat.numel():
        return b""
    picks = torch.linspace(0, flat.numel() - 1, min(SPREAD, flat.numel()), dtype=torch.float64).round().long()
    return flat[picks.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
