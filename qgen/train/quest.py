r"""QuEST: train few layers, those that matter, and leave every other one alone bit for bit.

Time-embedding and modulation layers come first: their error acts on every block. Then the layers that suffer most from the rounding of
their input. Both are found by what the layers do and not by their names: a time layer sees one row per sample, and the sensitivity is

    ‖(Q(x) − x) Ŵᵀ‖² / ‖x Ŵᵀ‖²

on a few of the calls. Their weights before rounding are trained, and their weight and static activation scales with the bins of timesteps.

Two stages: the time layers first, then the others. In each the loss is the distance of the model's outputs plus that of the outputs of
the layers that the stage trains, Σ ‖y_s − y_t‖² / ‖y_t‖² (the paper's is absolute), whose gradient need not pass through the model.

The paper's activation scales per input channel lie on the axis that is summed over, which no integer product can serve; here such scales
can only be smoothing, folded into the weight.
Wang et al., 2024, https://arxiv.org/abs/2402.03666
"""

__all__ = ["QuEST", "sensitivity"]

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qgen.kernels import reference
from qgen.nn.kinds import rows_of
from qgen.probe import input_of
from qgen.train.adam import Adam
from qgen.train.base import Tuning, tunings
from qgen.train.cases import distance
from qgen.train.distill import Lessons
from qgen.train.features import Added, Features
from qgen.train.student import Student
from qgen.train.twin import Twin


@tunings.register("quest")
@dataclass(frozen=True)
class QuEST(Tuning):
    """rate: of weights, in steps of their grid. share: of the layers that is trained beside the time layers, by sensitivity. layers: globs
    on paths, which take the place of both. scale_rate: of the logarithm of scales. local: factor on the distance of the layers' outputs, 0
    leaves it out. first: share of the steps that train the time layers, where there are both kinds."""

    rate: float = 0.02
    share: float = 0.25
    layers: tuple[str, ...] = ()
    scale_rate: float = 5e-4
    local: float = 1.0
    first: float = 0.5

    name = "quest"

    def open(self, student: Student, lessons: Lessons) -> None:
        chosen, timed = self._chosen(student, lessons)
        both = any(twin.path in timed for twin in chosen) and any(twin.path not in timed for twin in chosen)
        student.stages = {twin.path: int(both and twin.path not in timed) for twin in chosen}
        for twin in chosen:
            twin.open_master(self.rate)
            twin.open_scale(self.scale_rate)
            twin.open_steps(self.scale_rate)

    def added(self, student: Student, lessons: Lessons) -> list[Added]:
        terms = super().added(student, lessons)
        return [*terms, _Local(self, student, lessons)] if self.local else terms

    def stage(self, student: Student, done: float) -> int:
        """0 or 1, at a share `done` of the steps."""
        return int(1 in student.stages.values() and done >= self.first)

    def before(self, student: Student, step: int, steps: int, adam: Adam) -> None:
        stage = self.stage(student, step / steps)
        for path, when in student.stages.items():
            for leaf in student.twins[path].leaves.values():
                leaf.requires_grad_(when == stage)

    def _chosen(self, student: Student, lessons: Lessons) -> tuple[list[Twin], set[str]]:
        """Twins that are trained, and which paths are those of time layers."""
        twins = {path: twin for path, twin in student.twins.items() if twin.plain}
        if self.layers:
            named = [t for path, t in twins.items() if any(fnmatchcase(path, glob) for glob in self.layers)]
            if not named:
                raise ValueError(
                    f"no quantized layer that can be trained matches {', '.join(self.layers)}; layers are {', '.join(twins)}"
                )
            return named, set()
        scores, timed = sensitivity(student.module, twins, lessons)
        if not scores:
            raise ValueError(
                "the recorded calls reach no layer whose codes can be trained one by one: quantize to int4_g64"
            )
        rest = sorted((path for path in scores if path not in timed), key=lambda path: -scores[path])
        chosen = {*timed, *rest[: max(1, round(self.share * len(rest)))]}
        return [twin for path, twin in twins.items() if path in chosen], timed


class _Local:
    def __init__(self, method: QuEST, student: Student, lessons: Lessons):
        self.method, self.student = method, student
        self.features = Features(student.module, lessons, student.stages)

    def loss(self, number: int, done: float) -> Tensor:
        want, stage = self.features.want(number), self.method.stage(self.student, done)
        trained = {path: y for path, y in self.features.take().items() if self.student.stages[path] == stage}
        lost = [distance(got, want[path]) for path, got in trained.items()]
        return self.method.local * torch.stack(lost).sum() if lost else torch.zeros(())

    def close(self) -> None:
        self.features.close()


@torch.no_grad()
def sensitivity(
    module: nn.Module, twins: dict[str, Twin], lessons: Lessons, calls: int = 4
) -> tuple[dict[str, float], set[str]]:
    """({path: relative error of the output that the rounding of the input makes}, paths of layers that see one row per sample)."""
    lost: dict[str, list[float]] = {}
    timed: set[str] = set()

    def watch(path: str, twin: Twin) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            if x.ndim == 2:
                timed.add(path)
            lost.setdefault(path, []).append(_rounding(twin, rows_of(x, layer)))

        return hook

    hooks = [t.layer.register_forward_pre_hook(watch(path, t), with_kwargs=True) for path, t in twins.items()]
    try:
        for number in lessons.fit[:: max(1, len(lessons.fit) // calls)][:calls]:
            lessons.calls[number].run(module)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: sum(found) / len(found) for path, found in lost.items()}, timed


def _rounding(twin: Twin, x: Tensor) -> float:
    slots, layer = twin.slots, twin.layer
    if not layer.act_format:
        return 0.0
    w = twin.weight()
    xh = reference.transform_act(x.flatten(0, -2), w.shape[1], slots.get("smooth"), slots.get("shift"), layer.hadamard)
    error = reference.fake_act(xh, layer.act_format, slots.get("act_scale")) - xh
    return float((error @ w.T).square().sum() / (xh @ w.T).square().sum().clamp_min(1e-30))
