"""One benchmark: contestants that compute the same thing, checked before they are timed, against the roof of the card.

A contestant whose result is not what it should be gets no time, only its error. Percent of the roof is
`bound / median`, the bound being the least time that the card's data sheet allows for the arithmetic and the bytes.
"""

__all__ = ["Contest", "Contestant", "Result", "relative_rms", "run"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qgen.kernels.bench_timer import Clock, Sample


@dataclass(frozen=True)
class Contestant:
    """call: does the work once. tolerance: greatest relative RMS error of its result against the contest's truth.

    bound: least seconds by the data sheet, or None if the card or its rate is unknown. read: what `call` returned to
    the tensor that is compared; not timed.
    """

    name: str
    call: Callable[[], Any]
    tolerance: float
    bound: float | None = None
    read: Callable[[Any], Tensor] = lambda result: result


@dataclass(frozen=True)
class Contest:
    """truth: for a contestant's name, what it should return, in float32. baseline: whom the others are compared
    with."""

    op: str
    shape: str
    flop: float
    contestants: tuple[Contestant, ...]
    truth: Callable[[str], Tensor]
    baseline: str


@dataclass(frozen=True)
class Result:
    """A row. seconds None: not timed, `why` says for what reason."""

    op: str
    shape: str
    name: str
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    tflops: float | None = None
    roof: float | None = None
    speedup: float | None = None
    why: str = ""


def run(contest: Contest, clock: Clock, runs: int = 50) -> list[Result]:
    """Checks every contestant, times those that are right, and returns a row for each."""
    results = [_row(contest, contestant, clock, runs) for contestant in contest.contestants]
    base = next((r.seconds for r in results if r.name == contest.baseline), None)
    return [_compared(result, base) for result in results]


def _row(contest: Contest, contestant: Contestant, clock: Clock, runs: int) -> Result:
    row = Result(contest.op, contest.shape, contestant.name)
    try:
        error = relative_rms(contestant.read(contestant.call()), contest.truth(contestant.name))
    except Exception as problem:  # a contestant may be somebody else's package: its failure is a row, not the end
        return Result(**{**vars(row), "why": f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"})
    if not error <= contestant.tolerance:
        why = f"wrong by {error:.1e} (relative RMS), allowed {contestant.tolerance:.1e}: not timed"
        return Result(**{**vars(row), "error": error, "why": why})
    sample = Sample.of(clock(contestant.call, runs))
    timed = {
        "error": error,
        "seconds": sample.median,
        "low": sample.low,
        "high": sample.high,
        "tflops": contest.flop / sample.median / 1e12,
        "roof": None if contestant.bound is None else contestant.bound / sample.median,
    }
    return Result(**{**vars(row), **timed})


def _compared(result: Result, base: float | None) -> Result:
    if result.seconds is None or base is None:
        return result
    return Result(**{**vars(result), "speedup": base / result.seconds})


def relative_rms(found: Tensor, truth: Tensor) -> float:
    """RMS of the difference over RMS of the truth; infinite if anything is not finite or of another shape."""
    if found.shape != truth.shape or not found.isfinite().all():
        return float("inf")
    rms = truth.square().mean().sqrt()
    return float((found.float() - truth).square().mean().sqrt() / rms.clamp(min=1e-30))
