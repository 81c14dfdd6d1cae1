"""Time on a GPU: CUDA events around single calls, caches flushed, medians of many, and the clocks they were taken at.

A call is timed alone, after 256 MiB were written so that its operands come from memory, as they do inside a model whose
weights do not fit the cache. Kernels are warmed up for as long as clocks take to settle.
"""

__all__ = ["Clock", "CudaClock", "Sample", "gpu_state"]

import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: median and the quantiles around it, of `runs` calls."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Sample":
        """Median, 20 % and 80 % quantiles of single measurements."""
        ordered = sorted(seconds)
        return cls(
            statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5], len(ordered)
        )


class Clock(Protocol):
    """Whatever can say how long calls take: seconds of each of `runs` calls."""

    def __call__(self, run: Callable[[], object], runs: int) -> list[float]: ...


class CudaClock:
    """CUDA events. warmup: seconds of calls before the first that counts."""

    def __init__(self, device: torch.device, warmup: float = 0.2, flush_mib: int = 256):
        self.device, self.warmup = device, warmup
        self.flush = torch.empty(flush_mib << 20, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object], runs: int) -> list[float]:
        spent = 0.0
        while spent < self.warmup:
            spent += max(self._once(run), 1e-5)
        return [self._once(run) for _ in range(runs)]

    def _once(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def gpu_state(device: torch.device) -> dict[str, str]:
    """Name, driver, clocks, power and temperature as `nvidia-smi` states them; "unknown" where it is not there."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi") is None:
        return {"name": torch.cuda.get_device_name(device), **dict.fromkeys(fields[1:], "unknown")}
    index = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(fields):
        return {"name": torch.cuda.get_device_name(device), **dict.fromkeys(fields[1:], "unknown")}
    return dict(zip(fields, values, strict=True))
