r"""QZO: train scales without a backward pass, in the memory of inference.

Codes are discrete, scales are not: the loss at two noises of the scales gives one directional derivative, clipped, along which they move
(see `zeroth`). The noise is relative, s · exp(ε z), since scales span decades; the paper's is absolute. Clipping biases the estimate and is
what survives a call whose loss is an outlier.

One direction in thousands of dimensions says little: this takes thousands of steps. With one factor for each layer (`share="layer"`, the
default here) instead of each block it takes hundreds.
Shang et al., 2025, https://arxiv.org/abs/2505.13430
"""

__all__ = ["QZO"]

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qgen.train.base import tunings
from qgen.train.parts import Scales
from qgen.train.student import Student
from qgen.train.zeroth import descend, slope


@tunings.register("qzo")
@dataclass(frozen=True)
class QZO(Scales):
    """rate: of the logarithms of scales, times the slope. eps: size of the noise. clip: largest slope that is believed. share: one factor
    for each "block", "row" or "layer"."""

    rate: float = 2e-3
    share: str = "layer"
    eps: float = 1e-3
    clip: float = 5.0

    name = "qzo"
    backward = False

    def step(self, student: Student, loss: Callable[[], Tensor], seed: int, factor: float) -> float:
        d, lost = slope(loss, student.probe, seed, self.eps)
        if d == d:
            rates = {name: rate * factor for name, rate in student.rates().items()}
            descend(student.leaves(), student.probe, seed, d, rates, self.clip)
        return lost
