"""What transformers calls the cache of keys and values: `past_key_values` until 5.23, `cache` from 5.24 on.

A model says it in its own signature, an output in its own keys; so that nobody has to know a version.
"""

__all__ = ["cache_name", "cache_of"]

import inspect
from typing import Any


def cache_name(model: Any) -> str:
    """The argument of `model(...)` and of `model.generate(...)` that takes a cache. Wrapped models (peft) are looked into."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return output["cache"] if "cache" in output else output["past_key_values"]
