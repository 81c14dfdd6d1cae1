"""Searches launch configurations on this GPU and writes them as data, for `qgen.kernels.tuning.load`.

Each candidate is held to the reference first; the fastest that is right is kept, if it beats the present one by more
than the noise. Nothing searches when a model runs: a table without an entry falls back to its heuristic.
"""

__all__ = ["CANDIDATES", "Trial", "tune"]

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from torch import Tensor

from qgen.kernels import tuning
from qgen.kernels.bench_run import Contestant, relative_rms
from qgen.kernels.bench_timer import Clock, Sample
from qgen.kernels.tuning import LARGE, Launch

NOISE = 0.02  # a new entry must be at least so much faster
_TILES = tuple(
    Launch(bm, bn, 64, warps, stages)
    for bm, bn in ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
    for warps in (4, 8)
    for stages in (2, 3, 4)
)
CANDIDATES: dict[str, tuple[Launch, ...]] = {
    **dict.fromkeys(("linear", "linear_groups", "linear_zeros", "w4a16"), _TILES),
    "fp4": tuple(
        Launch(128, bn, bk, warps, stages)
        for bn in (128, 256)
        for bk in (128, 256)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ),
    "act": tuple(
        Launch(bm, warps=warps, stages=stages) for bm in (16, 32, 64) for warps in (4, 8) for stages in (1, 2, 3)
    ),
}


@dataclass(frozen=True)
class Trial:
    """One candidate. seconds None: refused or wrong, `why` says so."""

    launch: Launch
    seconds: float | None
    why: str = ""


def tune(
    op: str,
    family: str,
    m: int,
    contestant: Contestant,
    truth: Tensor,
    clock: Clock,
    candidates: Iterable[Launch] | None = None,
    runs: int = 20,
) -> tuple[dict | None, list[Trial]]:
    """The entry to add, or None if the present one stays; and every trial.

    Arguments:
        op, family: key of `tuning.TABLE`; m: rows of the layer that is run.
        contestant: runs the op once, looking up its launch as it always does. truth: float32, what it should return.

    The entry is {"op", "family", "m", "launch": {…}, "seconds", "before"}.
    """
    present = _time(contestant, truth, clock, runs, Launch(0))
    trials = []
    for launch in CANDIDATES[op] if candidates is None else candidates:
        with _tried(op, family, launch):
            trials.append(_time(contestant, truth, clock, runs, launch))
    right = [trial for trial in trials if trial.seconds is not None]
    best = min(right, key=lambda trial: trial.seconds, default=None)
    if best is None or (present.seconds is not None and best.seconds > present.seconds * (1 - NOISE)):
        return None, trials
    entry = {"op": op, "family": family, "m": m, "launch": asdict(best.launch)}
    return {**entry, "seconds": best.seconds, "before": present.seconds}, trials


def _time(contestant: Contestant, truth: Tensor, clock: Clock, runs: int, launch: Launch) -> Trial:
    try:
        error = relative_rms(contestant.read(contestant.call()), truth)
    except Exception as problem:  # out of shared memory, registers, … : this candidate is out, the search goes on
        return Trial(launch, None, f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}")
    if not error <= contestant.tolerance:
        return Trial(launch, None, f"wrong by {error:.1e}")
    return Trial(launch, Sample.of(clock(contestant.call, runs)).median)


@contextlib.contextmanager
def _tried(op: str, family: str, launch: Launch) -> Iterator[None]:
    """Within the block `launch` is what `tuning.launch` answers for the op, for any number of rows."""
    key, absent = (op, family), object()
    before = tuning.TABLE.get(key, absent)
    tuning.TABLE[key] = ((LARGE, launch),)
    try:
        yield
    finally:
        if before is absent:
            del tuning.TABLE[key]
        else:
            tuning.TABLE[key] = before
