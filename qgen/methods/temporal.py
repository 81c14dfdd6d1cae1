r"""Timestep-aware parameters: centred inputs, static scales and biases, one for each bin of timesteps, see `qgen.nn.clock`.

    center         x Wᵀ = (x − μ_b) Wᵀ + μ_b Wᵀ: only what varies within a bin is rounded; its mean, much of what adaLN adds, passes
                   exactly, through the bias. Errors of the mean are the same at every step of a bin and would add up along the trajectory
    static         s_b: one step size for each bin in place of one for each token, of least squared error at the output
    temporal-bias  d_b: what is left of the mean error in each bin is taken off the bias

Bins are cut, layer by layer, where the statistics of the input change (`qgen.calibration.moments`). With `bins=1` in the spec each is its
timestep-blind counterpart. Ranges for each timestep: TFMQ-DM, Huang et al., 2023, https://arxiv.org/abs/2311.16503; step sizes over time:
EfficientDM, He et al., 2023, https://arxiv.org/abs/2310.03270
"""

__all__ = ["Center", "Static", "TemporalBias", "begin", "fit_judge", "timed_or_blind"]

import logging
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.calibration.base import CalibrationSet
from qgen.methods.base import Judge, Stats
from qgen.methods.reparametrize import ranges
from qgen.nn.clock import NAMES
from qgen.recipe import Recipe, methods
from qgen.site import Draft, Site
from qgen.timed import curved

log = logging.getLogger("qgen")


