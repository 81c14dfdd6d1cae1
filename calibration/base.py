"""Call, Moment, CalibrationSet: recorded denoiser calls, and where in sampling each was made.

Calls are what stands for real use. They are split by *sample* (a prompt, or a batch of prompts), never by step, into calls that methods
fit and calls that are held out: a method may only be kept where it helps on prompts it has not seen.
"""

__all__ = ["CalibrationSet", "Calibrator", "Call", "Moment"]

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qgen.errors import BadData
from qgen.registry import Registry

log = logging.getLogger("qgen")

calibrators: Registry[type] = Registry("calibrator", "qgen.calibration")


@dataclass(frozen=True)
class Moment:
    """Where in sampling a call was made.

    sample: number of the prompt (or batch of prompts). step: index of the denoiser call within its run. t: the scheduler's timestep,
    as the denoiser got it (None if it takes none). log_snr: natural
    logarithm of the signal-to-noise ratio there, if the scheduler tells. branch: "uncond" or "cond" where the two halves of guidance were
    kept apart. held: whether the call is held out from fitting.
    """

    sample: int = 0
    step: int = 0
    t: float | None = None
    log_snr: float | None = None
    branch: str = ""
    held: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: positional and keyword arguments (tensors on the CPU), its Moment, and the float model's output if kept."""

    args: tuple
    kwargs: dict
    moment: Moment = field(default_factory=Moment)
    output: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all arguments, nested ones included."""
        yield from _walk("args", self.args)
        yield from _walk("kwargs", self.kwargs)

    def run(self, module: nn.Module) -> Any:
        """The module's output on this call, on copies of the arguments on the module's device: a module may write to its input."""
        placed = (p.device for p in module.parameters() if p.device.type != "meta")  # a hook moves offloaded ones
        device = next(placed, torch.device("cpu"))
        copies: dict[int, Tensor] = {}  # what the call shares stays shared

        def copied(t: Tensor) -> Tensor:
            if id(t) not in copies:
                copies[id(t)] = t.to(device, copy=True)
            return copies[id(t)]

        return module(*_map(self.args, copied), **_map(self.kwargs, copied))


@dataclass(frozen=True)
class CalibrationSet:
    """Recorded calls of one denoiser. `origin` says how they were made, `dropped` which calls were left out since, and why.

    texts: calls of further prompts, which only layers that read nothing but text are fitted to: they see one text a prompt, however many
    steps are kept of it, so that few prompts overfit them first. A call's number counts through both, `calls` first.
    """

    calls: tuple[Call, ...]
    origin: str = "given"
    dropped: tuple[str, ...] = ()
    texts: tuple[Call, ...] = ()

    @property
    def numbered(self) -> tuple[Call, ...]:
        """All calls, in the order of their numbers."""
        return self.calls + self.texts

    def check(self) -> None:
        """BadData if there are no calls, or if any argument holds NaN or infinity (names the call and the argument)."""
        if not self.calls:
            raise BadData(
                "calibration holds no calls: record at least one, or use a recipe that needs none (e.g. 'rtn-int4')"
            )
        for number, name in self._broken().items():
            raise BadData(f"calibration call {number}, argument {name}: holds NaN or infinity")

    def clean(self) -> "CalibrationSet":
        """The set without calls whose arguments hold NaN or infinity, see `without`. BadData if there are no calls."""
        broken = self._broken()
        if not self.calls or len(broken) > self.spare:
            self.check()
        return self.without({number: f"argument {name}" for number, name in broken.items()})

    def without(self, bad: dict[int, str]) -> "CalibrationSet":
        """The set without the calls `bad` (number: where NaN or infinity was found), each of them named in a warning and in `dropped`.

        BadData if that leaves out more than a tenth of what was recorded: then it is no accident of one call.
        """
        if not bad:
            return self
        said = tuple(f"{_name(self.numbered[n].moment)}: {where} holds NaN or infinity" for n, where in bad.items())
        if len(bad) > self.spare:
            raise BadData(
                f"{len(bad) + len(self.dropped)} of {len(self.numbered) + len(self.dropped)} calibration calls hold NaN or infinity, "
                f"at most a tenth can be left out; the first is {said[0]}; nothing was changed"
            )
        for line in said:
            log.warning("calibration call dropped: %s", line)
        calls, texts = (
            tuple(call for n, call in enumerate(some, start) if n not in bad)
            for some, start in ((self.calls, 0), (self.texts, len(self.calls)))
        )
        return replace(self, calls=calls, texts=texts, dropped=(*self.dropped, *said))

    @property
    def spare(self) -> int:
        """How many more calls may be left out."""
        return (len(self.numbered) + len(self.dropped)) // 10 - len(self.dropped)

    def _broken(self) -> dict[int, str]:
        """The first argument that holds NaN or infinity of each call that has one, by the call's number."""
        found: dict[int, str] = {}
        for number, call in enumerate(self.numbered):
            for name, tensor in call.tensors():
                if tensor.is_floating_point() and not _maskish(name) and not bool(torch.isfinite(tensor).all()):
                    found[number] = name
                    break
        return found

    def hold_out(self, share: float = 0.2) -> "CalibrationSet":
        """The same calls with a share of the samples, spread evenly, marked as held out. Sets that are marked already stay as they are.

        With a single sample nothing can be held out by prompt; its last steps are then, and `origin` says so.
        """
        if any(call.moment.held for call in self.calls) or len(self.calls) < 2:
            return self
        by_step = len({call.moment.sample for call in self.calls}) == 1
        calls = _held_out(self.calls, (lambda m: m.step) if by_step else (lambda m: m.sample), share)
        texts = _held_out(self.texts, lambda m: m.sample, share)
        origin = self.origin + (" (held out by step: one sample)" if by_step else "")
        return replace(self, calls=calls, texts=texts, origin=origin)

    def digest(self) -> str:
        """sha256 over every argument: two sets with the same digest calibrate to the same bytes."""
        h = hashlib.sha256()
        for call in self.numbered:
            h.update(repr((call.moment, [(n, t.shape, t.dtype) for n, t in call.tensors()])).encode())
            for _, t in call.tensors():
                h.update(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()


def _held_out(calls: tuple[Call, ...], key: Callable[[Moment], int], share: float) -> tuple[Call, ...]:
    """The calls, those of a share of the keys marked as held out."""
    keys = sorted({key(call.moment) for call in calls})
    if len(keys) < 2:
        return calls
    count = max(1, round(len(keys) * share))
    held = {keys[int((i + 0.5) * len(keys) / count)] for i in range(count)}
    return tuple(replace(c, moment=replace(c.moment, held=key(c.moment) in held)) for c in calls)


class Calibrator(Protocol):
    """Decides which denoiser calls stand for real use."""

    def calls(self, pipe: Any, denoisers: dict[str, nn.Module], **options: Any) -> dict[str, CalibrationSet]:
        """Recorded calls for each denoiser."""
        ...


def _name(moment: Moment) -> str:
    """A call in words."""
    words = [f"sample {moment.sample}", f"step {moment.step}"]
    words += [] if moment.t is None else [f"timestep {moment.t:g}"]
    return ", ".join([*words, moment.branch] if moment.branch else words)


def _maskish(name: str) -> bool:
    return "mask" in name  # additive masks hold -inf on purpose


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _walk(f"{name}.{i}", item)


def _map(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`value` with `fn` applied to every tensor in nested tuples, lists and dicts; other objects pass through."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (tuple, list):
        return type(value)(_map(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, fn) for k, v in value.items()}
    return value
