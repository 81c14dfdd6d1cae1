"""Records a pipeline's denoiser calls: a hook keeps chosen calls with their Moment; tensors that calls share are stored once.

Prompts come before steps: text-dependent layers see one text per prompt but many latents, so 4-bit rounding overfits few prompts long
before it overfits few steps. By default every prompt contributes a few steps, spread over the whole trajectory.
"""

__all__ = ["Recorder", "as_calls", "load", "save"]

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment, _map, calibrators
from qgen.calibration.prompts import PROMPTS
from qgen.calibration.timeline import log_snr, unit_of
from qgen.errors import BadCheckpoint
from qgen.nn.clock import timestep_of
from qgen.progress import quiet

_VERSION = 1


@calibrators.register("recorder")
@dataclass(frozen=True)
class Recorder:
    """Drives the pipeline over prompts and keeps `steps` calls of each run, spread uniformly.

    prompts: None = the pipeline's own `calibration_prompts` or a built-in set. samples: at most so many prompts. steps: calls kept per
    prompt and denoiser. batch: prompts per run; 0 = 16 for denoisers below 100 M parameters, else 1. held: share of prompts held out.
    branches: keep the halves of classifier-free guidance, which come as one batch, as calls of their own.
    """

    samples: int = 128
    steps: int = 8
    batch: int = 0
    held: float = 0.2
    branches: bool = False
    outputs: ClassVar[bool] = False  # whether `pick` reads the denoiser's outputs

    def pick(self, run: Sequence[Call], count: int, sample: int) -> list[int]:
        """Which calls of one run to keep: ascending indices. Here evenly spread, with an offset that moves from run to run."""
        offset = (sample * 0.618034) % 1.0  # golden ratio: over many prompts every step is seen
        return sorted({int((i + offset) * len(run) / count) for i in range(count)})

    def calls(
        self,
        pipe: Any,
        denoisers: dict[str, nn.Module],
        prompts: Sequence[str] | None = None,
        call_kwargs: dict | None = None,
        seed: int = 0,
        progress: Callable = lambda items, **_: items,
    ) -> dict[str, CalibrationSet]:
        """Calls of each denoiser. ValueError for an empty list of prompts, or a bare module that has nothing to draw with."""
        if isinstance(pipe, nn.Module):
            raise ValueError(
                f"{type(pipe).__name__} is no pipeline and cannot be driven by prompts: pass calibration=[...] with its calls"
            )
        if prompts is not None and not len(prompts):
            raise ValueError(
                "calibration needs at least one prompt, found none; leave out `prompts` for the built-in set"
            )
        takes_prompt = "prompt" in inspect.signature(type(pipe).__call__).parameters
        if prompts is None:
            prompts = getattr(pipe, "calibration_prompts", None) or PROMPTS
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)[: self.samples]
        batch = self.batch or (16 if sum(p.numel() for d in denoisers.values() for p in d.parameters()) < 1e8 else 1)
        runs = [prompts[i : i + batch] for i in range(0, len(prompts), batch)] if takes_prompt else [None]
        tapes = {name: _Tape(self, getattr(pipe, "scheduler", None)) for name in denoisers}
        hooks = [d.register_forward_pre_hook(tapes[name].listen, with_kwargs=True) for name, d in denoisers.items()]
        if self.outputs:
            hooks += [d.register_forward_hook(tapes[name].answer) for name, d in denoisers.items()]
        try:
            for sample, run in enumerate(progress(runs, desc="record", total=len(runs))):
                self._run(pipe, run, call_kwargs or {}, seed + sample)
                for tape in tapes.values():
                    tape.rewind(sample, len(run) if run else 0)
        finally:
            for hook in hooks:
                hook.remove()
        origin = f"{len(prompts) if takes_prompt else 1} prompts, {self.steps} steps each"
        return {
            name: CalibrationSet(tuple(t.calls), origin).hold_out(self.held) for name, t in tapes.items() if t.calls
        }

    def _run(self, pipe: Any, prompts: list[str] | None, call_kwargs: dict, seed: int) -> None:
        known = inspect.signature(type(pipe).__call__).parameters
        options = dict(call_kwargs)
        if prompts is not None:
            options["prompt"] = prompts
            negative = options.get("negative_prompt")
            if isinstance(negative, str):
                options["negative_prompt"] = [negative] * len(prompts)
        if "generator" in known:
            options.setdefault("generator", torch.Generator().manual_seed(seed))
        if "output_type" in known:
            options.setdefault("output_type", "latent")  # the decoder is not needed
        with torch.no_grad(), quiet(pipe):
            pipe(**options)


