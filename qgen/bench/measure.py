"""Memory and time of something that runs here: the rise of resident memory, and two callables timed in turn.

Two models are timed alternately in one process, and which of the two comes first changes from pair to pair, so that a busy or heating
machine slows both alike. The ratio of each pair is what is averaged.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Paired", "Rise", "paired"]


class Rise:
    """A context that samples resident memory every few milliseconds; `nbytes` is the largest rise above its beginning.

    On a GPU the largest rise of torch's allocations is added, for there the weights lie. Where the system tells no resident memory
    (no /proc), nbytes is None.
    """

    def __enter__(self) -> Rise:
        self._gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._start = self._top = _resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self._look()

    def _look(self) -> None:
        if self._top is not None:
            self._top = max(self._top, _resident() or 0)

    @property
    def nbytes(self) -> int | None:
        if self._start is None:
            return None
        gpu = torch.cuda.max_memory_allocated() - self._before if self._gpu else 0
        return self._top - self._start + gpu


@dataclass(frozen=True)
class Paired:
    """Median seconds of the first and the second callable; the median of the paired ratios second / first, with its 95 % interval."""

    first: float
    second: float
    ratio: float
    low: float
    high: float
    pairs: int


def paired(first: Callable[[], Any], second: Callable[[], Any], pairs: int = 9, warm: int = 1) -> Paired:
    """Times two callables alternately; `warm` calls of each come first and are not counted.

    The interval is a percentile bootstrap of the median over pairs (2000 draws, seed 0). ValueError for no pairs.
    """
    if pairs < 1:
        raise ValueError(f"at least one pair of calls is needed, found {pairs}")
    for _ in range(warm):
        first(), second()
    a, b = [], []
    for i in range(pairs):
        order = ((first, a), (second, b)) if i % 2 == 0 else ((second, b), (first, a))
        for call, seconds in order:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    ratios = torch.tensor([y / x for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    picks = torch.randint(pairs, (2000, pairs), generator=torch.Generator().manual_seed(0))
    medians = ratios[picks].quantile(0.5, dim=1).sort().values
    low, high = (float(medians[round(q * 1999)]) for q in (0.025, 0.975))
    return Paired(statistics.median(a), statistics.median(b), statistics.median(ratios.tolist()), low, high, pairs)


def _resident() -> int | None:
    """Resident bytes of this process, None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
