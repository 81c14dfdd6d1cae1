"""Cases: what a unit is given by the quantized layers before it, and what the float unit makes of what the float layers give.

They are kept in main memory as long as they fit a number of bytes; the others are made again, by running both models up to the unit,
whenever they are asked for. So memory decides about time alone, and results are the same bit for bit.
"""

__all__ = ["Case", "Cases", "distance", "floats"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import Call, _map, _walk
from qgen.train.distill import Lessons


@dataclass(frozen=True)
class Case:
    """call: of the unit. want: float tensors of the float unit's output. t, where: what the denoiser's clock showed."""

    call: Call
    want: tuple[Tensor, ...]
    t: Tensor | None = None
    where: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for _, t in self.call.tensors()) + sum(t.nbytes for t in self.want)


class Cases:
    """Cases of one unit by number of the call. budget: bytes. Spans neither a change of the layers before the unit nor two units."""

    def __init__(self, module: nn.Module, lessons: Lessons, path: str, budget: int):
        self.module, self.lessons, self.path, self.budget = module, lessons, path, budget
        self.kept: dict[int, Case | None] = {}
        self.nbytes = 0

    def __getitem__(self, number: int) -> Case | None:
        """None for a call that does not reach the unit."""
        if number in self.kept:
            return self.kept[number]
        made = self._make(number)
        size = made.nbytes if made else 0
        if self.nbytes + size <= self.budget:
            self.kept[number] = made
            self.nbytes += size
        return made

    def run(self, case: Case) -> tuple[Tensor, ...]:
        """Float tensors of what the quantized unit, as it is now, answers."""
        clock = self.module.__dict__.get("qgen_clock")
        if clock is not None:
            clock.t, clock.where = case.t, case.where
        return floats(case.call.run(self.module.get_submodule(self.path)))

    def _make(self, number: int) -> Case | None:
        call = self.lessons.calls[number]
        given: list[tuple] = []
        answer: list[Any] = []

        def before(unit: nn.Module, args: tuple, kwargs: dict) -> None:
            clock = self.module.__dict__.get("qgen_clock")
            given.append((args, kwargs, *((None, None) if clock is None else (clock.t, clock.where))))
            raise _Reached

        def after(unit: nn.Module, args: tuple, output: Any) -> None:
            answer.append(output)
            raise _Reached

        _until(self.module, self.path, call, lambda unit: unit.register_forward_pre_hook(before, with_kwargs=True))
        _until(self.lessons.teacher, self.path, call, lambda unit: unit.register_forward_hook(after))
        if not given or not answer:
            return None
        args, kwargs, t, where = given[0]
        seen: dict[int, Tensor] = {}  # what the call shares stays shared

        def kept(t: Tensor) -> Tensor:
            if id(t) not in seen:
                seen[id(t)] = t.detach().to("cpu", copy=True)
            return seen[id(t)]

        want = tuple(kept(t) for t in floats(answer[0]))
        return Case(Call(_map(args, kept), _map(kwargs, kept), call.moment), want, t, where)


class _Reached(Exception):
    """Ends a run at the unit."""


@torch.no_grad()
def _until(module: nn.Module, path: str, call: Call, hook: Callable) -> None:
    handle = hook(module.get_submodule(path))
    try:
        call.run(module)
    except _Reached:
        pass
    finally:
        handle.remove()


def floats(output: Any) -> tuple[Tensor, ...]:
    """Float tensors of an output, in the order in which they stand in it."""
    return tuple(t for _, t in _walk("", output) if t.is_floating_point())


def distance(got: tuple[Tensor, ...], want: tuple[Tensor, ...], unit: tuple[Tensor, ...] | None = None) -> Tensor:
    """() squared error of all tensors together, relative to the energy of `unit`, by default of `want`."""
    apart = [(a.float() - b.to(a.device).float()).square().sum() for a, b in zip(got, want, strict=True)]
    energy = sum(t.float().square().sum() for t in (want if unit is None else unit))
    return torch.stack(apart).sum() / energy.to(apart[0].device).clamp_min(1e-12)
