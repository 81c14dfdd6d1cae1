"""Records a pipeline's denoiser calls: a hook keeps chosen calls with their Moment; tensors that calls share are stored once.

Prompts come before steps: text-dependent layers see one text per prompt but many latents, so 4-bit rounding overfits few prompts long
before it overfits few steps. By default every prompt contributes a few steps, spread over the whole trajectory.
"""

__all__ = ["Recorder", "as_calls", "timed"]

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment, _map, calibrators
from qgen.calibration.prompts import PROMPTS, as_prompts
from qgen.calibration.timeline import GOLDEN, log_snr, unit_of
from qgen.nn.clock import timestep_of
from qgen.progress import quiet
from qgen.team import ALONE, Team

log = logging.getLogger("qgen")


@calibrators.register("recorder")
@dataclass(frozen=True)
class Recorder:
    """Drives the pipeline over prompts and keeps `steps` calls of each run, spread uniformly.

    prompts: None = the pipeline's own `calibration_prompts` or a built-in set. samples: at most so many prompts. steps: calls kept per
    prompt and denoiser. batch: prompts per run; 0 = up to 16 for denoisers below 100 M parameters, if that leaves ten runs or more, else 1.
    held: share of runs held out.
    branches: keep the halves of classifier-free guidance, which come as one batch, as calls of their own. inputs: further arguments of the
    pipeline with one value for each prompt, {"image": [...]}: images, videos, or latents (a tensor or a list). A pipeline that takes no
    prompt is driven by them alone, and so is one that gets `prompt_embeds`, here or among the arguments of the call.
    texts: prompts, counted with those of `samples`, that layers which read text alone are fitted to, if so many are given: of those beyond
    `samples` one step is drawn, which costs little more than the text encoder.
    """

    samples: int = 128
    steps: int = 8
    batch: int = 0
    held: float = 0.2
    branches: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)
    texts: int = 128
    outputs: ClassVar[bool] = False  # whether `pick` reads the denoiser's outputs

    def __post_init__(self) -> None:
        least = {"samples": 1, "steps": 1, "batch": 0, "texts": 0}
        if wrong := [f"{name}={getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]:
            raise ValueError(
                f"a recorder wants at least one sample and one step and no negative number, found {wrong[0]}"
            )
        if not 0 <= self.held < 1:
            raise ValueError(f"held is the share of runs that are held out, from 0 to below 1, found {self.held}")

    def pick(self, run: Sequence[Call], count: int, sample: int) -> list[int]:
        """Which calls of one run to keep: ascending indices. Here evenly spread, with an offset that moves from run to run."""
        offset = (sample * GOLDEN) % 1.0  # over many prompts every step is seen
        return sorted({int((i + offset) * len(run) / count) for i in range(count)})

    def calls(
        self,
        pipe: Any,
        denoisers: dict[str, nn.Module],
        prompts: Sequence[str] | None = None,
        call_kwargs: dict | None = None,
        seed: int = 0,
        progress: Callable = lambda items, **_: items,
        team: Team = ALONE,
    ) -> dict[str, CalibrationSet]:
        """Calls of each denoiser; of a team, each process draws its share, and all get all calls.

        ValueError for an empty list of prompts, or a bare module that has nothing to draw with.
        """
        if isinstance(pipe, nn.Module):
            raise ValueError(
                f"{type(pipe).__name__} is no pipeline and cannot be driven by prompts: pass calibration=[...] with its calls"
            )
        if prompts is None:
            prompts = getattr(pipe, "calibration_prompts", None) or PROMPTS
        given = as_prompts(prompts, max(self.samples, self.texts))
        embedded = (call_kwargs or {}).get("prompt_embeds") is not None or "prompt_embeds" in self.inputs
        drive = partial(self._drive, pipe, denoisers, seed=seed, progress=progress, team=team)
        runs = self._runs(pipe, [] if embedded else given[: self.samples], denoisers)
        calls, texts = drive(runs, dict(call_kwargs or {})), {}
        if further := self._further(pipe, given, call_kwargs or {}):
            more = self._runs(pipe, further, denoisers)
            try:
                texts = drive(more, {**(call_kwargs or {}), "num_inference_steps": 1}, first=len(runs))
            except Exception as error:
                log.warning("%s draws nothing in one step (%s): no further texts", type(pipe).__name__, error)
        origin = f"{sum(len(run.get('prompt', '1')) for run in runs)} prompts, {self.steps} steps each"
        more_texts = f", {len(further)} more texts"
        made = {
            name: CalibrationSet(found, origin + more_texts * bool(texts.get(name)), texts=texts.get(name, ()))
            for name, found in calls.items()
            if found
        }
        return {name: calls.hold_out(self.held) for name, calls in made.items()}

    def _further(self, pipe: Any, prompts: list[str], options: dict) -> list[str]:
        """Prompts beyond `samples`, each once, that are drawn for one step; none where a pipeline's steps are told otherwise."""
        known = inspect.signature(type(pipe).__call__).parameters
        able = {"prompt", "num_inference_steps"} <= known.keys() and not self.inputs
        told = {"timesteps", "sigmas", "prompt_embeds"} & {name for name, value in options.items() if value is not None}
        drawn = set(prompts[: self.samples])
        return (
            [p for p in dict.fromkeys(prompts[self.samples : self.texts]) if p not in drawn]
            if able and not told
            else []
        )

    def _drive(
        self, pipe: Any, denoisers: dict[str, nn.Module], runs: list[dict], options: dict, *,
        seed: int, progress: Callable, team: Team, first: int | None = None,
    ) -> dict[str, tuple[Call, ...]]:  # fmt: skip
        """Calls kept of each denoiser; all of runs that are numbered from `first`, which are there for their texts."""
        keeps = self if first is None else replace(Recorder(), branches=self.branches, steps=1 << 30)
        tapes = {name: _Tape(keeps, getattr(pipe, "scheduler", None)) for name in denoisers}
        hooks = [d.register_forward_pre_hook(tapes[name].listen, with_kwargs=True) for name, d in denoisers.items()]
        if keeps.outputs:
            hooks += [d.register_forward_hook(tapes[name].answer) for name, d in denoisers.items()]
        try:
            share = team.mine(list(enumerate(runs, first or 0)))
            for sample, run in progress(share, desc="record" if first is None else "record texts", total=len(share)):
                self._run(pipe, {**options, **run}, seed + sample)
                for tape in tapes.values():
                    tape.rewind(sample, len(run.get("prompt", ())))
        finally:
            for hook in hooks:
                hook.remove()
        sample = lambda call: call.moment.sample  # noqa: E731
        return {
            name: tuple(sorted((c for part in team.all(tape.calls) for c in part), key=sample))
            for name, tape in tapes.items()
        }

    def _runs(self, pipe: Any, prompts: list[str], denoisers: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """The arguments that differ from run to run. prompts: [] where embeddings take their place."""
        known = inspect.signature(type(pipe).__call__).parameters
        varied: dict[str, Any] = {"prompt": prompts} if "prompt" in known and prompts else {}
        for name, values in self.inputs.items():
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise ValueError(
                    f"{type(pipe).__name__} takes no {name!r}; its arguments are {', '.join(list(known)[1:])}"
                )
            varied[name] = values[: self.samples]
        sizes = {name: len(values) for name, values in varied.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(
                f"inputs have one value for each prompt, found {', '.join(f'{n} {name}' for name, n in sizes.items())}"
            )
        if not varied:
            return [{}]
        count = next(iter(sizes.values()))
        batch = self.batch or _batch(count, sum(p.numel() for d in denoisers.values() for p in d.parameters()))
        return [
            {name: _part(values, start, batch, name) for name, values in varied.items()}
            for start in range(0, count, batch)
        ]

    def _run(self, pipe: Any, options: dict, seed: int) -> None:
        known = inspect.signature(type(pipe).__call__).parameters
        negative = options.get("negative_prompt")
        if isinstance(negative, str) and "prompt" in options:
            options["negative_prompt"] = [negative] * len(options["prompt"])
        if "generator" in known:
            options.setdefault("generator", torch.Generator().manual_seed(seed))
        if "output_type" in known:
            options.setdefault("output_type", "latent")  # the decoder is not needed
        with torch.no_grad(), quiet(pipe):
            pipe(**options)


def _part(values: Any, start: int, size: int, name: str) -> Any:
    """Some values of an argument; a single image or video as pipelines take one, not as a list."""
    part = values[start : start + size]
    return part[0] if len(part) == 1 and name != "prompt" and not isinstance(part, Tensor) else part


def _batch(prompts: int, parameters: int) -> int:
    """Prompts per run. What is held out is whole runs: of sixteen prompts in one, no text would be unseen by what is fitted."""
    return min(16, max(1, prompts // 10)) if parameters < 1e8 else 1


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


def timed(calls: CalibrationSet, module: nn.Module) -> CalibrationSet:
    """The set with the timestep that each call gives the denoiser, where its moment has none: calls that a user made say nothing of it."""

    def told(call: Call) -> Call:
        t = call.moment.t if call.moment.t is not None else _timestep(module, call.args, call.kwargs)
        return call if t == call.moment.t else replace(call, moment=replace(call.moment, t=t))

    return replace(calls, calls=tuple(map(told, calls.calls)), texts=tuple(map(told, calls.texts)))


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
    """A CalibrationSet from what a user passes for a bare module: a set, or a list of Calls, tensors, tuples, dicts or (args, kwargs).

    Whole numbers (N, M) are N rows of tokens: a call, and a sample, each.
    """
    if isinstance(given, CalibrationSet):
        return given
    if isinstance(given, Tensor) and given.ndim == 2 and given.dtype in (torch.int64, torch.int32):
        given = list(given.split(1))
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
