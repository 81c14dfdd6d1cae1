"""From ComfyUI's names of layers to diffusers', for formats that diffusers reads."""

__all__ = ["to_diffusers"]

from pathlib import Path
from types import SimpleNamespace
from typing import Any


def to_diffusers(parts: Any) -> tuple[Any, Any]:
    """Parts under diffusers' names, fused layers cut; and what is known of the model. ValueError for families whose names are not known."""
    from qgen.errors import BadCheckpoint
    from qgen.io.into import renamed
    from qgen.io.parts import Parts
    from qgen.io.peers.base import Layer, Model, Plain

    layers, plains = {}, {}
    for part in parts:
        if isinstance(part, Layer):
            layers[part.path] = part
        else:
            plains[part.name] = part.tensor
    try:
        layers, plains, plan = renamed(layers, plains, {}, SimpleNamespace(where=Path("model")))
    except BadCheckpoint as error:
        raise ValueError(f"format: diffusers' names of this model are not known here: {error}") from None
    if not plan.kind or not plan.config:
        raise ValueError(
            "format: diffusers' class and config of this model are not known here; choose a qgen or ComfyUI format"
        )
    made = [*layers.values(), *(Plain(name, tensor) for name, tensor in plains.items())]
    return Parts(made, len(made)), Model(plan.kind, plan.config)
