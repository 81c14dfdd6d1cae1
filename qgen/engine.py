"""Behind `quantize`: adapter → record → probe → recipe → waves → swap → report.

Everything that can be refused is refused before the first layer is swapped; whatever goes wrong later (NaN in an activation, Ctrl-C, a full
disk) puts the float layers back, so that a pipe is either quantized as a whole or as it was.
"""

__all__ = ["prepare", "quantize", "record"]

import contextlib
import ctypes
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen import parting, recipes
from qgen.allocate import allocate, asked
from qgen.calibration import files  # noqa: F401 (hangs `save` and `load` on the folder)
from qgen.calibration.base import CalibrationSet, Call
from qgen.calibration.prompts import as_prompts
from qgen.calibration.recorder import Recorder, as_calls, timed
from qgen.checks import check_weights, parse_bytes, refuse_quantized
from qgen.errors import NotQuantizable
from qgen.io.hub import attach
from qgen.methods.attention import as_spec, quantize_attention
from qgen.methods.base import sqnr_db
from qgen.methods.temporal import timed_or_blind
from qgen.models import adapter_for
from qgen.nn import clock, keep_hooks, mlp, packed_layer
from qgen.nn.attention import remove
from qgen.nn.experts import opened
from qgen.nn.kinds import empty
from qgen.nn.packed import Layout, Packed
from qgen.nn.parted import part, whole_path
from qgen.nn.stacks import stacked
from qgen.probe import probe, routed, static_sites
from qgen.progress import bars
from qgen.recipe import Recipe, Spec
from qgen.resume import Journal
from qgen.site import Site
from qgen.team import ALONE, Team, team_for
from qgen.waves import Group, Observed, Spoilt, Stats, Traffic, Wave, measure, owners, parts, passes, plan

log = logging.getLogger("qgen")
_FEW = 16  # rows; an expert that is reached by fewer has statistics of nothing


