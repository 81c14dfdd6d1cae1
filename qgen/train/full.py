"""full: every weight before its rounding, every scale, low-rank branch and bias, all together: quantization-aware training as such.

The weight moves by a share of its mean step, so that wide and narrow layers change as many codes.
LSQ, Esser et al., 2020, https://arxiv.org/abs/1902.08153
"""

__all__ = ["Full", "open_weights"]

from dataclasses import dataclass

from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.student import Student
from qgen.train.twin import Twin


@tunings.register("full")
@dataclass(frozen=True)
class Full(Tuning):
    """rate: of weights, in steps of their grid. scale_rate: of the logarithm of scales, static activation scales among them. slot_rate: of
    low-rank branches and biases, in units of their mean magnitude."""

    rate: float = 0.01
    scale_rate: float = 5e-4
    slot_rate: float = 5e-3

    name = "full"

    def open(self, student: Student, lessons: Lessons) -> None:
        for twin in open_weights(student, self.rate, self.scale_rate):
            for slot in ("down", "up", "bias", "t_bias"):
                twin.open_slot(slot, self.slot_rate)


def open_weights(student: Student, rate: float, scale_rate: float) -> list[Twin]:
    """Opens weights and scales of all layers whose codes can be chosen one by one, and returns these. ValueError if there are none."""
    twins = [twin for twin in student.twins.values() if twin.plain]
    if not twins:
        formats = sorted({twin.format.name for twin in student.twins.values()})
        raise ValueError(
            f"codes of {', '.join(formats)} cannot be trained one by one; try the methods 'lowrank' or 'bias', or quantize to int4_g64"
        )
    for twin in twins:
        twin.open_master(rate)
        if scale_rate:
            twin.open_scale(scale_rate)
            twin.open_steps(scale_rate)
    return twins
