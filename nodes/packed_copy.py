"""A copy of a text encoder or decoder of ComfyUI's with packed layers, rounded to nearest: what Quantize CLIP and Quantize VAE share."""

__all__ = ["packed_copy"]

from typing import Any

import torch

from qgen.nodes.models import exchange, patcher_around, settle, twin
from qgen.nodes.ops import comfy_layer
from qgen.nodes.progress import Bars
from qgen.recipe import Recipe


def packed_copy(patcher: Any, recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """A patcher whose model is a copy with packed layers; the one that came in is left as it is.

    recipe: one that needs no calibration. dtype: in which packed layers compute; default: that of the float weights.
    """
    import qgen
    from qgen.nn.packed import Packed

    model = qgen.quantize(twin(patcher), recipe, progress=Bars())
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Packed)]:
        like = patcher.get_model_object(path)
        shape = tuple(like.weight.shape)
        made = comfy_layer(layer.layout, layer.canonical(), shape, dtype or layer.compute_dtype, like)
        exchange(model, path, made)
    settle(model, patcher.offload_device)
    return patcher_around(model, patcher)