def quantize(
    pipe_or_module: Any,
    recipe: str | Path | Recipe = "auto",
    *,
    prompts: Sequence[str] | Path | Callable | None = None,
    call_kwargs: dict | None = None,
    calibration: Any = None,
    budget: Any = None,
    quality: Any = None,
    attention: Any = None,
    memory: int | str | None = None,
    checkpoint: str | Path | None = None,
    distributed: bool | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Quantizes a pipeline's denoisers, or a module, in place, and returns its argument.

    Arguments:
        pipe_or_module: a diffusers pipeline (every denoiser in it is quantized) or any `nn.Module`.
        recipe: a name of `qgen.recipes.names()`, a `Recipe`, or the path of a recipe's JSON file.
        prompts: what the pipeline draws during calibration: a list, the `Path` of a file with a prompt in each line, or a function that is
            asked for so many; default: its own `calibration_prompts`, or a built-in set.
        call_kwargs: further arguments of the pipeline's call during calibration (steps, guidance, size, images …).
        calibration: a recorded set (`qgen.calibration.load`), a calibrator (`Recorder(samples=32)`), or for a bare module a list of calls.
        memory: bytes for calibration statistics, or text such as "2GiB"; less memory means more replays, and the same result. Default:
            half of the model's size, at least 512 MiB. The statistics of a single input are never split.
        budget: mixed precision: "4.5 bits" on average, "6 GiB" for the denoisers, "12 ms" for their layers, or a `qgen.allocate.Budget`.
            Each layer gets the recipe's own format, a wider or, where the budget asks for it, a narrower one; see `qgen.allocate`.
        quality: the smallest model with at least this score, "psnr>=30", "ssim>=0.9" or "sqnr>=20", within the budget if there is one.
        attention: "auto" = attention in 8 bits (fp4 where the device runs it best) wherever its measured error stays within a budget,
            by layer and timestep; "int8", "fp4" = in these numbers everywhere; an `AttentionSpec` for more; None = as it is.
        checkpoint: folder in which finished waves are kept; the same call goes on from there after a crash.
        distributed: "auto" = together with the other processes of torch.distributed, accelerate or torchrun, where there are any: each
            draws its share of the prompts, replays its share of the calls and refines its share of the layers, and all end with the same
            model, that of one process alone. True = an error without others; False = this process alone.
        seed: of latents and of methods' random numbers. Same seed, same machine, same number of threads: same bytes.
        progress: show progress bars.

    Calls that hold NaN or infinity, up to a tenth of all, are left out: a warning and the report name each.

    Raises NotQuantizable (nothing to quantize, or quantized already), ValueError (unknown names, no prompts), BadData (NaN or infinity in
    weights or activations), BadCheckpoint (a checkpoint of another model, recipe or calibration). In each case nothing is changed.
    """
    attention = as_spec(attention)
    limits = asked(budget, quality)
    prompts = None if prompts is None else as_prompts(prompts)
    adapter = adapter_for(pipe_or_module)
    denoisers = adapter.denoisers(pipe_or_module)
    for name, module in denoisers.items():
        refuse_quantized(module, name)
        check_weights(module, name)
    device = next((p.device for module in denoisers.values() for p in module.parameters()), torch.device("cpu"))
    resolved = _recipe(recipe, device)
    if keep := adapter.keep_float():
        resolved = resolved.skip(*keep, why=f"kept float in {type(adapter).__name__}")
    words = f"{type(pipe_or_module).__name__}, recipe {resolved.name!r}, seed {seed}"
    with (
        team_for(distributed, words) as team, _evaluating(denoisers.values()), opened(denoisers.values()),
        parting.opened(denoisers.values()),
    ):  # fmt: skip
        bar = bars(progress if team.rank == 0 else False)
        wanted = any(limits) or attention is not None
        sets = _calls(pipe_or_module, denoisers, resolved, calibration, prompts, call_kwargs, seed, bar, wanted, team)
        plans = {}
        if any(limits):
            measured = partial(
                allocate, pipe_or_module, denoisers, resolved, sets, *limits, prompts=prompts, call_kwargs=call_kwargs,
                memory=memory, seed=seed, bar=bar,
            )  # fmt: skip
            plans = team.lead(measured)
        jobs = [
            _Job.plan(name, module, plans[name].recipe if plans else resolved, sets.get(name), memory, seed)
            for name, module in denoisers.items()
        ]
        try:
            for job in jobs:
                job.run(bar, checkpoint, team)
                job.rows += quantize_attention(job.module, attention, job.calls)
            reports = team.lead(lambda: [job.report() for job in jobs])
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


def prepare(x: Any, kernel: str | None = None, fuse_mlp: bool = False) -> dict[str, int]:
    """Chooses kernels where each packed layer is; returns how many layers run which. NoKernel with reasons if none serves.

    fuse_mlp: run two layers with a GELU (tanh) between as one op of three launches, where their kernel has it; see `qgen.nn.mlp`.
    """
    counts: dict[str, int] = {}
    for module in adapter_for(x).denoisers(x).values():
        for layer in module.modules():
            if isinstance(layer, Packed):
                name = layer.prepare(kernel)
                counts[name] = counts.get(name, 0) + 1
        mlp.mark(module, fuse_mlp)
    return counts


@dataclass
class _Job:
    """One denoiser on its way: its plan, what was swapped out, what the report says."""

    name: str
    module: nn.Module
    recipe: Recipe
    calls: CalibrationSet | None
    waves: list[list[Wave]]  # each in passes: what is observed at a time
    kept: list[dict]
    seed: int
    starved: dict[str, str] = field(default_factory=dict)  # experts with too few tokens, and why
    parted: dict[str, tuple[Site, str]] = field(default_factory=dict)  # what layers in parts were, and why they are
    originals: dict[str, nn.Module] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    outputs: list[tuple[Call, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def plan(
        cls, name: str, module: nn.Module, recipe: Recipe, calls: CalibrationSet | None, memory: Any, seed: int
    ) -> "_Job":
        recipe = timed_or_blind(recipe, calls, name or type(module).__name__)
        total = sum(p.nbytes for p in module.parameters())
        # where later layers see what earlier ones lost is a question of the model alone, not of memory
        budget = max(512 << 20, total // 2)
        most = budget if memory is None else parse_bytes(memory)
        sites = probe(module, calls.calls[0]) if calls else static_sites(module)
        parted: dict[str, tuple[Site, str]] = {}
        if calls:
            asked_for = [(site, spec) for site in sites if (spec := recipe.spec_for(site)) is not None]
            parted = parting.choose(module, asked_for, calls, most, seed)
            for site, _ in parted.values():
                part(module, site.path, site.parts)
            sites = probe(module, calls.calls[0]) if parted else sites
        tokens: dict[str, int] = {}
        starved: dict[str, str] = {}
        if calls:
            sites, tokens = routed(module, sites, calls.calls)
        chosen: list[tuple[Site, Spec]] = []
        kept = stacked(module)
        for site in sites:
            spec, why = recipe.resolve(_whole(site, parted)[0])
            if spec is None:
                layer = module.get_submodule(site.path)
                kept.append({**_facts(site), "spec": "float", "kernel": "", "why": why, **_sizes(layer, layer)})
            else:
                if tokens.get(site.path, _FEW) < _FEW and spec.methods:
                    spec = replace(spec, methods=(), bins=1)
                    starved[site.path] = f"; rounded to nearest: {tokens[site.path]} calibration tokens reached it"
                chosen.append((site, spec))
        if not chosen:
            raise NotQuantizable(
                f"recipe {recipe.name!r} keeps all {len(sites)} layers of {type(module).__name__} float: nothing to do"
            )
        traffic = Traffic.of(module, calls) if calls else Traffic()
        waves = [passes(wave, most, traffic) for wave in plan(chosen, budget, traffic)]
        return cls(name, module, recipe, calls, waves, kept, seed, starved, parted)

    def run(self, bar: Callable, checkpoint: str | Path | None, team: Team) -> None:
        journals: list[Journal] | None = [] if checkpoint else None  # one, of rank 0 alone: what it reads all get
        if checkpoint:
            team.lead(lambda: journals.append(self._journal(checkpoint)))
        self.outputs = _outputs(self.module, self.calls)
        label = self.name or type(self.module).__name__
        numbers, count = itertools.count(), sum(map(len, self.waves))
        total = sum(len(part.groups) for wave in self.waves for part in wave)
        with bar(total=total, desc=f"quantize {label}", unit="layer") as meter:
            for wave in self.waves:
                waiting: list[tuple[str, Packed, dict]] = []
                for part, number in zip(wave, numbers, strict=False):
                    title = f"observe {number + 1}/{count}"
                    watch = partial(bar, desc=title, unit="call", leave=False)
                    for made in self._pass(part, number, journals, watch, meter, team):
                        if len(wave) == 1:
                            self._install(*made)
                        else:  # every pass of a wave observes the same model
                            waiting.append(made)
                    _trim()
                for made in waiting:
                    self._install(*made)

    def _pass(
        self, wave: Wave, number: int, journals: list[Journal] | None, watch: Callable, meter: Any, team: Team
    ) -> Iterator[tuple[str, Packed, dict]]:
        """(path, packed layer, report row) of a pass's layers: out of the journal, or refined now and then written to it."""
        if journals is not None and (saved := team.lead(lambda: journals[0].read(number))):
            meter.update(len(wave.groups))
            yield from self._filled(saved)
            return
        stats = self._measure(wave, watch, team)
        alone = team.size == 1
        solved = self._solve(wave, stats, meter) if alone else self._filled(self._share(wave, stats, meter, team))
        done = []
        for made in solved:
            done.append(made)
            yield made
        if journals is not None:
            layers = {path: new for path, new, _ in done}
            team.lead(lambda: journals[0].write(number, layers, [row for _, _, row in done]))

    def _measure(self, wave: Wave, progress: Callable, team: Team) -> Observed:
        """What a wave observes; calls that show NaN or infinity there are dropped, and all others replayed again."""
        while self.calls is not None:
            try:
                return measure(self.module, wave, self.calls, self.seed, progress, team)
            except Spoilt as error:
                if len(error.bad) > self.calls.spare:
                    raise
                bad = {number: f"the input of layer {path}" for number, path in error.bad.items()}
                self.calls = self.calls.without(bad)
        return Observed({})

    def _solve(self, wave: Wave, stats: Observed, meter: Any, mine: Callable = lambda shares: True) -> Iterator[tuple]:
        """(path, packed layer, report row) of the wave's layers, those alone whose input is `mine`. What was observed goes after use."""
        left = Counter(group.sites[0].shares for group in wave.groups)
        for group in wave.groups:
            shares = group.sites[0].shares
            if mine(shares):
                yield from self._solved(group, stats.get(shares, Stats()))
            left[shares] -= 1
            if not left[shares]:
                stats.drop(shares)
                n, k = group.sites[0].shape[:2]
                if n * k > 1 << 21:  # not after each: pages given back cost time to get again
                    _trim()
            meter.update(1)

    def _share(self, wave: Wave, stats: Observed, meter: Any, team: Team) -> dict[str, tuple[Layout, dict, dict]]:
        """Layers as a journal holds them: this process refines those whose inputs it owns, and all get all."""
        owner, mine = owners(wave, team.size), {}
        for path, new, row in self._solve(wave, stats, meter, lambda shares: owner[shares] == team.rank):
            mine[path] = (new.layout, {slot: t.cpu() for slot, t in new.canonical().items()}, row)
        found = {path: layer for part in team.all(mine) for path, layer in part.items()}
        return {site.path: found[site.path] for site in wave.sites}

    def _journal(self, folder: str | Path) -> Journal:
        waves = [[site.path for site in part.sites] for wave in self.waves for part in wave]
        return Journal.open(folder, self.name, self.module, self.recipe, self.calls, self.seed, waves)

    def _solved(self, group: Group, stats: Stats) -> Iterator[tuple[str, Packed, dict]]:
        kind = next(self.module.get_submodule(group.sites[0].path).parameters()).device.type
        with torch.autocast(kind, enabled=False):  # methods compute in float32, whatever the caller's context
            solved = parts(self.module, group, stats, self.seed)
        for site, (draft, index, error) in zip(group.sites, solved, strict=True):
            old: Any = self.module.get_submodule(site.path)
            new = packed_layer(draft, old, index)
            whole, in_parts = _whole(site, self.parted)
            why = self.recipe.resolve(whole)[1] + self.starved.get(site.path, "") + in_parts
            if draft.k_padded != site.shape[1]:
                why += f"; K padded from {site.shape[1]} to {draft.k_padded}"
            row = {
                **_facts(site),
                "spec": str(draft.spec),
                "why": why,
                **error,
                **_sizes(new, old),
                "log": dict(draft.log),
            }
            yield site.path, new, row

    def _filled(self, layers: dict[str, tuple[Layout, dict, dict]]) -> Iterator[tuple[str, Packed, dict]]:
        """Layers that an earlier, interrupted run has finished, or another process."""
        for path, (layout, slots, row) in layers.items():
            old: Any = self.module.get_submodule(path)
            new = empty(old, layout, old.weight.dtype)
            new.fill({name: t.to(old.weight.device) for name, t in slots.items()})
            yield path, new, row

    def _install(self, path: str, new: Packed, row: dict) -> dict:
        row["kernel"] = new.prepare()
        new.path = path
        new.train(False)
        old = self.module.get_submodule(path)
        keep_hooks(new, old)
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
            rows.append(_output_row(self.module, self.outputs, self.calls.dropped))
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
    team: Team = ALONE,
) -> dict[str, CalibrationSet]:
    """Calibration calls of each denoiser; {} for recipes that need none and callers that give none, unless they are `wanted`."""
    bare = isinstance(pipe, nn.Module)
    if calibration is None and not (wanted or _needs(recipe)):
        return {}
    if bare and calibration is None:
        raise ValueError(
            f"recipe {recipe.name!r} calibrates: pass calibration=[...] with recorded calls of {type(pipe).__name__}, or use a recipe "
            "that needs none ('rtn-int4', 'rtn-nvfp4', 'fp8')"
        )
    if calibration is None or callable(getattr(calibration, "calls", None)):
        recorder = calibration or Recorder()
        # other calibrators record everything in every process
        options: dict[str, Any] = {"team": team} if isinstance(recorder, Recorder) else {}
        sets = recorder.calls(
            pipe, denoisers, prompts=prompts, call_kwargs=call_kwargs, seed=seed, progress=bar, **options
        )
    elif isinstance(calibration, dict) and set(calibration) <= set(denoisers):
        sets = {name: as_calls(given) for name, given in calibration.items()}
    else:
        sets = {name: as_calls(calibration) for name in denoisers}
    for name, module in denoisers.items():
        if name not in sets:
            raise ValueError(
                f"calibration never called the denoiser {name!r}; record calls that do, or skip it in the recipe"
            )
        sets[name] = timed(sets[name], module).clean().hold_out()
    return sets


