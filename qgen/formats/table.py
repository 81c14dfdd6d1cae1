"""Table: an element given by nothing but its values, in any order, for grids that are no integers and no floats.

Rounds to the nearest value; what lies exactly between two takes the lower one (or the upper one, with `upward`), because such tables have
no even neighbour. Values that occur twice, like +0 and -0, are encoded as the first of them.
"""

__all__ = ["Table"]

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qgen.formats.base import Element


@dataclass(frozen=True)
class Table(Element):
    """An element whose ties all go one way. NaN becomes the code of the largest value."""

    upward: bool = False

    def encode(self, x: Tensor) -> Tensor:
        mids, codes = _sorted(self, x.device)
        return codes[torch.bucketize(x.float().contiguous(), mids, right=self.upward)]


@lru_cache(maxsize=64)
def _sorted(element: Table, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints of neighbouring values, computed in float32 as the values are stored, and the codes in the order of values."""
    first: dict[float, int] = {}
    for code, value in enumerate(element.values):
        if value == value:
            first.setdefault(value + 0.0, code)
    values = torch.tensor(sorted(first), dtype=torch.float32, device=device)
    mids = torch.stack([(a + b) / 2 for a, b in pairwise(values)])
    return mids, torch.tensor([first[v] for v in sorted(first)], dtype=torch.uint8, device=device)
