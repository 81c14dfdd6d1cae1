r"""Rounding: the two neighbours of each weight on its grid, and a leaf that moves between them, so that gradients choose codes.

    W(a) = low + h(a / s) · reach,    reach = high − low

h is the rectified sigmoid. s, the reach, makes a step of Adam the same change of weight for wide and narrow gaps of a float grid. The
start is where the float weight lies, or, where the packed code is not the nearest (GPTQ's is not), the place next to it in the cell of
that code: rounded hard at once, it gives the codes that were there.
Nagel et al., 2020, https://arxiv.org/abs/2004.10568
"""

__all__ = ["Rounding"]

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.methods.grid import neighbours
from qgen.methods.rectified import place, rectified
from qgen.train import fake

_UNDECIDED = (0.05, 0.95)


class Rounding:
    """q: packed weight (N, Kp) of a `plain` format, whose scales stay. wanted: float weight (N, Kp). hard: whether `weight` rounds h.

    start: (N, Kp) float32, the leaf a · s at the beginning. gap: mean reach, in units of weight.
    """

    def __init__(self, q: QTensor, wanted: Tensor):
        self.fmt, self.q, self.hard = formats.get(q.format), q, False
        scaling = (q.scales, q.global_scale, q.zero)
        units = self.fmt.normalize(fake.anchor(q, wanted), *scaling)
        low, high = neighbours(self.fmt, units)
        self.low = self.fmt.scaled(low, *scaling)
        self.reach = self.fmt.scaled(high, *scaling) - self.low
        self.free = self.reach > 0
        self.gap = float(self.reach[self.free].mean()) if bool(self.free.any()) else 1.0
        rest = torch.where(self.free, (units - low) / (high - low).clamp_min(1e-12), 0.5).clamp(1e-4, 1 - 1e-4)
        self.start = place(rest) * self._s

    @property
    def _s(self) -> Tensor:
        return self.reach.clamp_min(1e-2 * self.gap)

    def up(self, leaf: Tensor) -> Tensor:
        """h (N, Kp): 0 takes the lower neighbour, 1 the upper."""
        return rectified(leaf / self._s)

    def weight(self, leaf: Tensor) -> Tensor:
        """(N, Kp) float32, on the grid if `hard`, with a gradient for the leaf if not."""
        h = self.up(leaf)
        return self.low + (h >= 0.5 if self.hard else h) * self.reach

    def pull(self, leaf: Tensor, beta: float) -> Tensor:
        """() Σ (1 − |2h − 1|^β): 0 where every weight has come to one of its neighbours."""
        return (1 - (2 * self.up(leaf) - 1).abs().pow(beta))[self.free].sum()

    def undecided(self, leaf: Tensor) -> float:
        """Number of weights that are at neither neighbour."""
        h = self.up(leaf.detach())
        return float((self.free & (h > _UNDECIDED[0]) & (h < _UNDECIDED[1])).sum())

    @torch.no_grad()
    def codes(self, leaf: Tensor) -> Tensor:
        """Packed codes of the hard rounding."""
        values = self.low + (self.up(leaf) >= 0.5) * self.reach
        return self.fmt.pack(self.fmt.encode(values, self.q.scales, self.q.global_scale, self.q.zero))
