"""Calls of the tiny net that know their timestep, and what modules inside two models answer to a call."""

import contextlib
from dataclasses import replace

import torch

from qgen.calibration.base import CalibrationSet
from tests.tiny import net_calls


def timed_calls(samples=5, steps=4):
    """`net_calls` with each call's timestep in its Moment."""
    calls = net_calls(samples, steps).calls
    timed = (replace(c, moment=replace(c.moment, t=float(c.kwargs["timestep"][0]))) for c in calls)
    return CalibrationSet(tuple(timed))


@contextlib.contextmanager
def watching(modules, paths):
    """{(number of the module, path): output} of the parts `paths` of each of `modules`, filled by their runs meanwhile."""
    seen = {}

    def noting(key):
        return lambda part, args, y: seen.update({key: y})

    hooks = [m.get_submodule(p).register_forward_hook(noting((i, p))) for i, m in enumerate(modules) for p in paths]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def apart(student, teacher, paths, calls):
    """Mean relative squared distance of the outputs of two models' parts."""
    lost = []
    with torch.no_grad(), watching((student, teacher), paths) as seen:
        for call in calls:
            for m in (student, teacher):
                call.run(m)
            lost += [float((seen[0, p] - seen[1, p]).square().sum() / seen[1, p].square().sum()) for p in paths]
    return sum(lost) / len(lost)
