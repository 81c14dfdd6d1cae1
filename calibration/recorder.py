"""Records a pipeline's denoiser calls: a hook keeps chosen calls with their Moment; tensors that calls share are stored once.

Prompts come before steps: text-dependent layers see one text per prompt but many latents, so 4-bit rounding overfits few prompts long
before it overfits few steps. By default every prompt contributes a few steps, spread over the whole trajectory.
"""

__all__ = ["Recorder", "as_calls", "load", "save"]

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment, _map, calibrators
from qgen.calibration.prompts import PROMPTS
from qgen.errors import BadCheckpoint

_VERSION = 1


@calibrators.register("recorder")
@dataclass(frozen=True)
class Recorder:
    """Drives the pipeline over prompts and keeps `steps` calls of each run, spread uniformly.

    prompts: None = the pipeline's own `calibration_prompts` or a built-in set. samples: at most so many prompts. steps: calls kept per
    prompt and denoiser. batch: prompts per run; 0 = 16 for denoisers below 100 M parameters, else 1. held: share of prompts held out.
    """

    samples: int = 128
    steps: int = 8
    batch: int = 0
    held: float = 0.2

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
        tapes = {name: _Tape(self.steps) for name in denoisers}
        hooks = [d.register_forward_pre_hook(tapes[name].listen, with_kwargs=True) for name, d in denoisers.items()]
        try:
            for sample, run in enumerate(progress(runs, desc="record", total=len(runs))):
                self._run(pipe, run, call_kwargs or {}, seed + sample)
                for tape in tapes.values():
                    tape.rewind(sample)
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
        with torch.no_grad(), _quiet(pipe):
            pipe(**options)


class _Tape:
    """Keeps the calls of one run, then picks `steps` of them, evenly spread with an offset that moves from run to run."""

    def __init__(self, steps: int):
        self.steps, self.run, self.calls = steps, [], []
        self.store: dict[int, tuple[Tensor, int, Tensor]] = {}

    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        moment = Moment(step=len(self.run), t=_timestep(module, args, kwargs))
        self.run.append(Call(_map(args, self._keep), _map(kwargs, self._keep), moment))

    def _keep(self, t: Tensor) -> Tensor:
        """A CPU copy; the same tensor object (text embeddings, positions) is copied once per run, unless it was written to."""
        version = -len(self.run) if t.is_inference() else t._version  # inference tensors do not count writes
        known = self.store.get(id(t))
        if known is None or known[0] is not t or known[1] != version:
            self.store[id(t)] = known = (t, version, t.detach().to("cpu", copy=True))
        return known[2]

    def rewind(self, sample: int) -> None:
        n = len(self.run)
        count = min(self.steps, n)
        offset = (sample * 0.618034) % 1.0  # golden ratio: over many prompts every step is seen
        picks = sorted({int((i + offset) * n / count) for i in range(count)}) if n else []
        for i in picks:
            call = self.run[i]
            self.calls.append(Call(call.args, call.kwargs, Moment(sample, call.moment.step, call.moment.t)))
        self.run, self.store = [], {}


def _timestep(module: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """The argument called timestep, t, sigma or sigmas, as a float (its first element if it is a batch)."""
    names = list(inspect.signature(module.forward).parameters)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("timestep", "timesteps", "t", "sigma", "sigmas"):
        value = bound.get(name)
        if isinstance(value, Tensor) and value.numel():
            return float(value.reshape(-1)[0])
        if isinstance(value, (int, float)):
            return float(value)
    return None


class _quiet:
    """Silences a pipeline's own progress bar for the length of a block."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    def __enter__(self):
        self.before = dict(getattr(self.pipe, "_progress_bar_config", {}) or {})
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(**{**self.before, "disable": True})

    def __exit__(self, *_):
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe._progress_bar_config = self.before


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