def _needs(recipe: Recipe) -> bool:
    specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
    probe_site = Site("", "linear", "", 0, "", (64, 64))
    return any(method.needs(probe_site) for spec in specs if spec for method in spec.methods)


def _outputs(module: nn.Module, calls: CalibrationSet | None, at_most: int = 4) -> list[tuple[Call, torch.Tensor]]:
    """A few held-out calls and the float model's outputs on them, to judge the whole by."""
    held = [call for call in calls.calls if call.moment.held] if calls else []
    some = held[:: max(1, len(held) // at_most)][:at_most]
    with torch.no_grad():
        made = [(call, _first(call.run(module)).float().cpu()) for call in some]
    return [(call, want) for call, want in made if bool(torch.isfinite(want).all())]


def _output_row(module: nn.Module, wanted: list[tuple[Call, torch.Tensor]], dropped: tuple[str, ...]) -> dict:
    """How far the whole denoiser's output is from the float model's, on held-out calls, and which calls were left out."""
    lost = energy = 0.0
    with torch.no_grad():
        for call, want in wanted:
            lost += float((_first(call.run(module)).float().cpu() - want).square().sum())
            energy += float(want.square().sum())
    return {
        "path": "(output)",
        "kind": "denoiser",
        "why": "; ".join(("whole denoiser, held-out calls", *(f"dropped: {line}" for line in dropped))),
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


def _whole(site: Site, parted: dict[str, tuple[Site, str]]) -> tuple[Site, str]:
    """The site for which a recipe speaks, of a part the layer that was parted, and words for the report."""
    return parted.get(whole_path(site.path), (site, ""))


def _facts(site: Site) -> dict:
    return {"path": site.path, "kind": site.kind, "block": site.block, "shape": list(site.shape), "role": site.role}


def _sizes(new: nn.Module, old: nn.Module) -> dict:
    """Bytes as stored, and what 16-bit weights would take."""
    numel = sum(p.numel() for p in old.parameters(recurse=False))
    return {"nbytes": new.nbytes if isinstance(new, Packed) else 2 * numel, "bytes16": 2 * numel}


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
