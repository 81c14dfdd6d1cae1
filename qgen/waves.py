"""Waves: cut blocks into groups whose observers fit a memory budget, replay the calls once per group, quantize it, go on.

Each wave is one replay through the live model, whose earlier waves are quantized already, so errors propagate as in use. Nothing is
traced: a hook observes each distinct input once, and the replay stops after the last layer of the wave.
"""

__all__ = ["Group", "Observed", "Spoilt", "Traffic", "Wave", "measure", "owners", "parts", "passes", "plan", "solve"]

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, _map
from qgen.calibration.leading import Leading, some
from qgen.calibration.moments import Moments, fine_edges
from qgen.calibration.observers import AbsMax, Gram, Reservoir
from qgen.calibration.paths import Paths
from qgen.errors import BadData
from qgen.methods.base import Stats, refine, sqnr_db
from qgen.methods.temporal import begin, fit_judge
from qgen.nn.kinds import matrix, rows_of
from qgen.nn.known import among
from qgen.probe import input_of
from qgen.recipe import Spec
from qgen.site import Draft, Site
from qgen.team import ALONE, Team


@dataclass(frozen=True)
class Group:
    """Sites that become one draft, and their spec."""

    sites: tuple[Site, ...]
    spec: Spec

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the methods of the spec read."""
        return (
            frozenset().union(*(m.needs(self.sites[0]) for m in self.spec.methods))
            if self.spec.methods
            else frozenset()
        )


@dataclass(frozen=True)
class Wave:
    groups: tuple[Group, ...]
    nbytes: int

    @property
    def sites(self) -> list[Site]:
        return [site for group in self.groups for site in group.sites]


@dataclass(frozen=True)
class Traffic:
    """What will flow through the model, as far as it is known before: calls that are fitted (0 = unknown), bytes per activation, and the
    edges between distinct timesteps."""

    calls: int = 0
    itemsize: int = 4
    edges: Tensor = field(default_factory=lambda: fine_edges(()))
    texts: int = 0

    def seen_by(self, site: Site) -> int:
        """Calls that the site is fitted to: layers that read text see further texts as well."""
        return self.calls + (self.texts if site.role == "context" else 0)

    @classmethod
    def of(cls, module: nn.Module, calls: CalibrationSet) -> "Traffic":
        """Activations come in the dtype of the weights that made them."""
        sizes = [p.element_size() for p in module.parameters() if p.is_floating_point()]
        edges = fine_edges(call.moment.t for call in calls.calls)
        fitted, texts = (sum(not call.moment.held for call in some) for some in (calls.calls, calls.texts))
        return cls(fitted, max(2, max(sizes, default=4)), edges, texts)


def plan(specs: Iterable[tuple[Site, Spec]], budget: int, traffic: Traffic = Traffic()) -> list[Wave]:
    """Waves of whole blocks in execution order, each with observers of at most `budget` bytes (a single block may exceed it)."""
    blocks: dict[str, list[tuple[Site, Spec]]] = {}
    for site, spec in specs:
        blocks.setdefault(site.block or site.path, []).append((site, spec))
    waves: list[Wave] = []
    current: list[Group] = []
    for members in blocks.values():
        groups = _groups(members)
        if current and _nbytes([*current, *groups], traffic) > budget:
            waves.append(Wave(tuple(current), _nbytes(current, traffic)))
            current = []
        current += groups
    return [*waves, Wave(tuple(current), _nbytes(current, traffic))] if current else waves


def passes(wave: Wave, budget: int, traffic: Traffic = Traffic()) -> list[Wave]:
    """The wave in parts, each with observers of at most `budget` bytes (those of a single input may exceed it).

    Parts are observed one after another in the same model, so that it makes no difference how many there are.
    """
    inputs: dict[str, list[Group]] = {}
    for group in wave.groups:
        inputs.setdefault(group.sites[0].shares, []).append(group)
    made: list[list[Group]] = [[]]
    for groups in inputs.values():
        if made[-1] and _nbytes([*made[-1], *groups], traffic) > budget:
            made.append([])
        made[-1] += groups
    return [Wave(tuple(groups), _nbytes(groups, traffic)) for groups in made]


def _groups(members: list[tuple[Site, Spec]]) -> list[Group]:
    """One group per site, or per shared input where the spec asks for sharing and kinds, specs and K agree."""
    groups: dict[object, list[tuple[Site, Spec]]] = {}
    for site, spec in members:
        key = (site.shares, spec, site.kind, site.shape[1]) if spec.share else site.path
        groups.setdefault(key, []).append((site, spec))
    return [Group(tuple(s for s, _ in g), g[0][1]) for g in groups.values()]


def rows_for(k: int) -> int:
    """Rows of a reservoir for inputs of width K: about 2 M values, between 1024 and 8192 rows."""
    return max(1024, min(8192, (1 << 21) // k))


def _observers(groups: Iterable[Group], traffic: Traffic, seed: int = 0) -> dict[str, dict[str, object]]:
    """Observers by shared input and statistic."""
    made: dict[str, dict[str, object]] = {}
    for group in groups:
        site = group.sites[0]
        bank = made.setdefault(site.shares, {})
        for need in group.needs - {"known"}:
            kinds = {
                "rows": lambda s=site: Reservoir(rows_for(s.shape[1]), seed, traffic.itemsize),
                "gram": lambda s=site: Gram(s.tokens * traffic.seen_by(s), traffic.itemsize),
                "absmax": AbsMax,
                "moments": lambda: Moments(traffic.edges),
                "paths": lambda s=site: Paths(rows_for(s.shape[1]) // 2, seed, traffic.itemsize),
            }
            if need not in bank:
                bank[need] = kinds[need]()
    return {shares: bank for shares, bank in made.items() if bank}


def _nbytes(groups: list[Group], traffic: Traffic) -> int:
    widths = {group.sites[0].shares: group.sites[0].shape[1] for group in groups}
    return sum(o.nbytes(widths[shares]) for shares, bank in _observers(groups, traffic).items() for o in bank.values())


class Spoilt(BadData):
    """An observed input held NaN or infinity. bad: by number of the call, the layer where it was first seen."""

    def __init__(self, bad: dict[int, str], calls: CalibrationSet):
        number, path = next(iter(bad.items()))
        super().__init__(
            f"layer {path}: its input holds NaN or infinity on calibration call {calls.numbered[number].moment}; nothing was changed"
        )
        self.bad = bad


class _Done(Exception):
    """Ends a replay after the last layer that a wave observes."""


class Observed(Mapping[str, Stats]):
    """Stats by shared input. They are made when asked for, and the last ones kept: layers that share an input follow each other."""

    def __init__(self, banks: dict[str, dict], known: Mapping[str, Tensor] | None = None):
        self._banks, self._known = banks, known or {}
        self._last: tuple[str, Stats] | None = None

    def __getitem__(self, shares: str) -> Stats:
        if self._last is None or self._last[0] != shares:
            self._last = None  # before the next ones are made: there is never room for two
            self._last = (shares, replace(_stats(self._banks[shares]), known=self._known.get(shares)))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)

    def drop(self, shares: str) -> None:
        """Frees what was observed of an input that is not needed again."""
        self._banks.pop(shares, None)
        if self._last is not None and self._last[0] == shares:
            self._last = None


def owners(wave: Wave, size: int) -> dict[str, int]:
    """Which process of `size` refines the layers of each shared input: the costliest first, each to who has least to do."""
    cost: dict[str, int] = {}
    for site in wave.sites:
        n, k = site.shape[:2]
        cost[site.shares] = cost.get(site.shares, k**3) + n * k * k
    load, made = [0] * size, {}
    for shares in sorted(cost, key=lambda name: -cost[name]):
        made[shares] = load.index(min(load))
        load[made[shares]] += cost[shares]
    return made


def measure(
    module: nn.Module, wave: Wave, calls: CalibrationSet, seed: int, progress: Callable, team: Team = ALONE
) -> Observed:
    """Replays all calls and returns Stats by shared input; of a team, each process replays its share and gets the inputs that it owns.

    Spoilt, in all processes, if an observed input holds NaN or infinity, with all the calls where that is so. BadData if a layer is not
    reached.
    """
    observers = _observers(wave.groups, Traffic.of(module, calls), seed)
    if not observers:
        return Observed({})
    first: dict[str, Site] = {}
    for site in sorted(wave.sites, key=lambda s: s.order):
        if site.shares in observers:
            first.setdefault(site.shares, site)
    known = _known(module, wave, first, calls)
    spoilt: dict[int, str] = {}

    def observe(site: Site, layer: nn.Module, x: Tensor) -> None:
        rows = rows_of(x, layer)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            spoilt[number] = site.path
            raise _Done
        if site.shares in known:
            rows = rows[~among(rows, known[site.shares])]
        if len(rows):
            for observer in observers[site.shares].values():
                observer.update(rows, call.moment)

    numbered = team.mine(list(enumerate(calls.numbered)))
    of_calls, of_texts = (
        [pair for pair in numbered if (pair[0] >= len(calls.calls)) == texts] for texts in (False, True)
    )
    reading = [site for site in first.values() if site.role == "context"]  # what further texts are for
    for sites, pairs in ((list(first.values()), progress(of_calls)), (reading, of_texts if reading else [])):
        for number, call in _replays(module, sites, pairs, observe):  # noqa: B007 (read by `observe`)
            pass
    if bad := dict(sorted(pair for part in team.all(spoilt) for pair in part.items())):
        raise Spoilt(bad, calls)
    if team.size > 1:
        observers = _merged(observers, owners(wave, team.size), team, module)
    missing = [first[s].path for s, bank in observers.items() if any(o.empty for o in bank.values())]
    if missing := [path for part in team.all(missing) for path in part]:
        raise BadData(f"no calibration call that may be fitted reaches layer {missing[0]}: record more calls")
    return Observed(observers, known)


def _replays(
    module: nn.Module, sites: list[Site], numbered: Iterable[tuple[int, Call]], see: Callable
) -> Iterator[tuple[int, Call]]:
    """Yields each number and call, and replays it then, up to the last of the sites: `see(site, layer, input)` at each of them."""
    last = max((site.order for site in sites), default=-1)

    def hook(site: Site) -> Callable:
        def seen(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            see(site, layer, input_of(args, kwargs))
            if site.order == last:
                raise _Done

        return seen

    layers = [(module.get_submodule(site.path), hook(site)) for site in sites]
    hooks = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer, seen in layers]
    try:
        for number, call in numbered:
            yield number, call
            try:
                with torch.no_grad():
                    call.run(module)
            except _Done:
                pass
    finally:
        for handle in hooks:
            handle.remove()


def _known(module: nn.Module, wave: Wave, first: dict[str, Site], calls: CalibrationSet) -> dict[str, Tensor]:
    """By shared input the first rows that all prompts have in common, where all that reads it asks for them: of some calls, replayed.

    Every process of a team replays the same ones.
    """
    refuse = {group.sites[0].shares for group in wave.groups if "known" not in group.needs}
    found = {shares: Leading() for shares in first if shares not in refuse}
    if not found:
        return {}

    def look(site: Site, layer: nn.Module, x: Tensor) -> None:
        found[site.shares].update(x)

    for _ in _replays(module, [first[shares] for shares in found], enumerate(some(calls.calls)), look):
        pass
    return {shares: leading.rows for shares, leading in found.items() if leading.rows is not None}


def _merged(banks: dict[str, dict], owner: dict[str, int], team: Team, module: nn.Module) -> dict[str, dict]:
    """Of the inputs that this process owns, what all have observed. One bank of one process is on its way at a time."""
    device = next(p.device for p in module.parameters())
    here: Callable = lambda t: (t.cpu(), t.device.type != "cpu")  # noqa: E731  (a copy for the way, and whether it belongs on the device)
    made = {}
    for shares in list(banks):
        bank = banks.pop(shares)
        mine = owner[shares] == team.rank
        sent = None if mine else {name: (type(o), _map(vars(o), here)) for name, o in bank.items()}
        for other in team.collect(sent, owner[shares]):
            for name, (kind, state) in other.items():
                observer = kind.__new__(kind)
                observer.__dict__.update(_unpacked(state, device))
                bank[name].merge(observer)
        if mine:
            made[shares] = bank
    return made


def _unpacked(state: Any, device: torch.device) -> Any:
    """An observer's state, its tensors where they belong."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], Tensor):
        return state[0].to(device) if state[1] else state[0]
    if isinstance(state, dict):
        return {key: _unpacked(value, device) for key, value in state.items()}
    return type(state)(_unpacked(value, device) for value in state) if isinstance(state, (list, tuple)) else state


