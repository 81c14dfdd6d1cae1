"""Model families: an Adapter states only what the probe cannot know. Unknown models work by the defaults."""

from qgen.models.base import Adapter, adapter_for, adapters

__all__ = ["Adapter", "adapter_for", "adapters"]
