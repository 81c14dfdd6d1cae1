"""The loop: a step, a look at held-out calls now and then, progress on disk. accelerate gives the device, the precision and the processes.

Several processes share the calls of each step; their gradients are added and every one takes the same step, so that all hold the same
student, and a run of two is a run of one but for the order of a sum.
"""

__all__ = ["Plan", "accelerated", "descend", "device_of", "job_of", "mean", "run"]

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import QgenError
from qgen.train.adam import Adam
from qgen.train.base import Tuning
from qgen.train.distill import Lessons
from qgen.train.features import Added
from qgen.train.progress import Progress
from qgen.train.student import Student

log = logging.getLogger("qgen")


@dataclass(frozen=True)
class Plan:
    """steps: of the optimizer. batch: calls per step. every: steps between looks at held-out calls, at which progress is kept too."""

    steps: int = 200
    batch: int = 1
    every: int = 20
    seed: int = 0
    precision: str = "no"


def run(
    student: Student,
    lessons: Lessons,
    method: Tuning,
    plan: Plan,
    label: str,
    bar: Callable,
    path: Path | None,
    job: dict,
) -> Progress:
    """Trains the student and returns where it came to; the model's layers are those of before, the best state is in the result.

    path: file of the progress, or None. job: what must agree for a run to go on from it. The run ends early where the loss is no number.
    """
    accelerator = accelerated(student, plan.precision)
    job = job_of(job, method, plan, accelerator)
    known = Progress.read(path, job) if path else None
    made = known or Progress()
    adam = Adam(method.betas, method.decay)
    if not made.before:
        made.before = made.after = lessons.judge(student.module, method.distance)
        made.held[0] = mean(made.before)
    method.open(student, lessons)
    if known is not None and known.step:
        method.reopen(student, known.leaves)
        adam.restore({name: t.to(device_of(student)) for name, t in known.adam.items()})
    student.wear()
    with (
        contextlib.ExitStack() as stack,
        bar(total=plan.steps, initial=made.step, desc=f"tune {label}", unit="step", leave=True) as meter,
    ):
        added = method.added(student, lessons)
        for term in added:
            stack.callback(term.close)
        meter.set_postfix_str(f"held-out {made.held[0]:.4g}")
        for step in range(made.step, plan.steps):
            method.before(student, step, plan.steps, adam)
            factor = method.schedule(step / plan.steps)
            lost = _step(student, lessons, method, plan, accelerator, adam, step, factor, added)
            if not math.isfinite(lost):
                kept = f"that of step {made.best}" if made.best else "the one before fine-tuning: it is unchanged"
                said = (
                    "%s: the loss of step %d is %s; the run ends here, and the model gets its best held-out state, %s"
                )
                log.warning(said, label, step + 1, lost, kept)
                break
            method.after(student, step, plan.steps)
            made.curve.append(lost)
            made.step = step + 1
            if made.step % plan.every == 0 or made.step == plan.steps:
                _look(student, lessons, method, made)
                if path and accelerator.is_main_process:
                    made.leaves, made.adam = student.leaves(), adam.state()
                    made.write(path, job)
                accelerator.wait_for_everyone()
            meter.update(1)
            now = made.held[max(made.held)]
            meter.set_postfix_str(f"loss {lost:.4g}, held-out {made.held[0]:.4g} -> {now:.4g}")
    return made


def job_of(job: dict, method: Tuning, plan: Plan, accelerator: Any) -> dict:
    """What must agree for a run to go on from the progress of another."""
    told = {"method": f"{method.name}: {method!r}", **asdict(plan)}
    return {**job, **told, "processes": accelerator.num_processes, "threads": torch.get_num_threads()}


def _step(
    student: Student,
    lessons: Lessons,
    method: Tuning,
    plan: Plan,
    accelerator: Any,
    adam: Adam,
    step: int,
    factor: float,
    added: list[Added],
) -> float:
    """One step on this process's share of the calls; the loss over all of them."""
    picks = lessons.picks(step, plan.batch, plan.seed)
    mine = picks[accelerator.process_index :: accelerator.num_processes]

    def loss(number: int) -> Tensor:
        with accelerator.autocast():
            lost = lessons.loss(student.module, number, method.distance)
            for term in added:
                lost = lost + term.loss(number, step / plan.steps)
            return lost / len(picks)

    if not method.backward:

        def whole() -> Tensor:
            parts = torch.stack([loss(i) for i in mine]) if mine else torch.zeros(1, device=accelerator.device)
            return accelerator.reduce(parts.sum(), "sum")

        return method.step(student, whole, plan.seed * 1_000_003 + step, factor)
    return descend(student, accelerator, adam, mine, loss, factor)


def descend(
    student: Student, accelerator: Any, adam: Adam, mine: list[int], loss: Callable[[int], Tensor], factor: float = 1.0
) -> float:
    """One step down the sum of `loss` over calls, of which this process has those of `mine`; the sum, or NaN where no step was possible."""
    leaves = student.leaves()
    total = torch.zeros((), device=device_of(student))
    for leaf in leaves.values():
        leaf.grad = None
    for number in mine:
        lost = loss(number)
        lost.backward()
        total += lost.detach()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if accelerator.num_processes > 1:
        grads, total = _added(accelerator, leaves, grads, total)
    lost = float(total)
    if math.isfinite(lost) and all(bool(torch.isfinite(g).all()) for g in grads.values()):
        adam.step(leaves, grads, student.rates(), factor)
        return lost
    return math.nan


def _added(accelerator: Any, leaves: dict, grads: dict, total: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and loss added over all processes, in one message."""
    parts = [grads.get(name, torch.zeros_like(leaf)).flatten() for name, leaf in leaves.items()]
    flat = accelerator.reduce(torch.cat([total.reshape(1), *parts]), "sum")
    total, *pieces = flat.split([1, *(p.numel() for p in parts)])
    return {n: g.view_as(leaf) for (n, leaf), g in zip(leaves.items(), pieces, strict=True)}, total[0]


def _look(student: Student, lessons: Lessons, method: Tuning, made: Progress) -> None:
    """Judges the student as it would be packed now, without what will be gone at the end."""
    hidden = {path: twin.hide() for path, twin in student.twins.items() if twin.leaves}
    try:
        errors = lessons.judge(student.module, method.distance)
    finally:
        for path, branch in hidden.items():
            student.twins[path].leaves.update(branch)
    made.held[made.step] = mean(errors)
    if made.held[made.step] < made.held[made.best]:  # NaN is not less
        made.best, made.after, made.packed = made.step, errors, student.packed()


def mean(errors: list[float]) -> float:
    """Of errors by call."""
    return sum(errors) / len(errors)


def device_of(student: Student) -> torch.device:
    """Where the denoiser lies."""
    return next(student.module.parameters()).device


def accelerated(student: Student, precision: str) -> Any:
    """accelerate's view of this run. With several processes the model moves to the process's own device."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        raise QgenError("fine-tuning needs the package accelerate: pip install 'qgen-diffusion[diffusers]'") from None

    accelerator = Accelerator(cpu=device_of(student).type == "cpu", mixed_precision=precision)
    if accelerator.num_processes > 1:
        student.module.to(accelerator.device)
    return accelerator
