r"""What each candidate format does to each layer, and through it to the picture: one layer quantized at a time, all others float.

    layer       ‖y_q − y‖² / ‖y‖² of the layer's own output on held-out rows: costs nothing extra, knows nothing of what follows
    output      ‖ε_q − ε‖² / ‖ε‖² of the denoiser's output on held-out calls
    latent      ‖z_q − z‖² / ‖z‖² of the final latents of whole drawings
    structure   mean square difference of pictures, of which PSNR is made, and ssim, 1 − SSIM: layout and texture
    content     1 − cos of CLIP's embeddings of the two pictures: what they show

Small errors of different layers are nearly independent, so that damages add up. The methods of the recipe run for each candidate, since
they change the ranking of layers. Structure and content are measured apart because one number cannot rank both: as MixDQ,
https://arxiv.org/abs/2405.17873, and ViDiT-Q, https://arxiv.org/abs/2406.02540.
"""

__all__ = ["Table", "Unit", "swapped", "sweep"]

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qgen.allocate.candidates import bits_of, label
from qgen.allocate.yardsticks import Yardstick
from qgen.calibration.base import CalibrationSet
from qgen.methods.base import Stats
from qgen.nn import clock, packed_layer
from qgen.recipe import Spec
from qgen.site import Draft, Site
from qgen.waves import Group, Traffic, Wave, measure, plan, solve


@dataclass(frozen=True)
class Unit:
    """What chooses together: one layer, or several that share a draft. candidates: the recipe's own spec first, None = 16 bits."""

    denoiser: str
    sites: tuple[Site, ...]
    candidates: tuple[Spec | None, ...]

    @property
    def numel(self) -> int:
        return sum(site.shape[0] * site.shape[1] for site in self.sites)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(site.path for site in self.sites)


@dataclass
class Table:
    """The measurement. C is the largest number of candidates; places that a unit does not have hold infinite damage.

    bits: (L, C) stored bits of all weights of the unit, scales counted; nbytes: (L, C) of everything its layers store; seconds: (L, C) or
    None. damage: by metric, (L, C). layers: the packed layers of each unit and candidate by path, where they were kept.
    """

    units: list[Unit]
    bits: Tensor
    nbytes: Tensor
    damage: dict[str, Tensor]
    seconds: Tensor | None = None
    layers: dict[tuple[int, int], dict[str, nn.Module]] = field(default_factory=dict)

    @property
    def numel(self) -> Tensor:
        """(L,) weights of each unit."""
        return torch.tensor([unit.numel for unit in self.units], dtype=torch.float64)

    def labels(self) -> list[str]:
        """Names of all candidates in the order of their first appearance."""
        return list(dict.fromkeys(label(spec) for unit in self.units for spec in unit.candidates))


@dataclass(frozen=True)
class _All:
    """Stands in a spec for the methods of all its candidates: what any of them needs is observed, and rows, by which layers are judged.

    own: the recipe's methods. others: those of the candidates.
    """

    name: ClassVar[str] = "all"
    own: tuple[Any, ...] = ()
    others: tuple[Any, ...] = ()

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows"}).union(*(method.needs(site) for method in self.others))

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        return draft


def sweep(
    denoisers: Mapping[str, nn.Module],
    chosen: Mapping[str, Sequence[tuple[Site, Spec]]],
    sets: Mapping[str, CalibrationSet],
    ladder: Callable[[Spec], tuple[Spec | None, ...]],
    yardsticks: Sequence[Yardstick] = (),
    *,
    memory: int,
    seed: int = 0,
    bar: Callable = lambda items=None, **_: items,
    keep: bool = False,
    seconds: Callable[[nn.Module, Site], float] | None = None,
) -> Table:
    """Measures all candidates of all sites. The modules are as they were afterwards, whatever happens.

    Arguments:
        chosen: (site, spec) by denoiser, as the recipe resolves them.
        ladder: candidates for a spec.
        yardsticks: what is measured beyond the layer's own error, with one unit swapped in.
        memory: bytes for statistics. keep: whether packed layers are kept for trying out mixtures (their bytes stay in memory).
        seconds: the time of a layer at a site, if times count.
    """
    rows: list[_Row] = []
    for name, module in denoisers.items():
        for wave in _waves(chosen[name], ladder, memory, Traffic.of(module, sets[name])):
            stats = measure(module, wave, sets[name], seed, lambda c: bar(c, desc="observe", unit="call", leave=False))
            for group in bar(wave.groups, desc=f"sensitivity {name}", unit="layer"):
                seen = stats.get(group.sites[0].shares, Stats())
                own = replace(group.spec, methods=group.spec.methods[0].own)
                unit = Unit(name, group.sites, ladder(own))
                rows.append(_row(unit, module, seen, yardsticks, seed, keep, seconds))
    return _table(rows, keep)


