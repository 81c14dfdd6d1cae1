"""What a method of fine-tuning is: the leaves that it opens, their rates, what it does between steps, the distance by which it judges.

Adding a method is adding a file: a frozen dataclass, registered under its name, that overrides `open` and what else differs.
"""

__all__ = ["Tuning", "tunings"]

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from qgen.registry import Registry
from qgen.train.adam import Adam
from qgen.train.student import Student

if TYPE_CHECKING:
    from qgen.train.distill import Lessons
    from qgen.train.features import Added
    from qgen.train.loop import Plan
    from qgen.train.progress import Progress

tunings: Registry[type["Tuning"]] = Registry("fine-tuning method", "qgen.train")


@dataclass(frozen=True)
class Tuning:
    """The defaults. rate: of the main leaves, in the unit that the method names; `lr` of `qgen.finetune` takes its place.
    terms: added to the distance of the outputs, such as `LowRankMimic`."""

    rate: float = 0.01
    terms: tuple[Any, ...] = field(default=(), kw_only=True)

    name: ClassVar[str] = ""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    decay: ClassVar[float] = 0.0
    backward: ClassVar[bool] = True  # False: `step` is called in place of a backward pass

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
        """The whole run, see `loop.run`, which methods that do not train all layers at once replace."""
        from qgen.train.loop import run

        return run(student, lessons, self, plan, label, bar, path, job)

    def open(self, student: Student, lessons: "Lessons") -> None:
        """Opens leaves. ValueError if the student has none of the kind."""
        raise NotImplementedError

    def added(self, student: Student, lessons: "Lessons") -> list["Added"]:
        """What is added to the distance of the outputs, called after `open`."""
        return [term.begin(student, lessons) for term in self.terms]

    def schedule(self, done: float) -> float:
        """Factor on all rates at a share `done` of the steps."""
        return 1 - done

    def distance(self, got: Tensor, want: Tensor) -> Tensor:
        """(B,) distance of the student's output from the teacher's, by sample: squared error relative to the teacher's energy."""
        got, want = got.float().flatten(1), want.float().flatten(1)
        return (got - want).square().sum(1) / want.square().sum(1).clamp_min(1e-12)

    def before(self, student: Student, step: int, steps: int, adam: Adam) -> None:
        """Called before each step."""

    def after(self, student: Student, step: int, steps: int) -> None:
        """Called after each step."""
        for twin in student.twins.values():
            twin.project()

    def reopen(self, student: Student, leaves: dict[str, Tensor]) -> None:
        """Puts leaves back that a checkpoint holds, of whatever shapes they had come to."""
        for path, twin in student.twins.items():
            for name in list(twin.leaves):
                if f"{path}:{name}" not in leaves:
                    twin.close(name)
        for key, t in leaves.items():
            path, _, name = key.rpartition(":")
            twin = student.twins[path]
            made = t.to(twin.slots["codes"].device).clone()
            twin.leaves[name] = made.requires_grad_(twin.rates[name] > 0)

    def step(self, student: Student, loss: Callable[[], Tensor], seed: int, factor: float) -> float:
        """One step without a backward pass; returns the loss. Only where `backward` is False."""
        raise NotImplementedError