def _stats(bank: dict) -> Stats:
    rows, gram, absmax = (bank.get(name) for name in ("rows", "gram", "absmax"))
    paths, path_t = (bank["paths"].whole() if "paths" in bank else None) or (None, None)
    return Stats(
        fit=rows and rows.result(False),
        held=rows and rows.result(True),
        gram=gram and gram.mean,
        absmax=absmax and absmax.absmax,
        absmean=absmax and absmax.mean,
        moments=bank.get("moments"),
        fit_t=rows and rows.times(False),
        held_t=rows and rows.times(True),
        paths=paths,
        path_t=path_t,
    )


def parts(module: nn.Module, group: Group, stats: Stats, seed: int) -> list[tuple[Draft, int, dict]]:
    """For each site of a group: the finished draft that holds it, its number there, and what the report says of it.

    One draft holds them all, or, where they share smoothing alone, each has its own from the last method on that decides about inputs.
    """
    methods = group.spec.methods
    first = max((i + 1 for i, m in enumerate(methods) if getattr(m, "of_inputs", False)), default=0)
    if group.spec.share != "smoothing" or len(group.sites) == 1 or not first:
        draft, error = solve(module, group, stats, seed)
        return [(draft, index, error) for index in range(len(group.sites))]
    draft, stats = _start(module, group, stats, seed)
    draft = refine(draft, stats, methods[:first])
    made = []
    for index in range(len(group.sites)):
        mine = replace(stats)  # a judge and a cache of its own
        one = refine(_rows(draft, index), mine, methods[first:])
        made.append((one, 0, _told(one, mine)))
    return made