@methods.register("center")
@dataclass(frozen=True)
class Center:
    """Rounds x − μ_b in place of x. Stands first: the methods after it see centred statistics. Linear layers alone.

    Each layer keeps what has the smallest error on held-out rows when rounded to nearest: bins' means, one mean, or none (inputs that are
    often exactly zero, as after GELU, are better left alone). Activations after it need a format that is signed or has zero points.

    point: "mean", or "middle", halfway between the 0.1 % and 99.9 % quantiles, which leaves static scales the least range to cover.
    curves: along which the bins' points lie, about that of all bins: 0 = none, one point serves them all; None = each has its own.
    worth: a point for each bin stays only where the error falls by more than this share of what one for all of them, or none, leaves.
    """

    name: ClassVar[str] = "center"
    point: str = "mean"
    curves: int | None = None
    worth: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.worth < 1:
            raise ValueError(f"worth is a share of an error, found {self.worth}")
        if self.point not in ("mean", "middle"):
            raise ValueError(f'center takes off the "mean" or the "middle" of each channel, found {self.point!r}')
        _check(self.curves)

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "moments"} if site.kind == "linear" else {"moments"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        return draft  # `begin` has done it, since statistics change with it


def begin(draft: Draft, stats: Stats) -> tuple[Draft, Stats]:
    """Cuts the bins of a draft and centres it and its statistics, where its methods ask for that."""
    if stats.moments is None:
        return draft, stats
    if draft.spec.bins > 1 and stats.moments.seen:
        edges = stats.moments.cut(draft.spec.bins)
        if len(edges):
            draft = replace(draft, edges=edges.to(draft.weight.device)).noted(bins=len(edges) + 1)
            times = (stats.fit_t, stats.held_t, stats.path_t)
            bins = [None if t is None else torch.bucketize(t, edges).to(draft.weight.device) for t in times]
            stats = replace(stats, fit_bins=bins[0], held_bins=bins[1], path_bins=bins[2])
    centring = next((m for m in draft.spec.methods if isinstance(m, Center)), None)
    return _centre(draft, stats, centring) if centring and draft.sites[0].kind == "linear" else (draft, stats)


def timed_or_blind(recipe: Recipe, calls: CalibrationSet | None, whose: str) -> Recipe:
    """The recipe itself, or with one bin in place of many, and a warning, where no recorded call of the denoiser has a timestep."""
    specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
    if not any(spec and spec.bins > 1 for spec in specs) or any(
        c.moment.t is not None for c in (calls.calls if calls else ())
    ):
        return recipe
    log.warning(
        "%s: recipe %r has bins of timesteps, and no recorded call has a timestep (an argument called %s): one bin serves all calls",
        whose, recipe.name, ", ".join(NAMES),
    )  # fmt: skip
    blind = lambda spec: spec and replace(spec, bins=1)  # noqa: E731
    rules = tuple(replace(rule, spec=blind(rule.spec)) for rule in recipe.rules)
    return replace(recipe, default=blind(recipe.default), rules=rules)


def _centre(draft: Draft, stats: Stats, centring: Center) -> tuple[Draft, Stats]:
    fmt = formats.get(draft.act) if draft.act else None
    if fmt is not None and not (fmt.element.signed or fmt.zero_point):
        raise ValueError(f"center needs activations that are signed or have zero points, found {draft.act}")
    edges = stats.moments.edges[:0] if draft.edges is None else draft.edges.cpu()
    means = stats.moments.means(edges) if stats.moments.seen else stats.fit.mean(0, keepdim=True)
    point, curves = centring.point, centring.curves
    means = means if point == "mean" else _middles(stats, len(means))
    if curves is not None and len(means) > 1:
        means = curved(means, stats.moments.shares(edges), curves)
    made = [("none", draft, stats)]
    for label, table in ((f"one {point}", means[-1:].expand_as(means)), (f"{point} of each bin", means)):
        center = -table if curves and table is means else draft.stored(-table)  # curves are rounded as such
        made.append((label, replace(draft, center=center), _centred(stats, center, edges)))
        if len(means) == 1 or curves == 0:
            break
    errors = [s.judge.first(512).error(d) for _, d, s in made]
    chosen = min(range(min(2, len(made))), key=errors.__getitem__)
    if len(made) == 3 and errors[2] < (1 - centring.worth) * errors[chosen]:
        chosen = 2
    label, draft, stats = made[chosen]
    return draft.noted(centred=label), stats


def _middles(stats: Stats, count: int) -> Tensor:
    """(count, K): the middle of the fitted rows of each bin, and of all of them in the last row, and wherever a bin is empty."""
    parts = [stats.fit[stats.fit_bins == b] for b in range(count - 1)]
    return torch.stack([sum(ranges(part if len(part) else stats.fit, 0.999)) / 2 for part in (*parts, stats.fit)])


def _centred(stats: Stats, center: Tensor, edges: Tensor) -> Stats:
    """Statistics of x + c_b. The second moment: E[x xᵀ] + Σ_b p_b (μ_b c_bᵀ + c_b μ_bᵀ + c_b c_bᵀ)."""

    def moved(x: Tensor | None, bins: Tensor | None) -> Tensor | None:
        return None if x is None else x + (center[:1] if bins is None else center[bins])

    fit, held = moved(stats.fit, stats.fit_bins), moved(stats.held, stats.held_bins)
    gram = stats.gram
    if gram is not None:
        count = len(edges) + 1
        seen = stats.moments.seen
        means = stats.moments.means(edges)[:count].to(gram) if seen else stats.fit.mean(0, keepdim=True)
        share = stats.moments.shares(edges).to(gram)[:, None] if seen else torch.ones_like(means[:, :1])
        c = center[:count].to(gram)
        cross = (share * means).T @ c
        gram = gram + cross + cross.T + (share * c).T @ c
    return replace(
        stats,
        fit=fit,
        held=held,
        gram=gram,
        absmax=None if stats.absmax is None else fit.abs().amax(0),
        absmean=None if stats.absmean is None else fit.abs().mean(0),
        paths=moved(stats.paths, stats.path_bins),
        fit_raw=stats.fit,
        held_raw=stats.held,
    )


def fit_judge(stats: Stats, most: int) -> Judge:
    """A judge on at most so many of the fitted rows."""
    return Judge(stats.fit, stats.fit_bins, stats.fit_raw).first(most)


@methods.register("static")
@dataclass(frozen=True)
class Static:
    """Activation scales fixed beforehand, by bin; nothing is measured at run time. Put it after all that changes smoothing or weights.

    For every bin and block of inputs the factor on the largest magnitude is searched that leaves the least error Σ_k h_k (x_k − Q(x)_k)²,
    h_k = ‖column k of the weight‖²; a table of bins by blocks then becomes the product of one number for each bin and one for each block.

    factors: how many, geometrically from 1 down to `least`. rows: at most so many of the fitted rows.
    """

    name: ClassVar[str] = "static"
    factors: int = 16
    least: float = 0.3
    rows: int = 4096

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "moments"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt = formats.get(draft.act) if draft.act else None
        if fmt is None:
            return draft
        if fmt.zero_point or fmt.global_scale or not fmt.element.signed:
            raise ValueError(
                f"static scales need a signed activation format of one level (int8_row, int4_g64), found {draft.act}"
            )
        draft = replace(draft.rounded(), steps=None, ratio=None)
        x = fmt.blocks(draft.inputs(stats.fit[: self.rows], quantized=False))  # (M, G, block)
        h = fmt.blocks(draft.values().square().sum(0)[None])[0]  # (G, block)
        bins = None if draft.edges is None else stats.fit_bins[: self.rows]
        count = 1 if bins is None else len(draft.edges) + 1
        owners = [torch.zeros(len(x), dtype=torch.int64, device=x.device) if bins is None else bins]
        tables = [self._search(x, h, owners[0], count, fmt)]
        if bins is not None:
            tables.append(self._search(x, h, torch.zeros_like(bins), 1, fmt))
        table = torch.cat(tables).clamp_min(1e-8).log()  # (T, G)
        ratio = (table - table.mean(1, keepdim=True)).mean(0)
        return replace(draft, steps=table.mean(1).exp(), ratio=ratio.exp())

    def _search(self, x: Tensor, h: Tensor, owner: Tensor, count: int, fmt: formats.NumberFormat) -> Tensor:
        """Scales (count, G) of least error for rows x (M, G, block) that belong to bins `owner`."""
        peak = x.abs().amax(-1)
        top = torch.zeros(count, x.shape[1], device=x.device)
        top = top.scatter_reduce(0, owner[:, None].expand_as(peak), peak, "amax") / fmt.element.max
        empty = ~torch.zeros(count, dtype=torch.bool, device=x.device).scatter(0, owner, True)
        top[empty] = peak.amax(0) / fmt.element.max
        best, least = top, torch.full_like(top, math.inf)
        for i in range(self.factors):
            trial = top * self.least ** (i / max(1, self.factors - 1))
            step = trial[owner][..., None].clamp_min(1e-12)
            lost = ((fmt.element.round(x / step) * step - x).square() * h).sum(-1)  # (M, G)
            cost = torch.zeros_like(top).index_add_(0, owner, lost)
            best, least = torch.where(cost < least, trial, best), torch.minimum(cost, least)
        return best


@methods.register("temporal-bias")
@dataclass(frozen=True)
class TemporalBias:
    """Lowers the output error by its mean in each bin, shrunk by how uncertain the mean is; kept only where the held-out error falls.

    curves: along which the bins' means lie, see `Center`.
    """

    name: ClassVar[str] = "temporal-bias"
    optional: ClassVar[bool] = True
    curves: int | None = None

    def __post_init__(self) -> None:
        _check(self.curves)

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "moments"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        draft = replace(draft.rounded(), fixes=None)
        x = draft.moved(stats.fit, stats.fit_bins)
        error = draft.lost(x, stats.fit_bins)
        if (offset := draft.offset()) is not None:
            error += offset
        whole = error.mean(0, keepdim=True)
        if draft.edges is None:
            return replace(draft, fixes=-whole)
        count = len(draft.edges) + 1
        n = torch.bincount(stats.fit_bins, minlength=count).clamp_min(1)[:, None]
        means = torch.zeros(count, error.shape[1], device=x.device).index_add_(0, stats.fit_bins, error) / n
        # means of n rows scatter by σ² / n about the true ones: they are drawn to the common mean by that share of their spread
        noise = error.var(0) / n
        spread = ((means - whole).square() - noise).clamp_min(0)
        means = whole + (means - whole) * spread / (spread + noise).clamp_min(1e-30)
        table = torch.cat([means, whole])
        if self.curves is not None:
            table = curved(table, torch.bincount(stats.fit_bins, minlength=count), self.curves)
        return replace(draft, fixes=-table)


def _check(curves: int | None) -> None:
    if curves is not None and curves < 0:
        raise ValueError(f"tables follow no, one or more curves over the timesteps, found {curves}")
