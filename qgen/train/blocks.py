"""Block reconstruction: unit after unit gets new codes, learned on its own output behind the units that have theirs already, see `fit`.

Progress on disk is kept after each unit: a killed run goes on with the unit that it was at. Of the states after each unit the one with the
least held-out error of the whole denoiser is the result, as it is of every other method.
"""

__all__ = ["run"]

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qgen.train.distill import Lessons
from qgen.train.fit import Fit
from qgen.train.loop import Plan, accelerated, job_of, mean
from qgen.train.progress import Progress
from qgen.train.student import Student
from qgen.train.units import units_of

if TYPE_CHECKING:
    from qgen.train.brecq import BRECQ

log = logging.getLogger("qgen")


def run(
    student: Student,
    lessons: Lessons,
    method: "BRECQ",
    plan: Plan,
    label: str,
    bar: Callable,
    path: Path | None,
    job: dict,
) -> Progress:
    """As `loop.run`, with `plan.steps` for each block; progress is kept after each block. ValueError without a teacher, or if nothing in
    the student can be rounded otherwise."""
    if lessons.teacher is None:
        raise ValueError(f"{method.name} needs what the teacher's blocks answer: pass the teacher, the 16-bit pipeline")
    accelerator = accelerated(student, plan.precision)
    job = job_of(job, replace(method, memory="any"), plan, accelerator)
    made = (Progress.read(path, job) if path else None) or Progress()
    if not made.before:
        made.before = made.after = lessons.judge(student.module, method.distance)
        made.held[0] = mean(made.before)
    few = lessons.few(method.calls)
    units = units_of(student, (few.calls[i] for i in few.fit))
    settled = {name.rpartition(":")[0]: {"codes": codes} for name, codes in made.leaves.items()}
    for name, slots in settled.items():
        student.twins[name].settle({k: t.to(student.twins[name].slots[k].device) for k, t in slots.items()})
    student.wear()
    total = plan.steps * len(units)
    with bar(total=total, initial=made.step, desc=f"tune {label}", unit="step", leave=True) as meter:
        for index in range(made.step // plan.steps, len(units)):
            unit = units[index]
            fit = Fit(student, few, method, plan, unit, accelerator)
            told = fit.learn(index, meter, made.curve)
            made.blocks.append(told)
            made.step = (index + 1) * plan.steps
            log.info("%s: %s", label, _said(told))
            if told["kept"]:
                settled |= {twin.path: {"codes": twin.slots["codes"]} for twin in fit.twins}
                errors = lessons.judge(student.module, method.distance)
                made.held[made.step] = mean(errors)
                if made.held[made.step] < made.held[made.best]:
                    made.best, made.after = made.step, errors
                    made.packed = {name: dict(student.twins[name].slots) for name in settled}
            if path and accelerator.is_main_process:
                made.leaves = {f"{name}:codes": slots["codes"] for name, slots in settled.items()}
                made.write(path, job)
            accelerator.wait_for_everyone()
            meter.set_postfix_str(f"held-out {made.held[0]:.4g} -> {made.held[max(made.held)]:.4g}")
    if not any(told["layers"] for told in made.blocks):
        formats = ", ".join(sorted({twin.format.name for twin in student.twins.values()}))
        raise ValueError(
            f"codes of {formats} cannot be chosen one by one, or the teacher has no such layers; try the methods 'lowrank' or 'bias', or "
            "quantize to int4_g64"
        )
    return made


def _said(told: dict) -> str:
    name = told["block"] or "the whole model"
    if not told["layers"]:
        return f"block {name}: no layer whose codes can be chosen one by one"
    if "before" not in told:
        return f"block {name}: no held-out call reaches it, it keeps what it had"
    end = "" if told["kept"] else ", it keeps what it had"
    return f"block {name}: held-out error {told['before']:.4g} -> {told['after']:.4g} ({told['undecided']:.2%} undecided){end}"
