r"""Fit: the roundings of all layers of one unit are learned together, on the error of the unit's output.

    min over a   ‖B̂(x̂; a) − B(x)‖² / (‖B(x)‖² n) + λ / numel · Σ (1 − |2h(a) − 1|^β)

x̂ comes from the quantized layers before, B(x) from the float model: each unit makes up for what those before it lost. n is what rounding
hard to the packed codes changes in the unit's output, so that λ means the same for every unit. The first part of the steps runs without the
second term; then β falls from 20 to 2, and λ grows a hundredfold: with a constant one 6 % of the weights of the block in tests/train/
test_brecq.py were at neither neighbour after 200 steps, and hard and soft outputs 2.7 % apart; with the growing one none. In the end h is
rounded hard. The unit gets its new codes only where its error on held-out calls, rounded hard, fell.
BRECQ, Li et al., 2021, https://arxiv.org/abs/2102.05426
"""

__all__ = ["Fit"]

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qgen.checks import parse_bytes
from qgen.methods.rectified import beta
from qgen.train.adam import Adam
from qgen.train.cases import Cases, distance
from qgen.train.distill import Lessons
from qgen.train.loop import Plan, descend, mean
from qgen.train.student import Student
from qgen.train.units import Unit

if TYPE_CHECKING:
    from qgen.train.brecq import BRECQ

log = logging.getLogger("qgen")
_GROWTH = 100.0  # of λ, from the end of the first part to the end


@dataclass
class Fit:
    """One unit while it is learned."""

    student: Student
    lessons: Lessons
    method: "BRECQ"
    plan: Plan
    unit: Unit
    accelerator: Any

    def learn(self, index: int, meter: Any, curve: list[float]) -> dict:
        """Learns the roundings and keeps them in the student if that helped; what the report says of it."""
        self.cases = Cases(self.student.module, self.lessons, self.unit.path, parse_bytes(self.method.memory))
        self.twins = [twin for twin in self.unit.twins if twin.open_rounding(self.method.rate)]
        told = {"block": self.unit.path, "layers": len(self.twins), "kept": False}
        try:
            held = [i for i in self.lessons.held if self.cases[i] is not None]
            if not self.twins or not held:
                meter.update(self.plan.steps)
                return told
            self.student.wear()
            told["before"] = self._error(held)
            finite = self._descend(index, meter, curve)
            weights = sum(int(twin.rounding.free.sum()) for twin in self.twins)
            told["undecided"] = sum(t.rounding.undecided(t.leaves["rise"]) for t in self.twins) / max(weights, 1)
            told["soft_hard"] = self._parted(held) ** 0.5
            told["after"] = self._error(held) if finite else math.nan
            told["kept"] = told["after"] < told["before"]  # NaN is not less
            if told["kept"]:
                for twin in self.twins:
                    twin.settle({"codes": twin.packed()["codes"]})
            return told
        finally:
            for twin in self.twins:
                twin.close("rise")
                twin.drop = None
            self.student.wear()

    def _descend(self, index: int, meter: Any, curve: list[float]) -> bool:
        """The steps; False where the loss was no number."""
        plan, adam = self.plan, Adam((0.9, 0.999))
        self.size = max(self._parted(self.lessons.fit[:: max(1, len(self.lessons.fit) // 16)]), 1e-12)
        self.drop = self.method.dropping()
        for twin in self.twins:
            twin.drop = self.drop
        for step in range(plan.steps):
            picks = self.lessons.picks(step, plan.batch, plan.seed)
            mine = picks[self.accelerator.process_index :: self.accelerator.num_processes]
            lost = descend(self.student, self.accelerator, adam, mine, partial(self._lost, len(picks), step, index))
            if not math.isfinite(lost):
                said = "block %s: the loss of step %d is %s; it keeps what it had"
                log.warning(said, self.unit.path, step + 1, lost)
                meter.update(plan.steps - step)
                return False
            curve.append(lost)
            meter.update(1)
            meter.set_postfix_str(f"{self.unit.path or 'model'}: loss {lost:.4g}")
        if self.drop is not None:
            self.drop.moment = None
        return True

    def _lost(self, count: int, step: int, index: int, number: int) -> Tensor:
        """() a call's part of the loss of a step on `count` calls."""
        case, lost = self.cases[number], torch.zeros((), device=self.twins[0].leaves["rise"].device)
        if case is not None:
            if self.drop is not None:
                self.drop.moment = (self.plan.seed, index, step, number)
            with self.accelerator.autocast():
                lost = distance(self.cases.run(case), case.want) / self.size * self.lessons.weigh(number)
        done, warm = step / self.plan.steps, self.method.warm
        if (b := beta(done, warm)) is not None:
            leaves = [(twin.rounding, twin.leaves["rise"]) for twin in self.twins]
            pull = torch.stack([rounding.pull(leaf, b) for rounding, leaf in leaves]).sum()
            weight = self.method.weight * _GROWTH ** ((done - warm) / (1 - warm))
            lost = lost + weight / sum(leaf.numel() for _, leaf in leaves) * pull
        if not lost.requires_grad:  # the call does not reach the unit, or nothing in it depends on its codes
            lost = lost + 0 * self.twins[0].leaves["rise"].sum()
        return lost / count

    @contextlib.contextmanager
    def _rounded(self) -> Iterator[None]:
        for twin in self.twins:
            twin.rounding.hard = True
        try:
            yield
        finally:
            for twin in self.twins:
                twin.rounding.hard = False

    @torch.no_grad()
    def _error(self, numbers: list[int]) -> float:
        """Mean error of the unit's output, rounded hard, relative to the float unit's."""
        with self._rounded():
            return mean(
                [float(distance(self.cases.run(case), case.want)) for case in map(self.cases.__getitem__, numbers)]
            )

    @torch.no_grad()
    def _parted(self, numbers: list[int]) -> float:
        """Mean squared distance of soft and hard outputs, relative to the float unit's."""
        found = []
        for case in map(self.cases.__getitem__, numbers):
            if case is not None:
                soft = self.cases.run(case)
                with self._rounded():
                    found.append(float(distance(self.cases.run(case), soft, case.want)))
        return mean(found) if found else 0.0
