"""How quantized models are saved and loaded. Names are imported on first use: nothing here wakes diffusers or transformers."""

import importlib
from typing import Any

_WHERE = {"load": "checkpoint", "save": "checkpoint", "QGenConfig": "config", "attach": "hub", "install": "hub"}

__all__ = ["QGenConfig", "attach", "install", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"qgen.io.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'qgen.io' has no attribute {name!r}")
