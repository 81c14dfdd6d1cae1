"""From a finished draft to the packed layer that takes the place of a float one."""

__all__ = ["packed_layer"]

from typing import Any

import torch

from qgen.nn.kinds import CONVOLUTIONS, kind_of
from qgen.nn.linear import QuantLinear
from qgen.nn.packed import Packed
from qgen.site import Draft


def packed_layer(draft: Draft, old: Any, index: int = 0, dtype: torch.dtype | None = None) -> Packed:
    """The layer of the draft's site number `index`, for the float layer `old`, in `dtype` (default: that of `old`); no kernel yet."""
    dtype = dtype or old.weight.dtype
    if (kind := kind_of(old)) in CONVOLUTIONS:
        packed: Any = CONVOLUTIONS[kind][1]
        return packed.from_draft(draft, old, index, dtype)
    return QuantLinear.from_draft(draft, index, dtype)
