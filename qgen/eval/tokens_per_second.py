"""Tokens per second of greedy writing, prompt included: the median of several runs after one warm-up."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from qgen.eval.agreement import greedy
from qgen.eval.bootstrap import Interval

__all__ = ["tokens_per_second"]


def tokens_per_second(model: Any, ids: Tensor, new_tokens: int = 32, runs: int = 5) -> Interval:
    """Median, slowest and fastest run (as mean, low and high) for one prompt ids (1, M)."""
    greedy(model, ids, min(new_tokens, 4))
    speeds = []
    for _ in range(runs):
        _wait()
        start = time.perf_counter()
        greedy(model, ids, new_tokens)
        _wait()
        speeds.append(new_tokens / (time.perf_counter() - start))
    speeds.sort()
    return Interval(speeds[runs // 2], speeds[0], speeds[-1], runs)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
