"""brecq and qdrop: codes chosen block by block, by the error of the block's output, see `blocks` and `fit`.

qdrop learns them behind inputs of which a share is not rounded, see `drop`. `steps` and `batch` of `qgen.finetune` are those of each block.
Only codes change.
BRECQ, Li et al., 2021, https://arxiv.org/abs/2102.05426 · QDrop, Wei et al., 2022, https://arxiv.org/abs/2203.05740
"""

__all__ = ["BRECQ", "QDrop"]

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qgen.checks import parse_bytes
from qgen.train.base import Tuning, tunings
from qgen.train.drop import Drop
from qgen.train.student import Student

if TYPE_CHECKING:
    from qgen.train.distill import Lessons
    from qgen.train.loop import Plan
    from qgen.train.progress import Progress


@tunings.register("brecq")
@dataclass(frozen=True)
class BRECQ(Tuning):
    """rate: in units of each layer's mean gap between neighbours. weight: λ of the term that decides, at first. warm: share of the steps
    without it. calls: at most so many recorded calls fit each block. memory: bytes for inputs and outputs of one block, or text such as
    "2GiB"; less memory means more replays, and the same result. drop: share of each layer's input that is left unrounded in training."""

    rate: float = 0.1
    weight: float = 10.0
    warm: float = 0.2
    calls: int = 128
    memory: int | str = "2GiB"
    drop: float = 0.0

    name = "brecq"

    def __post_init__(self) -> None:
        if self.memory != "any":
            parse_bytes(self.memory)
        if self.terms:
            raise ValueError(f"{self.name} learns each block by its own output and takes no terms: leave them out")
        if not 0 <= self.drop <= 1 or not 0 <= self.warm < 1 or self.calls < 1:
            raise ValueError(
                f"drop is in [0, 1], warm in [0, 1) and calls at least 1, found drop={self.drop}, warm={self.warm}, calls={self.calls}"
            )

    def dropping(self) -> Drop | None:
        """What leaves part of the inputs unrounded; None for plain block reconstruction."""
        return Drop(self.drop) if self.drop else None

    def teach(
        self,
        student: Student,
        lessons: "Lessons",
        plan: "Plan",
        label: str,
        bar: Callable,
        path: Path | None,
        job: dict,
    ) -> "Progress":
        from qgen.train.blocks import run

        return run(student, lessons, self, plan, label, bar, path, job)


@tunings.register("qdrop")
@dataclass(frozen=True)
class QDrop(BRECQ):
    """`brecq` with a share of each layer's input left unrounded in training. For models whose activations are rounded too."""

    drop: float = 0.5

    name = "qdrop"