def _rows(draft: Draft, index: int) -> Draft:
    """The rows of one site of a draft, not rounded yet and without a branch."""
    start = sum(site.shape[0] for site in draft.sites[:index])
    rows = slice(start, start + draft.sites[index].shape[0])
    clip = draft.clip[rows] if isinstance(draft.clip, Tensor) else draft.clip
    bias = None if draft.bias is None else draft.bias[rows].clone()
    empty = dict.fromkeys(("qweight", "down", "up", "bias_fix", "fixes"))
    return replace(draft, sites=(draft.sites[index],), weight=draft.weight[rows].clone(), bias=bias, clip=clip, **empty)


def solve(module: nn.Module, group: Group, stats: Stats, seed: int) -> tuple[Draft, dict]:
    """The finished draft of a group and what the report says of it."""
    draft, stats = _start(module, group, stats, seed)
    draft = refine(draft, stats)
    return draft, _told(draft, stats)


def _start(module: nn.Module, group: Group, stats: Stats, seed: int) -> tuple[Draft, Stats]:
    layers = [module.get_submodule(site.path) for site in group.sites]
    weight = torch.cat([matrix(layer).float() for layer in layers])
    given = [layer.bias for layer in layers]
    bias = None
    if any(b is not None for b in given):
        bias = torch.cat(
            [
                weight.new_zeros(s.shape[0]) if b is None else b.detach().float()
                for s, b in zip(group.sites, given, strict=True)
            ]
        )
    native = layers[0].weight.dtype
    draft = Draft(
        group.sites,
        group.spec,
        weight,
        bias,
        dtype=native if native in (torch.float16, torch.bfloat16) else torch.float16,
    )
    word = hashlib.sha256(f"{seed}/{group.sites[0].path}".encode()).digest()
    stats = replace(stats, seed=int.from_bytes(word[:6], "little"))
    return begin(draft, stats)


def _told(draft: Draft, stats: Stats) -> dict:
    if stats.judge is None:
        return {"weight_sqnr_db": sqnr_db(_weight_error(draft))}
    return {
        "sqnr_db": sqnr_db(stats.judge.error(draft)),
        "sqnr_fit_db": sqnr_db(fit_judge(stats, 256).error(draft)),
    }


def _weight_error(draft: Draft) -> float:
    target: Tensor = draft.target()
    lost = (draft.qweight.dequantize() - target).square().sum()
    return float(lost / target.square().sum().clamp_min(1e-30))
