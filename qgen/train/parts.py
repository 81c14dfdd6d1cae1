"""scales, lowrank, bias: train one kind of small part and leave all codes as they are.

Few numbers, so little memory and little to overfit; the way for formats whose codes cannot be trained, and for a last touch after others.
"""

__all__ = ["Bias", "LowRankOnly", "Scales"]

from collections.abc import Callable
from dataclasses import dataclass

from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.student import Student
from qgen.train.twin import Twin


@tunings.register("scales")
@dataclass(frozen=True)
class Scales(Tuning):
    """Weight scales, and static activation scales with their bins of timesteps. rate: of their logarithms. share: one factor for each
    "block", "row" or "layer"."""

    rate: float = 2e-3
    share: str = "block"

    name = "scales"

    def open(self, student: Student, lessons: Lessons) -> None:
        if self.share not in ("block", "row", "layer"):
            raise ValueError(f"share is 'block', 'row' or 'layer', found {self.share!r}")
        _each(student, "scale that is a float", lambda t: t.open_scale(self.rate, self.share) | t.open_steps(self.rate))


@tunings.register("lowrank")
@dataclass(frozen=True)
class LowRankOnly(Tuning):
    """The 16-bit low-rank branches that SVDQuant recipes make. rate: in units of their mean magnitude."""

    rate: float = 1e-2

    name = "lowrank"

    def open(self, student: Student, lessons: Lessons) -> None:
        _each(
            student,
            "low-rank branch (recipes named svdquant make them)",
            lambda t: t.open_slot("down", self.rate) & t.open_slot("up", self.rate),
        )


@tunings.register("bias")
@dataclass(frozen=True)
class Bias(Tuning):
    """Biases, and their tables over timesteps. rate: in units of their mean magnitude."""

    rate: float = 2e-2

    name = "bias"

    def open(self, student: Student, lessons: Lessons) -> None:
        _each(student, "bias", lambda t: t.open_slot("bias", self.rate) | t.open_slot("t_bias", self.rate))


def _each(student: Student, what: str, opened: Callable[[Twin], bool]) -> None:
    if not sum(opened(twin) for twin in student.twins.values()):
        raise ValueError(f"no quantized layer has a {what}: choose another method")
