"""From a recipe and a budget to a recipe per denoiser: measure, choose, and write the choice down as rules.

`budget` keeps the damage smallest within a limit. `quality` looks for the smallest model that reaches a score on drawn pictures: the limit
is halved between the smallest and the largest mixture, each tried with the layers that the measurement packed. With both, the budget is a
cap.
"""

__all__ = ["Plan", "allocate"]

import contextlib
import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qgen.allocate.budget import Budget, Quality, asked
from qgen.allocate.candidates import bits_of, label, ladder
from qgen.allocate.decouple import decoupled, is_content, mixtures
from qgen.allocate.exceptions import limit_of, offering
from qgen.allocate.latency import Stopwatch
from qgen.allocate.milp import Limit, choose, smallest
from qgen.allocate.sensitivity import Table, swapped, sweep
from qgen.allocate.yardsticks import Outputs, Yardstick, yardsticks
from qgen.calibration.base import CalibrationSet
from qgen.calibration.prompts import PROMPTS
from qgen.checks import parse_bytes
from qgen.probe import probe
from qgen.recipe import Recipe, Rule, Spec
from qgen.site import Site

log = logging.getLogger("qgen")
_TRIES = 7  # halvings of the limit while looking for a quality


@dataclass(frozen=True)
class Plan:
    """A denoiser's recipe with the allocated rules, and what the report shows of how it came about (plain data)."""

    recipe: Recipe
    record: dict


