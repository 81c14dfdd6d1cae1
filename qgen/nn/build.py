"""From a finished draft to the packed layer that takes the place of a float one."""

__all__ = ["keep_hooks", "packed_layer"]

from typing import Any

import torch
from torch import nn

from qgen.nn.kinds import CONVOLUTIONS, kind_of
from qgen.nn.linear import QuantLinear
from qgen.nn.packed import Packed, held_as
from qgen.site import Draft


def packed_layer(draft: Draft, old: Any, index: int = 0, dtype: torch.dtype | None = None) -> Packed:
    """The layer of the draft's site number `index`, for the float layer `old`, in `dtype` (default: that of `old`); no kernel yet.

    Of a float64 model packed layers hold float32.
    """
    dtype = held_as(dtype or old.weight.dtype)
    if (kind := kind_of(old)) in CONVOLUTIONS:
        packed: Any = CONVOLUTIONS[kind][1]
        return packed.from_draft(draft, old, index, dtype)
    return QuantLinear.from_draft(draft, index, dtype)


def keep_hooks(new: nn.Module, old: nn.Module) -> None:
    """Gives what takes the place of a float layer the forward hooks of that layer: they are removed from both by the same handles.

    Those of torch's weight and spectral norm are left out: they compute the weight, which is packed by now.
    """
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(old, name)
        own = {key for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")}
        kept = type(hooks)((key, hook) for key, hook in hooks.items() if key not in own) if own else hooks
        setattr(new, name, kept)
        setattr(new, f"{name}_with_kwargs", getattr(old, f"{name}_with_kwargs"))
    new._forward_hooks_always_called = old._forward_hooks_always_called
