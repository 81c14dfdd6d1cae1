r"""Lessons: the teacher's calls along its own trajectory, its answers, which of them a step takes, and how far the student is.

Data-free: the calls are what the 16-bit pipeline made of noise and prompts. A step takes `batch` of the calls that may be fitted, one from
each of `batch` parts of the trajectory; within its part the place moves by the golden ratio from step to step. So every stretch of steps
covers all timesteps evenly, and which calls a step takes depends on its number alone.
"""

__all__ = ["Lessons", "first"]

import copy
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.errors import BadData

log = logging.getLogger("qgen")
_GOLDEN = 0.6180339887498949
Distance = Callable[[Tensor, Tensor], Tensor]


class Lessons:
    """Calls with the teacher's answers.

    teacher: the float denoiser, or None where every call holds its `output`. weight: of a call in the loss, by its Moment. judged: at most
    so many held-out calls are used. BadData if nothing is left to learn from.
    """

    def __init__(
        self,
        calls: CalibrationSet,
        teacher: nn.Module | None,
        weight: Callable[[Moment], float] | None = None,
        judged: int = 16,
    ):
        self.teacher, self.weight = teacher, weight
        self.calls = calls.calls
        self._answers: dict[int, Tensor] = {}
        fit, held = ([i for i, c in enumerate(self.calls) if c.moment.held == side] for side in (False, True))
        self.fit = self._told(self._along(fit))
        held = self._along(held)
        held = [held[int((i + 0.5) * len(held) / min(judged, len(held)))] for i in range(min(judged, len(held)))]
        self.held = self._told(held) or self.fit[:judged]
        if not self.fit:
            raise BadData(
                "no call is left to learn from: the teacher's answer is NaN or infinite on each, or all are held out"
            )

    def _along(self, numbers: list[int]) -> list[int]:
        """By timestep, the order of recording among equals."""
        return sorted(numbers, key=lambda i: (self.calls[i].moment.t or 0.0, i))

    def _told(self, numbers: list[int]) -> list[int]:
        """Those of the calls on which the teacher's answer is finite."""
        good = []
        for i in numbers:
            if bool(torch.isfinite(self.want(i)).all()):
                good.append(i)
            else:
                log.warning(
                    "the teacher's answer holds NaN or infinity on call %d, %s: left out", i, self.calls[i].moment
                )
        return good

    @torch.no_grad()
    def want(self, number: int) -> Tensor:
        """The teacher's answer to a call, computed once and kept on the CPU."""
        if number not in self._answers:
            call = self.calls[number]
            if call.output is None and self.teacher is None:
                raise ValueError(
                    "these calls do not hold the teacher's answers: pass the teacher, the 16-bit pipeline or module"
                )
            answer = call.output if call.output is not None else first(call.run(self.teacher))
            self._answers[number] = answer.detach().to("cpu", copy=True)
        return self._answers[number]

    def picks(self, step: int, batch: int, seed: int = 0) -> list[int]:
        """Numbers of the calls that a step takes."""
        n, made = len(self.fit), []
        for j in range(batch):
            place = ((step + 1) * _GOLDEN + 0.7548776662466927 * (seed + j)) % 1.0
            made.append(self.fit[min(n - 1, int((j + place) * n / batch))])
        return made

    def loss(self, module: nn.Module, number: int, distance: Distance) -> Tensor:
        """() mean distance over the samples of a call, times the call's weight."""
        call: Call = self.calls[number]
        got = first(call.run(module))
        return distance(got, self.want(number).to(got.device)).mean() * self.weigh(number)

    def weigh(self, number: int) -> float:
        """Factor on the loss of a call."""
        return 1.0 if self.weight is None else float(self.weight(self.calls[number].moment))

    def few(self, count: int) -> "Lessons":
        """The same lessons with at most `count` calls to fit, spread evenly over the trajectory."""
        made, n = copy.copy(self), len(self.fit)
        made.fit = self.fit if n <= count else [self.fit[int((i + 0.5) * n / count)] for i in range(count)]
        return made

    @torch.no_grad()
    def judge(self, module: nn.Module, distance: Distance) -> list[float]:
        """Mean distance of every held-out call."""
        lost = []
        for i in self.held:
            got = first(self.calls[i].run(module))
            lost.append(float(distance(got, self.want(i).to(got.device)).mean()))
        return lost

    def digest(self) -> str:
        """sha256 over the calls and the teacher's answers."""
        h = hashlib.sha256(CalibrationSet(self.calls).digest().encode())
        for i in (*self.fit, *self.held):
            h.update(self.want(i).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(output, Tensor):
        output = output[0] if not isinstance(output, dict) else next(iter(output.values()))
    return output