def allocate(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    recipe: Recipe,
    sets: Mapping[str, CalibrationSet],
    budget: str | Budget | None = None,
    quality: str | Quality | None = None,
    *,
    prompts: Sequence[str] | None = None,
    call_kwargs: dict | None = None,
    memory: int | str | None = None,
    seed: int = 0,
    bar: Callable = lambda items=None, **_: items,
    sites: Mapping[str, Sequence[Site]] | None = None,
) -> dict[str, Plan]:
    """A plan for each denoiser. The modules are left as they were.

    Arguments:
        recipe: gives each layer's own format and methods; layers that it keeps float stay float and are not counted in bits.
        sets: recorded calls of each denoiser, with some held out.
        sites: of each denoiser; default: what a probe with its first call finds.
        prompts, call_kwargs: of calibration; the last `budget.prompts` of them are drawn where damage or quality is measured on pictures.

    Raises ValueError for budgets and qualities that cannot be read or met (with the smallest possible), or that need pictures of a bare
    module.
    """
    limit, wish = asked(budget, quality)
    how = limit or Budget(16.0, "bits")
    draws = how.metric in ("latent", "structure", "content", "decoupled") or (wish and wish.metric != "sqnr")
    if draws and isinstance(pipe, nn.Module):
        raise ValueError(
            f"{wish or how.metric} is measured on what a pipeline draws, found {type(pipe).__name__}: "
            "use the metric 'output', or quality='sqnr>=…'"
        )
    sites = sites or {name: probe(m, sets[name].calls[0]) for name, m in denoisers.items()}
    chosen = {
        name: [(s, spec) for s in found if (spec := recipe.spec_for(s)) is not None] for name, found in sites.items()
    }
    steps = partial(ladder, narrow=_narrow(chosen, denoisers, limit))
    steps = offering(steps) if how.exceptions else steps
    draw = partial(_drawer, pipe, denoisers, how, prompts, call_kwargs, seed)
    outputs = [Outputs(name, module, sets[name]) for name, module in denoisers.items()]
    tools: list[Yardstick] = outputs if how.metric == "output" else []
    if how.metric not in ("layer", "output"):
        tools = [draw(how.metric)]
    judges = outputs
    if how.metric == "decoupled" or (wish and wish.metric != "sqnr"):
        judges = tools if "structure" in (n for tool in tools for n in tool.names) else [draw("structure")]
    total = sum(p.nbytes for module in denoisers.values() for p in module.parameters())
    table = sweep(
        denoisers, chosen, sets, steps, tools, seed=seed, bar=bar, keep=wish is not None or how.metric == "decoupled",
        memory=max(512 << 20, total // 2) if memory is None else parse_bytes(memory),
        seconds=Stopwatch() if how.unit == "seconds" else None,
    )  # fmt: skip
    trial = _Trial(table, denoisers, judges)
    rest = _rest(table, denoisers)
    picker = partial(_pick, table, how, trial, rest)
    choice = picker(limit) if wish is None else _search(table, trial, picker, limit, wish, rest)
    return _plans(recipe, table, choice, rest, f"{wish or ''}{' within ' if wish and limit else ''}{limit or ''}", how)


def _drawer(
    pipe: Any, denoisers: Mapping, how: Budget, prompts: Any, call_kwargs: dict | None, seed: int, metric: str
) -> Yardstick:
    """A yardstick that draws the last of the calibration prompts."""
    known = prompts if prompts is not None else getattr(pipe, "calibration_prompts", None) or PROMPTS
    known = [known] if isinstance(known, str) else list(known)
    options = {k: v for k, v in (call_kwargs or {}).items() if k not in ("prompt", "generator", "output_type")}
    args = (pipe, tuple(denoisers), known[-how.prompts :], options, seed)
    if metric == "latent":
        return yardsticks["latent"](*args)
    return yardsticks["pictures"](*args, clip=metric in ("content", "decoupled"))


def _narrow(chosen: Mapping[str, Sequence[tuple[Site, Spec]]], denoisers: Mapping, limit: Budget | None) -> bool:
    """Whether formats below the recipe's own are needed. ValueError if even those are not enough, before anything is measured."""
    if limit is None or limit.unit == "seconds":
        return False
    pairs = [pair for some in chosen.values() for pair in some]
    weights = sum(s.shape[0] * s.shape[1] for s, _ in pairs)

    def least(narrow: bool) -> float:
        bits = sum(min(bits_of(c, s) for c in ladder(spec, narrow)) * s.shape[0] * s.shape[1] for s, spec in pairs)
        if limit.unit == "bits":
            return bits / max(weights, 1)
        every = sum(2 * p.numel() for module in denoisers.values() for p in module.parameters())
        return every - 2 * weights + bits / 8

    if least(False) <= limit.amount:
        return False
    if (floor := least(True)) > limit.amount:
        words = "" if limit.unit == "bits" else "at least "  # branches and smoothing come on top
        raise ValueError(f"a budget of {limit} cannot be met: the smallest possible is {words}{limit.text(floor)}")
    return True


def _rest(table: Table, denoisers: Mapping[str, nn.Module]) -> float:
    """Bytes at 16 bits of everything that no unit holds."""
    every = sum(2 * p.numel() for module in denoisers.values() for p in module.parameters())
    return every - sum(float(table.nbytes[i, unit.candidates.index(None)]) for i, unit in enumerate(table.units))


class _Trial:
    """Draws, or calls the denoisers, with a whole choice swapped in."""

    def __init__(self, table: Table, denoisers: Mapping[str, nn.Module], judges: Sequence[Yardstick]):
        self.table, self.denoisers, self.judges = table, denoisers, judges

    def scores(self, choice: Sequence[int]) -> dict[str, float]:
        """What a quality asks for; of several denoisers the worst."""
        found = self._with(choice, lambda judge: judge.scores())
        return {key: min(f[key] for f in found) for key in found[0]}

    def damage(self, choice: Sequence[int], metric: str) -> float:
        return max(f[metric] for f in self._with(choice, lambda judge: judge()))

    def _with(self, choice: Sequence[int], measure: Callable[[Yardstick], dict[str, float]]) -> list[dict[str, float]]:
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in self.denoisers.items():
                picked = {}
                for i, unit in enumerate(self.table.units):
                    if unit.denoiser == name:
                        picked |= self.table.layers[i, choice[i]]
                stack.enter_context(swapped(module, picked))
            return [measure(judge) for judge in self.judges]


def _cost(table: Table, unit: str, rest: float) -> tuple[Tensor, float]:
    """(L, C) cost in a budget's unit summed over layers, and what comes on top."""
    if unit == "bits":
        return table.bits / table.numel.sum(), 0.0
    return (table.seconds, 0.0) if unit == "seconds" else (table.nbytes, rest)


def _pick(table: Table, how: Budget, trial: _Trial, rest: float, limit: Budget) -> list[int]:
    cost, fixed = _cost(table, limit.unit, rest)
    least = smallest(table.bits, cost) + fixed
    if least > limit.amount * (1 + 1e-9):
        raise ValueError(f"a budget of {limit} cannot be met: the smallest possible is {limit.text(least)}")
    inner = Limit(cost, limit.amount - fixed, f"a budget of {limit}")
    more = [] if how.exceptions is None else [limit_of(table, how.exceptions)]
    if how.metric != "decoupled":
        return choose(table.damage[how.metric], [inner, *more])
    member = torch.tensor([is_content(unit) for unit in table.units])
    found = mixtures(table.damage["structure"], table.damage["content"], member, table.numel, inner, more=more)
    return decoupled(found, lambda choice: trial.damage(choice, "structure"))


def _search(
    table: Table, trial: _Trial, picker: Callable[[Budget], list[int]], cap: Budget | None, wish: Quality, rest: float
) -> list[int]:
    """The smallest tried choice that reaches the quality. ValueError with what was reached if none does."""
    unit = cap.unit if cap else "bytes"
    cost, fixed = _cost(table, unit, rest)
    low = smallest(table.bits, cost) + fixed
    widest = float(torch.where(torch.isfinite(cost), cost, -torch.inf).amax(1).sum()) + fixed
    high = min(widest, cap.amount) if cap else widest
    reached: dict[tuple[int, ...], float] = {}

    def score(amount: float) -> tuple[list[int], float]:
        choice = picker(replace(cap or Budget(1, unit), amount=amount))
        key = tuple(choice)
        if key not in reached:
            reached[key] = trial.scores(choice)[wish.metric]
        return choice, reached[key]

    best, top = score(high)
    if top < wish.least:
        within = f" within {cap}" if cap else ""
        raise ValueError(
            f"quality {wish} is not reached{within}: the best found is {wish.metric} {top:.4g}; ask for less"
        )
    smallest_choice, bottom = score(low)
    if bottom >= wish.least:
        return smallest_choice
    for _ in range(_TRIES):
        middle = (low + high) / 2
        choice, value = score(middle)
        if value >= wish.least:
            best, high = choice, middle
        else:
            low = middle
    return best


def _plans(
    recipe: Recipe, table: Table, choice: Sequence[int], rest: float, asked: str, how: Budget
) -> dict[str, Plan]:
    if all(unit.candidates[j] is None for unit, j in zip(table.units, choice, strict=True)):
        raise ValueError(f"{asked} leaves every layer at 16 bits: there is nothing to quantize; ask for less")
    labels = table.labels()
    picked = torch.tensor(choice)[:, None]
    bits = float(table.bits.gather(1, picked).sum() / table.numel.sum())
    reached = {"bits": bits, "bytes": float(table.nbytes.gather(1, picked).sum()) + rest}
    if table.seconds is not None:
        reached["seconds"] = float(table.seconds.gather(1, picked).sum())
    log.info("allocated for %s: %.3f bits per weight, %s", asked, bits, Budget(1, "bytes").text(reached["bytes"]))
    shown = {"decoupled": ("structure", "content")}.get(how.metric, (how.metric,))
    plans = {}
    for name in dict.fromkeys(unit.denoiser for unit in table.units):
        rules, rows = [], []
        for i, (unit, j) in enumerate(zip(table.units, choice, strict=True)):
            if unit.denoiser != name:
                continue
            spec = unit.candidates[j]
            if j:  # the first candidate is what the recipe says anyway
                why = f"allocated for {asked}: {'16 bits' if spec is None else spec.weight}"
                rules += [Rule(glob.escape(path), spec, why=why) for path in unit.paths]
            seats = [label(c) for c in unit.candidates]
            rows.append(
                {
                    "paths": list(unit.paths),
                    "weights": unit.numel,
                    "chosen": seats[j],
                    "bits": {s: float(table.bits[i, c]) / unit.numel for c, s in enumerate(seats)},
                    "damage": {m: {s: float(table.damage[m][i, c]) for c, s in enumerate(seats)} for m in shown},
                }
            )
        made = replace(recipe, rules=(*recipe.rules, *rules), name=f"{recipe.name} at {asked}")
        plans[name] = Plan(made, {"asked": asked, "reached": reached, "labels": labels, "units": rows})
    return plans
