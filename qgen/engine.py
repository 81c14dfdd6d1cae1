"""Behind `quantize`: adapter → record → probe → recipe → waves → swap → report.

Everything that can be refused is refused before the first layer is swapped; whatever goes wrong later (NaN in an activation, Ctrl-C, a full
disk) puts the float layers back, so that a pipe is either quantized as a whole or as it was.
"""

__all__ = ["prepare", "quantize", "record"]

import contextlib
import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen import recipes
from qgen.allocate import allocate, asked
from qgen.calibration.base import CalibrationSet
from qgen.calibration.recorder import Recorder, as_calls
from qgen.checks import check_weights, parse_bytes, refuse_quantized
from qgen.errors import NotQuantizable
from qgen.io.hub import attach
from qgen.methods.attention import as_spec, quantize_attention
from qgen.methods.base import sqnr_db
from qgen.methods.temporal import timed_or_blind
from qgen.models import adapter_for
from qgen.nn import clock, packed_layer
from qgen.nn.attention import remove
from qgen.nn.kinds import empty
from qgen.nn.packed import Packed
from qgen.nn.stacks import stacked
from qgen.probe import probe, static_sites
from qgen.progress import bars
from qgen.recipe import Recipe, Spec
from qgen.resume import Journal
from qgen.site import Site
from qgen.waves import Group, Observed, Stats, Traffic, Wave, measure, plan, solve

log = logging.getLogger("qgen")


