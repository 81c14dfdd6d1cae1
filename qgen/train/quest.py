r"""QuEST: train few layers, those that matter, and leave every other one alone bit for bit.

Time-embedding and modulation layers come first: their error acts on every block. Then the layers that suffer most from the rounding of
their input. Both are found by what the layers do and not by their names: a time layer sees one row per sample, and the sensitivity is

    ‖(Q(x) − x) Ŵᵀ‖² / ‖x Ŵᵀ‖²

on a few of the calls. Their weights before rounding are trained, and their weight and static activation scales with the bins of timesteps.

The paper's activation scales per input channel lie on the axis that is summed over, which no integer product can serve; here such scales
can only be smoothing, folded into the weight. Of its losses the one on the model's output is used.
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
from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.student import Student
from qgen.train.twin import Twin


@tunings.register("quest")
@dataclass(frozen=True)
class QuEST(Tuning):
    """rate: of weights, in steps of their grid. share: of the layers that is trained beside the time layers, by sensitivity. layers: globs
    on paths, which take the place of both. scale_rate: of the logarithm of scales."""

    rate: float = 0.02
    share: float = 0.25
    layers: tuple[str, ...] = ()
    scale_rate: float = 5e-4

    name = "quest"

    def open(self, student: Student, lessons: Lessons) -> None:
        for twin in self._chosen(student, lessons):
            twin.open_master(self.rate)
            twin.open_scale(self.scale_rate)
            twin.open_steps(self.scale_rate)

    def _chosen(self, student: Student, lessons: Lessons) -> list[Twin]:
        twins = {path: twin for path, twin in student.twins.items() if twin.plain}
        if self.layers:
            named = [t for path, t in twins.items() if any(fnmatchcase(path, glob) for glob in self.layers)]
            if not named:
                raise ValueError(
                    f"no quantized layer that can be trained matches {', '.join(self.layers)}; layers are {', '.join(twins)}"
                )
            return named
        scores, timed = sensitivity(student.module, twins, lessons)
        if not scores:
            raise ValueError(
                "the recorded calls reach no layer whose codes can be trained one by one: quantize to int4_g64"
            )
        rest = sorted((path for path in scores if path not in timed), key=lambda path: -scores[path])
        chosen = {*timed, *rest[: max(1, round(self.share * len(rest)))]}
        return [twin for path, twin in twins.items() if path in chosen]


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
