"""Which layers that read a concatenation are quantized in parts: those where it lowers the error on calls that were not fitted.

Only layers whose spec says so (`Spec(split=True)`), and which the probe saw read what `torch.cat` had made (`Site.parts`). Both ways are
rounded to nearest, with the spec's own smoothing, and compared on the same rows. Parting costs a second product over the same outputs, so
a gain that is in the noise is not taken.
"""

__all__ = ["choose", "opened"]

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qgen.calibration.base import CalibrationSet
from qgen.methods.base import Stats, refine, sqnr_db
from qgen.methods.smooth import Smooth
from qgen.nn.kinds import matrix
from qgen.nn.parted import columns, rejoin
from qgen.recipe import Spec
from qgen.site import Draft, Site
from qgen.waves import Group, Observed, Spoilt, Traffic, Wave, measure, passes

# Of the squared error with one scale for all. Parts of like ranges gain 1.0 to 1.2 dB by their smaller rows alone, shortcuts whose ranges
# differ 2.6 to 2.9: the report's reasons of the UNet in `demos/unet.py --samples 12 --steps 3`, "rtn-int4" with split.
_GAIN = 0.75
_LEAST = 32  # columns of a part; narrower ones stay float in every recipe


@contextlib.contextmanager
def opened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block layers may be parted; at its end those that hold packed parts stay so."""
    try:
        yield
    finally:
        for module in modules:
            rejoin(module)


def choose(
    module: nn.Module, specs: Iterable[tuple[Site, Spec]], calls: CalibrationSet, memory: int, seed: int
) -> dict[str, tuple[Site, str]]:
    """The layers to part, by path: their sites, and the reason. The module is left as it is. BadData as `waves.measure`."""
    able = [(site, _judged(spec)) for site, spec in specs if spec.split and _parts(module, site)]
    found: dict[str, tuple[Site, str]] = {}
    for wave in passes(Wave(tuple(Group((site,), spec) for site, spec in able), 0), memory, Traffic.of(module, calls)):
        stats = _observed(module, wave, calls, seed)
        for group in wave.groups:
            site = group.sites[0]
            one, several = _errors(module.get_submodule(site.path), site, group.spec, stats[site.shares])
            if several < _GAIN * one:
                sizes = " + ".join(map(str, site.parts))
                why = f"; in parts of {sizes} channels: {sqnr_db(one):.1f} -> {sqnr_db(several):.1f} dB, rounded to nearest"
                found[site.path] = (site, why)
            stats.drop(site.shares)
    return found


def _observed(module: nn.Module, wave: Wave, calls: CalibrationSet, seed: int) -> Observed:
    """What the calls show, without the few that hold NaN or infinity: `qgen.quantize` drops and names them when it meets them."""
    while True:
        try:
            return measure(module, wave, calls, seed, iter)
        except Spoilt as error:
            if len(error.bad) > calls.spare:
                raise
            good = [call for number, call in enumerate(calls.calls) if number not in error.bad]
            calls = replace(calls, calls=tuple(good), texts=())  # texts are for layers that read nothing but text


def _parts(module: nn.Module, site: Site) -> list[slice]:
    """Columns of the site's parts, or nothing where there are none, or one that is too narrow."""
    layer: Any = module.get_submodule(site.path)
    if len(site.parts) < 2 or sum(site.parts) != layer.weight.shape[1]:
        return []
    found = columns(layer, site.parts)
    return found if min(c.stop - c.start for c in found) >= _LEAST else []


def _judged(spec: Spec) -> Spec:
    """The spec with what it does to inputs alone, as far as rows and largest values tell it."""
    site = Site("", "linear", "", 0, "", (64, 64))
    kept = [m for m in spec.methods if getattr(m, "of_inputs", False) and m.needs(site) <= {"rows", "absmax"}]
    return replace(spec, methods=(*kept, _Rows()), bins=1, share=False)


class _Rows(Smooth):
    """Asks for rows and largest values, and does nothing with them."""

    name = "rows"

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        return draft


def _errors(layer: Any, site: Site, spec: Spec, stats: Stats) -> tuple[float, float]:
    """Relative squared error of the output on the judge's rows, with one draft for all columns and with one for each part."""
    weight, rows = matrix(layer).float(), stats.judge.rows
    want = rows @ weight.T
    one = refine(Draft((site,), spec, weight), stats).output(rows)
    several = torch.zeros_like(want)
    for cols in columns(layer, site.parts):
        mine = {name: getattr(stats, name) for name in ("fit", "held", "absmax", "absmean")}
        mine = {name: None if t is None else t[..., cols].contiguous() for name, t in mine.items()}
        part = Draft((site,), spec, weight[:, cols].contiguous())
        several += refine(part, replace(stats, **mine, gram=None)).output(rows[:, cols].contiguous())
    energy = float(want.square().sum().clamp_min(1e-30))
    return tuple(float((got - want).square().sum()) / energy for got in (one, several))  # type: ignore[return-value]