def quantize(
    pipe_or_module: Any,
    recipe: str | Path | Recipe = "auto",
    *,
    prompts: Sequence[str] | None = None,
    call_kwargs: dict | None = None,
    calibration: Any = None,
    budget: Any = None,
    quality: Any = None,
    attention: Any = None,
    memory: int | str | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Quantizes a pipeline's denoisers, or a module, in place, and returns its argument.

    Arguments:
        pipe_or_module: a diffusers pipeline (every denoiser in it is quantized) or any `nn.Module`.
        recipe: a name of `qgen.recipes.names()`, a `Recipe`, or the path of a recipe's JSON file.
        prompts: what the pipeline draws during calibration; default: its own `calibration_prompts`, or a built-in set.
        call_kwargs: further arguments of the pipeline's call during calibration (steps, guidance, size, images …).
        calibration: a recorded set (`qgen.calibration.load`), a calibrator (`Recorder(samples=32)`), or for a bare module a list of calls.
        memory: bytes for calibration statistics, or text such as "2GiB"; less memory means more replays. Default: half of the model's
            size, at least 512 MiB.
        budget: mixed precision: "4.5 bits" on average, "6 GiB" for the denoisers, "12 ms" for their layers, or a `qgen.allocate.Budget`.
            Each layer gets the recipe's own format, a wider or, where the budget asks for it, a narrower one; see `qgen.allocate`.
        quality: the smallest model with at least this score, "psnr>=30", "ssim>=0.9" or "sqnr>=20", within the budget if there is one.
        attention: "auto" = attention in 8 bits (fp4 where the device runs it best) wherever its measured error stays within a budget,
            by layer and timestep; "int8", "fp4" = in these numbers everywhere; an `AttentionSpec` for more; None = as it is.
        checkpoint: folder in which finished waves are kept; the same call goes on from there after a crash.
        seed: of latents and of methods' random numbers. Same seed, same machine, same number of threads: same bytes.
        progress: show progress bars.

    Raises NotQuantizable (nothing to quantize, or quantized already), ValueError (unknown names, no prompts), BadData (NaN or infinity in
    weights or activations), BadCheckpoint (a checkpoint of another model, recipe or calibration). In each case nothing is changed.
    """
    attention = as_spec(attention)
    limits = asked(budget, quality)
    adapter = adapter_for(pipe_or_module)
    denoisers = adapter.denoisers(pipe_or_module)
    for name, module in denoisers.items():
        refuse_quantized(module, name)
        check_weights(module, name)
    device = next((p.device for module in denoisers.values() for p in module.parameters()), torch.device("cpu"))
    resolved = _recipe(recipe, device)
    if keep := adapter.keep_float():
        resolved = resolved.skip(*keep, why=f"kept float in {type(adapter).__name__}")
    bar = bars(progress)
    with _evaluating(denoisers.values()):
        wanted = any(limits) or attention is not None
        sets = _calls(pipe_or_module, denoisers, resolved, calibration, prompts, call_kwargs, seed, bar, wanted)
        plans = {}
        if any(limits):
            plans = allocate(
                pipe_or_module, denoisers, resolved, sets, *limits, prompts=prompts, call_kwargs=call_kwargs,
                memory=memory, seed=seed, bar=bar,
            )  # fmt: skip
        jobs = [
            _Job.plan(name, module, plans[name].recipe if plans else resolved, sets.get(name), memory, seed)
            for name, module in denoisers.items()
        ]
        try:
            for job in jobs:
                job.run(bar, checkpoint)
                job.rows += quantize_attention(job.module, attention, job.calls)
            reports = [job.report() for job in jobs]
        except BaseException:
            for job in jobs:
                job.undo()
            raise
    for job, rows in zip(jobs, reports, strict=True):
        job.module.__dict__.update(qgen_recipe=job.recipe, qgen_report=rows)
        if plans:
            job.module.__dict__["qgen_allocation"] = plans[job.name].record
        attach(job.module, job.recipe)  # from here on `save_pretrained` writes packed layers
    return pipe_or_module


def record(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    samples: int = 128,
    steps: int = 8,
    call_kwargs: dict | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationSet | dict[str, CalibrationSet]:
    """`qgen.calibration.record`: calls for `quantize(pipe, calibration=...)`, one set, or one per denoiser where the pipeline has several.

    Arguments as for `Recorder` and `qgen.quantize`. Raises as they do. The pipeline is left as it was.
    """
    denoisers = adapter_for(pipe).denoisers(pipe)
    with _evaluating(denoisers.values()):
        sets = Recorder(samples, steps).calls(pipe, denoisers, prompts, call_kwargs, seed, bars(progress))
    return sets if len(denoisers) > 1 else next(iter(sets.values()))


sys.modules["qgen.calibration"].record = record  # type: ignore[attr-defined]  # the folder has no __init__.py to hold it


@contextlib.contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Dropout off and running statistics left alone while calls are recorded and replayed; every module's mode is put back."""
    before = {layer: layer.training for module in modules for layer in module.modules()}
    try:
        for layer in before:
            layer.training = False
        yield
    finally:
        for layer, mode in before.items():
            layer.training = mode


def prepare(x: Any, kernel: str | None = None) -> dict[str, int]:
    """Chooses kernels where each packed layer is; returns how many layers run which. NoKernel with reasons if none serves."""
    counts: dict[str, int] = {}
    for module in adapter_for(x).denoisers(x).values():
        for layer in module.modules():
            if isinstance(layer, Packed):
                name = layer.prepare(kernel)
                counts[name] = counts.get(name, 0) + 1
    return counts


@dataclass
class _Job:
    """One denoiser on its way: its plan, what was swapped out, what the report says."""

    name: str
    module: nn.Module
    recipe: Recipe
    calls: CalibrationSet | None
    waves: list[Wave]
    kept: list[dict]
    seed: int
    originals: dict[str, nn.Module] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def plan(
        cls, name: str, module: nn.Module, recipe: Recipe, calls: CalibrationSet | None, memory: Any, seed: int
    ) -> "_Job":
        recipe = timed_or_blind(recipe, calls, name or type(module).__name__)
        sites = probe(module, calls.calls[0]) if calls else static_sites(module)
        chosen: list[tuple[Site, Spec]] = []
        kept = stacked(module)
        for site in sites:
            spec, why = recipe.resolve(site)
            if spec is None:
                layer = module.get_submodule(site.path)
                kept.append({**_facts(site), "spec": "float", "kernel": "", "why": why, **_sizes(layer, layer)})
            else:
                chosen.append((site, spec))
        if not chosen:
            raise NotQuantizable(
                f"recipe {recipe.name!r} keeps all {len(sites)} layers of {type(module).__name__} float: nothing to do"
            )
        total = sum(p.nbytes for p in module.parameters())
        budget = max(512 << 20, total // 2) if memory is None else parse_bytes(memory)
        traffic = Traffic.of(module, calls) if calls else Traffic()
        return cls(name, module, recipe, calls, plan(chosen, budget, traffic), kept, seed)

    def run(self, bar: Callable, checkpoint: str | Path | None) -> None:
        journal = self._journal(checkpoint) if checkpoint else None
        self.outputs = _outputs(self.module, self.calls)
        label = self.name or type(self.module).__name__
        total = sum(len(wave.groups) for wave in self.waves)
        with bar(total=total, desc=f"quantize {label}", unit="layer") as meter:
            for number, wave in enumerate(self.waves):
                if journal and (saved := journal.read(number)):
                    for path, (layout, slots, row) in saved.items():
                        self._swap(path, layout, slots, row)
                    meter.update(len(wave.groups))
                    continue
                stats, left = Observed({}), Counter(group.sites[0].shares for group in wave.groups)
                if self.calls is not None:
                    title = f"observe wave {number + 1}/{len(self.waves)}"
                    stats = measure(
                        self.module,
                        wave,
                        self.calls,
                        self.seed,
                        lambda c, t=title: bar(c, desc=t, unit="call", leave=False),
                    )
                done: list[dict] = []
                for group in wave.groups:
                    shares = group.sites[0].shares
                    done += self._solve(group, stats.get(shares, Stats()))
                    left[shares] -= 1
                    if not left[shares]:
                        stats.drop(shares)
                        n, k = group.sites[0].shape[:2]
                        if n * k > 1 << 21:  # not after each: pages given back cost time to get again
                            _trim()
                    meter.update(1)
                _trim()
                if journal:
                    journal.write(number, {row["path"]: self.module.get_submodule(row["path"]) for row in done}, done)

    def _journal(self, folder: str | Path) -> Journal:
        waves = [[site.path for site in wave.sites] for wave in self.waves]
        return Journal.open(folder, self.name, self.module, self.recipe, self.calls, self.seed, waves)

    def _solve(self, group: Group, stats: Stats) -> list[dict]:
        kind = next(self.module.get_submodule(group.sites[0].path).parameters()).device.type
        with torch.autocast(kind, enabled=False):  # methods compute in float32, whatever the caller's context
            draft, error = solve(self.module, group, stats, self.seed)
        made = []
        for index, site in enumerate(group.sites):
            old: Any = self.module.get_submodule(site.path)
            new = packed_layer(draft, old, index)
            why = self.recipe.resolve(site)[1]
            if draft.k_padded != site.shape[1]:
                why += f"; K padded from {site.shape[1]} to {draft.k_padded}"
            row = {
                **_facts(site),
                "spec": str(group.spec),
                "why": why,
                **error,
                **_sizes(new, old),
                "log": dict(draft.log),
            }
            made.append(self._install(site.path, new, row))
        return made

    def _swap(self, path: str, layout: Any, slots: dict, row: dict) -> None:
        """Puts a layer back that an earlier, interrupted run had finished."""
        old: Any = self.module.get_submodule(path)
        new = empty(old, layout, old.weight.dtype)
        new.fill({name: t.to(old.weight.device) for name, t in slots.items()})
        self._install(path, new, row)

    def _install(self, path: str, new: Packed, row: dict) -> dict:
        row["kernel"] = new.prepare()
        new.path = path
        new.train(False)
        old = self.module.get_submodule(path)
        for alias in [
            p for p, layer in self.module.named_modules(remove_duplicate=False) if layer is old
        ]:  # shared layers have several
            self.originals[alias] = old
            _replace(self.module, alias, new)
        clock.wind(self.module)
        self.rows.append(row)
        return row

    def undo(self) -> None:
        remove(self.module)
        for path, layer in self.originals.items():
            _replace(self.module, path, layer)
        clock.stop(self.module)

    def report(self) -> list[dict]:
        """Rows of all layers in the model's order, and one for the whole."""
        order = {path: i for i, (path, _) in enumerate(self.module.named_modules())}
        rows = sorted([*self.rows, *self.kept], key=lambda row: order[row["path"]])
        if self.outputs and self.calls is not None:
            rows.append(_output_row(self.module, self.calls, self.outputs))
        return rows


def _recipe(recipe: str | Path | Recipe, device: torch.device) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe).endswith(".json"):
        path = Path(recipe)
        if not path.is_file():
            raise ValueError(f"no recipe file {path}")
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    return recipes.get(str(recipe), device)


def _calls(
    pipe: Any,
    denoisers: dict[str, nn.Module],
    recipe: Recipe,
    calibration: Any,
    prompts: Sequence[str] | None,
    call_kwargs: dict | None,
    seed: int,
    bar: Callable,
    wanted: bool = False,
) -> dict[str, CalibrationSet]:
    """Calibration calls of each denoiser; {} for recipes that need none and callers that give none, unless they are `wanted`."""
    bare = isinstance(pipe, nn.Module)
    if prompts is not None and not len(prompts):
        raise ValueError("calibration needs at least one prompt, found none; leave out `prompts` for the built-in set")
    if calibration is None and not (wanted or _needs(recipe)):
        return {}
    if bare and calibration is None:
        raise ValueError(
            f"recipe {recipe.name!r} calibrates: pass calibration=[...] with recorded calls of {type(pipe).__name__}, or use a recipe "
            "that needs none ('rtn-int4', 'rtn-nvfp4', 'fp8')"
        )
    if calibration is None or callable(getattr(calibration, "calls", None)):
        recorder = calibration or Recorder()
        sets = recorder.calls(pipe, denoisers, prompts=prompts, call_kwargs=call_kwargs, seed=seed, progress=bar)
    elif isinstance(calibration, dict) and set(calibration) <= set(denoisers):
        sets = {name: as_calls(given) for name, given in calibration.items()}
    else:
        sets = {name: as_calls(calibration) for name in denoisers}
    for name in denoisers:
        if name not in sets:
            raise ValueError(
                f"calibration never called the denoiser {name!r}; record calls that do, or skip it in the recipe"
            )
        sets[name] = sets[name].hold_out()
        sets[name].check()
    return sets


def _needs(recipe: Recipe) -> bool:
    specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
    probe_site = Site("", "linear", "", 0, "", (64, 64))
    return any(method.needs(probe_site) for spec in specs if spec for method in spec.methods)


def _outputs(module: nn.Module, calls: CalibrationSet | None, at_most: int = 4) -> list[torch.Tensor]:
    """The float model's outputs on a few held-out calls, to judge the whole by."""
    with torch.no_grad():
        return [_first(call.run(module)).float().cpu() for call in _judged(calls, at_most)]


def _judged(calls: CalibrationSet | None, at_most: int) -> list:
    held = [call for call in calls.calls if call.moment.held] if calls else []
    return held[:: max(1, len(held) // at_most)][:at_most]


def _output_row(module: nn.Module, calls: CalibrationSet, wanted: list[torch.Tensor]) -> dict:
    """How far the whole denoiser's output is from the float model's, on held-out calls."""
    lost = energy = 0.0
    with torch.no_grad():
        for call, want in zip(_judged(calls, len(wanted)), wanted, strict=True):
            lost += float((_first(call.run(module)).float().cpu() - want).square().sum())
            energy += float(want.square().sum())
    return {
        "path": "(output)",
        "kind": "denoiser",
        "why": "whole denoiser, held-out calls",
        "sqnr_db": sqnr_db(lost / max(energy, 1e-30)),
    }


def _trim() -> None:
    """Hands freed memory back to the system. glibc keeps pieces of a few megabytes, and statistics are made of them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has other habits
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _first(output: Any) -> torch.Tensor:
    """The first tensor of a model's output."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if not isinstance(output, dict) else next(iter(output.values()))
    return output


def _facts(site: Site) -> dict:
    return {"path": site.path, "kind": site.kind, "block": site.block, "shape": list(site.shape), "role": site.role}


def _sizes(new: nn.Module, old: nn.Module) -> dict:
    """Bytes as stored, and what 16-bit weights would take."""
    numel = sum(p.numel() for p in old.parameters(recurse=False))
    return {"nbytes": new.nbytes if isinstance(new, Packed) else 2 * numel, "bytes16": 2 * numel}


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