def _waves(chosen: Sequence[tuple[Site, Spec]], ladder: Callable, memory: int, traffic: Traffic) -> list[Wave]:
    watched = []
    for site, spec in chosen:
        others = tuple(method for candidate in ladder(spec) if candidate for method in candidate.methods)
        watched.append((site, replace(spec, methods=(_All(own=spec.methods, others=others),))))
    return plan(watched, memory, traffic)


@dataclass
class _Row:
    unit: Unit
    bits: list[float]
    nbytes: list[float]
    seconds: list[float]
    damage: dict[str, list[float]]
    layers: list[dict[str, nn.Module]]


def _row(
    unit: Unit, module: nn.Module, stats: Stats, yardsticks: Sequence[Yardstick], seed: int, keep: bool, seconds: Any
) -> _Row:
    row = _Row(unit, [], [], [], {}, [])
    olds = {path: module.get_submodule(path) for path in unit.paths}
    for spec in unit.candidates:
        row.bits.append(sum(bits_of(spec, s) * s.shape[0] * s.shape[1] for s in unit.sites))
        if spec is None:
            row.nbytes.append(float(sum(2 * p.numel() for old in olds.values() for p in old.parameters(recurse=False))))
            found, layers = dict.fromkeys(("layer", *(n for y in yardsticks for n in y.names)), 0.0), olds
        else:
            draft, error = solve(module, Group(unit.sites, spec), stats, seed)
            layers = {p: packed_layer(draft, olds[p], i) for i, p in enumerate(unit.paths)}
            for layer in layers.values():
                layer.prepare()
                layer.train(False)
            row.nbytes.append(float(sum(layer.nbytes for layer in layers.values())))
            found = {"layer": 10 ** (-error.get("sqnr_db", error.get("weight_sqnr_db", 300.0)) / 10)}
            with swapped(module, layers), torch.no_grad():
                for yardstick in yardsticks:
                    if unit.denoiser in yardstick.denoisers:
                        found |= yardstick()
        if seconds is not None:
            row.seconds.append(sum(seconds(layers[s.path], s) for s in unit.sites))
        row.layers.append(layers if keep and spec is not None else {})
        for name, value in found.items():
            row.damage.setdefault(name, []).append(value)
    return row


@contextlib.contextmanager
def swapped(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The module with `layers` in the places of those at their paths, which come back afterwards."""
    olds = {path: module.get_submodule(path) for path in layers}
    places = [(p, olds_path) for p, child in module.named_modules(remove_duplicate=False)
              for olds_path, old in olds.items() if child is old]  # fmt: skip
    try:
        for place, path in places:
            _put(module, place, layers[path])
        clock.wind(module)
        yield
    finally:
        clock.stop(module)
        for place, path in places:
            _put(module, place, olds[path])


def _put(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def _table(rows: list[_Row], keep: bool) -> Table:
    width = max(len(row.bits) for row in rows)

    def grid(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[*v, *[torch.inf] * (width - len(v))] for v in values], dtype=torch.float64)

    names = list(dict.fromkeys(name for row in rows for name in row.damage))
    damage = {name: grid([row.damage[name] for row in rows]) for name in names}
    timed = grid([row.seconds for row in rows]) if all(row.seconds for row in rows) else None
    kept = {(i, j): layers for i, row in enumerate(rows) for j, layers in enumerate(row.layers) if keep}
    units = [row.unit for row in rows]
    return Table(units, grid([r.bits for r in rows]), grid([r.nbytes for r in rows]), damage, timed, kept)
