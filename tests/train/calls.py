"""Calls of the tiny net that know their timestep."""

from dataclasses import replace

from qgen.calibration.base import CalibrationSet
from tests.tiny import net_calls


def timed_calls(samples=5, steps=4):
    """`net_calls` with each call's timestep in its Moment."""
    calls = net_calls(samples, steps).calls
    timed = (replace(c, moment=replace(c.moment, t=float(c.kwargs["timestep"][0]))) for c in calls)
    return CalibrationSet(tuple(timed))
