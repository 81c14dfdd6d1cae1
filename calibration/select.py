r"""Which calls of a run stand for the others: each calibrator gives every call a weight, and calls are drawn from it without repetition.

    uniform      1
    logsnr       distance between neighbours on the log-SNR axis: the trajectory evenly covered, whatever the scheduler's spacing
    normal       density of Normal(mean, std) at t / T: near one part of the trajectory (PTQ4DM: 0.4, 0.4, closer to clean images)
    importance   how much the denoiser's output changes from call to call
    few-step     every call, for models of one to eight steps; in exchange for longer runs' calls, more prompts

Draws are stratified: positions (i + offset) / count on the cumulative weights, with an offset that moves from prompt to prompt.
PTQ4DM: Shang et al., 2022, https://arxiv.org/abs/2211.15736 · uniform steps: Q-Diffusion, Li et al., 2023, https://arxiv.org/abs/2302.04304
"""

__all__ = ["FewStep", "Importance", "LogSNR", "NormalSteps", "Uniform", "stratified"]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qgen.calibration.base import CalibrationSet, Call, calibrators
from qgen.calibration.recorder import Recorder
from qgen.calibration.timeline import GOLDEN, unit_of


def stratified(weights: Tensor, count: int, offset: float) -> list[int]:
    """Ascending indices of `count` different calls (all of them if there are fewer), drawn by weights (n,) >= 0; offset in [0, 1)."""
    n = len(weights)
    count = min(count, n)
    w = weights.double().clamp_min(0)
    w = w / w.sum() if float(w.sum()) > 0 else torch.full_like(w, 1 / max(n, 1))
    places = torch.searchsorted(
        w.cumsum(0), (torch.arange(count, dtype=torch.float64) + max(offset, 1e-3)) / max(count, 1)
    )
    chosen: list[int] = []
    for place in places.clamp(max=max(n - 1, 0)).tolist():
        free = [i for i in range(n) if i not in chosen]
        chosen.append(min(free, key=lambda i: abs(i - place)))  # a heavy call is drawn once, then its neighbours
    return sorted(chosen)


@calibrators.register("uniform")
@dataclass(frozen=True)
class Uniform(Recorder):
    """Calls spread evenly over the steps of each run: the default, under its own name."""


@dataclass(frozen=True)
class _Weighted(Recorder, ABC):
    def pick(self, run: Sequence[Call], count: int, sample: int) -> list[int]:
        return stratified(self.weights(run), count, (sample * GOLDEN) % 1.0)

    @abstractmethod
    def weights(self, run: Sequence[Call]) -> Tensor:
        """(n,) weights of a run's calls."""


@calibrators.register("logsnr")
@dataclass(frozen=True)
class LogSNR(_Weighted):
    """Calls spread evenly over log-SNR. ValueError if the scheduler's noise is not known."""

    def weights(self, run: Sequence[Call]) -> Tensor:
        at = [call.moment.log_snr for call in run]
        if None in at:
            raise ValueError(
                "the log-SNR of this pipeline's timesteps is not known: calibrate with 'uniform' or 'normal'"
            )
        return _spacing(torch.tensor(at, dtype=torch.float64))


@calibrators.register("normal")
@dataclass(frozen=True)
class NormalSteps(_Weighted):
    """Calls drawn by Normal(mean, std) over t / T, T = pure noise, whatever the spacing of the run's timesteps."""

    mean: float = 0.4
    std: float = 0.4

    def weights(self, run: Sequence[Call]) -> Tensor:
        if not self.std > 0:
            raise ValueError(f"std must be positive, found {self.std}")
        t = _times(run, "normal")
        return torch.exp(-0.5 * ((t - self.mean) / self.std) ** 2) * _spacing(t)


@calibrators.register("importance")
@dataclass(frozen=True)
class Importance(_Weighted):
    """Calls drawn by ‖f_i − f_{i−1}‖ / ‖f_i‖, how much the output changes from the call before; the first call counts as the second."""

    outputs = True

    def weights(self, run: Sequence[Call]) -> Tensor:
        y = [call.output.float() for call in run]
        moved = [float((b - a).norm() / b.norm().clamp_min(1e-12)) for a, b in pairwise(y)]
        return torch.tensor([*moved[:1], *moved] or [1.0], dtype=torch.float64)


@calibrators.register("few-step")
@dataclass(frozen=True)
class FewStep(Recorder):
    """Every call of every run, over so many more (or fewer) prompts that `samples` · `steps` calls are kept in all."""

    def pick(self, run: Sequence[Call], count: int, sample: int) -> list[int]:
        return list(range(len(run)))

    def calls(
        self, pipe: Any, denoisers: dict, prompts: Sequence[str] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, CalibrationSet]:
        length = max(
            len(s.calls)
            for s in replace(self, samples=1, texts=0).calls_of(pipe, denoisers, prompts, *args, **kwargs).values()
        )
        many = replace(self, samples=max(1, math.ceil(self.samples * self.steps / length)))
        return many.calls_of(pipe, denoisers, prompts, *args, **kwargs)

    def calls_of(self, *args: Any, **kwargs: Any) -> dict[str, CalibrationSet]:
        return super().calls(*args, **kwargs)


def _times(run: Sequence[Call], name: str) -> Tensor:
    """t / T (n,) of a run's calls."""
    ts = [call.moment.t for call in run]
    if None in ts:
        raise ValueError(f"the denoiser is called without a timestep: {name!r} cannot choose by it, take 'uniform'")
    return torch.tensor(ts, dtype=torch.float64) / unit_of(ts)


def _spacing(x: Tensor) -> Tensor:
    """Length of axis (n,) that each point of x stands for: half of the way to both neighbours."""
    if len(x) < 2:
        return torch.ones_like(x)
    order = x.argsort()
    gaps = x[order].diff()
    length = torch.zeros_like(x)
    length[order] = torch.cat([gaps, gaps[-1:]]) / 2 + torch.cat([gaps[:1], gaps]) / 2
    return length