class _Tape:
    """Keeps the calls of one run, then those that the recorder picks."""

    def __init__(self, recorder: Recorder, scheduler: Any = None):
        self.recorder, self.scheduler = recorder, scheduler
        self.run: list[Call] = []
        self.calls: list[Call] = []
        self.store: dict[int, tuple[Tensor, int, Tensor]] = {}

    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        moment = Moment(step=len(self.run), t=_timestep(module, args, kwargs))
        self.run.append(Call(_map(args, self._keep), _map(kwargs, self._keep), moment))

    def answer(self, module: nn.Module, args: tuple, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = output[0] if not isinstance(output, dict) else next(iter(output.values()))
        self.run[-1] = replace(self.run[-1], output=output.detach().to("cpu", copy=True))

    def _keep(self, t: Tensor) -> Tensor:
        """A CPU copy; the same tensor object (text embeddings, positions) is copied once per run, unless it was written to."""
        version = -len(self.run) if t.is_inference() else t._version  # inference tensors do not count writes
        known = self.store.get(id(t))
        if known is None or known[0] is not t or known[1] != version:
            self.store[id(t)] = known = (t, version, t.detach().to("cpu", copy=True))
        return known[2]

    def rewind(self, sample: int, batch: int = 0) -> None:
        """Ends the run of a sample, in which `batch` prompts were drawn (0 = unknown)."""
        unit = unit_of(call.moment.t for call in self.run)
        run = []
        for call in self.run:
            t = call.moment.t
            snr = None if t is None else log_snr(self.scheduler, t, unit)
            run.append(replace(call, moment=replace(call.moment, sample=sample, log_snr=snr)))
        for i in self.recorder.pick(run, min(self.recorder.steps, len(run)), sample) if run else ():
            kept = replace(run[i], output=None)  # outputs were there to choose by
            self.calls += split_branches(kept, batch) if self.recorder.branches else [kept]
        self.run, self.store = [], {}


def _timestep(module: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """The timestep that a call gives its denoiser, as a float (the first sample's if it is a batch)."""
    t = timestep_of(module, args, kwargs)
    return None if t is None else float(t[0])


def split_branches(call: Call, batch: int) -> list[Call]:
    """The two halves, unconditional and conditional, of a call that holds both for `batch` prompts; [call] for any other call.

    Both are, as in diffusers, stacked along the first axis: what has 2 · batch rows is cut in two, what has not is shared.
    """
    sizes = {t.shape[0] for _, t in call.tensors() if t.ndim}
    if not batch or 2 * batch not in sizes:
        return [call]

    def half(number: int) -> Callable[[Tensor], Tensor]:
        whole = lambda t: not t.ndim or t.shape[0] != 2 * batch  # noqa: E731
        return lambda t: t if whole(t) else t[number * batch : (number + 1) * batch].clone()

    return [
        Call(_map(call.args, half(i)), _map(call.kwargs, half(i)), replace(call.moment, branch=branch))
        for i, branch in enumerate(("uncond", "cond"))
    ]


def as_calls(given: Any) -> CalibrationSet:
    """A CalibrationSet from what a user passes for a bare module: a set, or a list of Calls, tensors, tuples, dicts or (args, kwargs)."""
    if isinstance(given, CalibrationSet):
        return given
    if isinstance(given, (Call, Tensor, dict)) or not isinstance(given, Sequence):
        given = [given]
    calls = []
    for sample, item in enumerate(given):
        if isinstance(item, Call):
            calls.append(item)
            continue
        if isinstance(item, Tensor):
            args, kwargs = (item,), {}
        elif isinstance(item, dict):
            args, kwargs = (), item
        elif (
            isinstance(item, (tuple, list))
            and len(item) == 2
            and isinstance(item[0], (tuple, list))
            and isinstance(item[1], dict)
        ):
            args, kwargs = tuple(item[0]), item[1]
        elif isinstance(item, (tuple, list)):
            args, kwargs = tuple(item), {}
        else:
            raise ValueError(
                f"a calibration call is a tensor, a tuple, a dict or (args, kwargs); found {type(item).__name__}"
            )
        calls.append(
            Call(
                _map(args, lambda t: t.detach().cpu()), _map(kwargs, lambda t: t.detach().cpu()), Moment(sample=sample)
            )
        )
    return CalibrationSet(tuple(calls))


def save(calibration: CalibrationSet, path: str | Path) -> None:
    """Writes recorded calls to one safetensors file; tensors that calls share are stored once. Other arguments must be JSON."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def stash(t: Tensor) -> dict:
        if id(t) not in names:
            names[id(t)] = f"t{len(names)}"
            tensors[names[id(t)]] = t.detach().contiguous().clone()
        return {"tensor": names[id(t)]}

    rows = []
    for call in calibration.calls:
        output = None if call.output is None else stash(call.output)
        rows.append(
            {
                "args": _map(call.args, stash),
                "kwargs": _map(call.kwargs, stash),
                "moment": asdict(call.moment),
                "output": output,
            }
        )
    header = json.dumps({"version": _VERSION, "origin": calibration.origin, "calls": rows})
    temporary = Path(path).with_suffix(".tmp")
    save_file(tensors, temporary, {"qgen_calibration": header})
    temporary.replace(path)


def load(path: str | Path) -> CalibrationSet:
    """Reads what `save` wrote; BadCheckpoint if the file is anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["qgen_calibration"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["version"] != _VERSION:
            raise BadCheckpoint(f"{path}: recorded calls of version {header['version']}, this qgen reads {_VERSION}")
        calls = tuple(
            Call(
                tuple(_unstash(row["args"], tensors)),
                _unstash(row["kwargs"], tensors),
                Moment(**row["moment"]),
                row["output"] and _unstash(row["output"], tensors),
            )
            for row in header["calls"]
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path}: not a file of recorded calls ({error})") from None
    return CalibrationSet(calls, header["origin"])


def _unstash(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if set(value) == {"tensor"}
            else {k: _unstash(v, tensors) for k, v in value.items()}
        )
    return [_unstash(v, tensors) for v in value] if isinstance(value, list) else value


# A folder without __init__.py has no place for functions, so the public verbs are hung on it here (`record` in qgen/engine.py).
for _verb in (save, load):
    setattr(sys.modules["qgen.calibration"], _verb.__name__, _verb)
