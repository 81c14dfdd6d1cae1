r"""Ternary and binary weights: `ternary_g64`, `binary_g64`, … with the scale per block that leaves the least squared error.

Binary: codes for -1 and +1, one bit. Σ(x - s·sign x)² is least for s = mean |x|; 0 counts as positive.
Ternary: codes for -1, 0, +1, two bits in two's complement. For a given s the best codes are those of the nearest value, 0 below s / 2.
If the k largest magnitudes are kept, the best s is their mean and the error falls by (Σ of them)² / k; sorting turns all k into one
cumulative sum, so the best of all scales is found exactly and not by alternation.

XNOR-Net, Rastegari et al., 2016, https://arxiv.org/abs/1603.05279 · Ternary Weight Networks, Li et al., 2016, https://arxiv.org/abs/1605.04711
"""

__all__ = ["BINARY", "TERNARY", "Binary", "Ternary"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats.base import NumberFormat, formats
from qgen.formats.integer import INT2
from qgen.formats.table import Table

BINARY = Table("binary", 1, (-1.0, 1.0), upward=True)
TERNARY = INT2


@dataclass(frozen=True)
class Binary(NumberFormat):
    """±1 times the mean magnitude of the block."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.store(self.blocks(x).abs().double().mean(-1).float() * clip), None, None


@dataclass(frozen=True)
class Ternary(NumberFormat):
    """-1, 0 and +1 times the scale of least squared error."""

    def ranges(self, x: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        magnitudes = self.blocks(x).abs()
        size = magnitudes.amax(-1, keepdim=True)
        falling = torch.where(size > 0, magnitudes / size, 0.0).sort(-1, descending=True).values
        sums, kept = falling.cumsum(-1), torch.arange(1, falling.shape[-1] + 1, device=x.device)
        best = (sums.square() / kept).argmax(-1, keepdim=True)
        return self.store((sums / kept).gather(-1, best)[..., 0] * size[..., 0] * clip), None, None


for _block in (32, 64, 128, None):
    for _kind, _element in ((Binary, BINARY), (Ternary, TERNARY)):
        _name = f"{_kind.__name__.lower()}_{f'g{_block}' if _block else 'row'}"
        formats.add(_name, _kind(_name, _element, _block, torch.bfloat16 if _block else torch.float32))
