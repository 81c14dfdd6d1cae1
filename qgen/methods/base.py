"""What a method is, what it may know, and the rule that a refinement stays only where it helps on calls that it was not fitted to."""

__all__ = ["Judge", "Method", "Stats", "best", "refine", "rounds_for", "sqnr_db"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from qgen.calibration.moments import Moments
from qgen.site import Draft, Site


class Judge:
    """Scores drafts of one weight on the same rows; the float output and the quantized inputs are computed once.

    rows: (M, K) float32, centred where the draft is. bins: (M,) of the rows, where the draft has several. raw: the rows before they were
    centred, whose output's energy errors are relative to.
    """

    def __init__(self, rows: Tensor, bins: Tensor | None = None, raw: Tensor | None = None):
        self.rows, self.bins, self.raw = rows, bins, raw
        self._want: tuple[Tensor, Tensor, float] | None = None
        self._inputs: tuple[tuple, Tensor] | None = None
        self._known: list[tuple[tuple, float]] = []

    def first(self, most: int) -> "Judge":
        """A judge on the first rows, at most so many."""
        return Judge(*(None if t is None else t[:most] for t in (self.rows, self.bins, self.raw)))

    def error(self, draft: Draft) -> float:
        """Squared error of the output, relative to the float output's energy (without bias), as `Draft.error`."""
        layer = (draft.weight, draft.qweight, draft.up, draft.down, draft.smooth, draft.shift, draft.bias_fix)
        parts = (*layer, draft.steps, draft.fixes, draft.dither)
        for seen, error in self._known:
            if draft.qweight is not None and all(a is b for a, b in zip(seen, parts, strict=True)):
                return error
        error = self._error(draft)
        self._known = [(parts, error), *self._known[:3]]  # a method judges its result, and so does who called it
        return error

    def _error(self, draft: Draft) -> float:
        if draft.dither is not None:  # as of other rows
            plain = replace(draft, dither=None, offsets=None)
            return Judge(
                draft.moved(self.rows, self.bins), self.bins, self.rows if self.raw is None else self.raw
            )._error(plain)
        if self._want is None or self._want[0] is not draft.weight:
            want = self.rows @ draft.weight.T
            whole = want if self.raw is None else self.raw @ draft.weight.T
            self._want = (draft.weight, want, max(float(whole.square().sum()), 1e-30))
        key = (draft.smooth, draft.shift, draft.hadamard, draft.act, draft.steps, draft.ratio)
        if self._inputs is None or any(a is not b for a, b in zip(self._inputs[0], key, strict=True)):
            self._inputs = (key, draft.inputs(self.rows, bins=self.bins))
        got = torch.addmm(self._want[1], self._inputs[1], draft.values().T, beta=-1)
        if draft.up is not None:
            got.addmm_(self.rows @ draft.down.T, draft.up.T)
        if (extra := draft.offset()) is not None:
            got += extra
        if draft.fixes is not None:
            got += draft.fixes[-1:] if self.bins is None else draft.fixes[self.bins]
        return float(got.square_().sum()) / self._want[2]


@dataclass(frozen=True)
class Stats:
    """What calibration knows about the input of a draft. Everything is None where no method asked for it.

    fit: (M, K) float32 rows of the calls that methods fit. held: rows of the calls held out. gram: (K, K) mean of x xᵀ over all fitted
    rows. absmax, absmean: (K,) over all fitted rows. seed: for the method's own random numbers.
    moments: of the raw input, by timestep. fit_t, held_t: (M,) timesteps of the rows; fit_bins, held_bins: (M,) their bins, once the
    draft has several; fit_raw, held_raw: the rows before they were centred.
    paths: (P, S, K) rows of P tokens at S steps each, path_t and path_bins (P, S) as of other rows.
    known: (P, K) first rows that all prompts have in common, which all of the above is without.
    judge: scores candidates, on the held-out rows, or on the fitted ones where nothing could be held out. cache: what methods computed for
    this draft and want to find again.
    """

    fit: Tensor | None = None
    held: Tensor | None = None
    gram: Tensor | None = None
    absmax: Tensor | None = None
    absmean: Tensor | None = None
    seed: int = 0
    moments: Moments | None = None
    fit_t: Tensor | None = None
    held_t: Tensor | None = None
    fit_bins: Tensor | None = None
    held_bins: Tensor | None = None
    fit_raw: Tensor | None = None
    held_raw: Tensor | None = None
    paths: Tensor | None = None
    path_t: Tensor | None = None
    path_bins: Tensor | None = None
    known: Tensor | None = None
    judge: Judge | None = field(init=False, default=None)
    cache: dict = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rows = (self.held, self.held_bins, self.held_raw)
        rows = (self.fit, self.fit_bins, self.fit_raw) if self.held is None else rows
        object.__setattr__(self, "judge", None if rows[0] is None else Judge(*rows))


class Method(Protocol):
    """A frozen dataclass with a class attribute `name`, registered in `qgen.recipe.methods`.

    `optional = True`: its result is dropped where the error on held-out rows does not fall. `of_inputs = True`: it decides what is done to
    the input, which layers that read one input may have in common.
    """

    name: str

    def needs(self, site: Site) -> frozenset[str]:
        """Statistics it reads, of {"rows", "gram", "absmax", "moments", "paths", "known"}; empty = data-free."""
        ...

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        """A better draft. The given one is left as it is."""
        ...


def refine(draft: Draft, stats: Stats, methods: Sequence[Method] | None = None) -> Draft:
    """Runs the methods of the draft's spec, or those given, in order and rounds what is left.

    The log tells what each did to the held-out error.
    """
    judge, error = stats.judge, None
    for method in draft.spec.methods if methods is None else methods:
        new = method.refine(draft, stats)
        if judge is None:
            draft = new
            continue
        new = new.rounded()
        if error is None and getattr(method, "optional", False):
            error = judge.error(draft)
        after = judge.error(new)
        if getattr(method, "optional", False) and error is not None and not after < error:
            draft = draft.noted(**{method.name: f"dropped (held-out error {error:.3g} -> {after:.3g})"})
        else:
            draft, error = new.noted(**{method.name: f"{after:.3g}"}), after
    return draft.rounded()


def best(drafts: Iterable[Draft], judge: Judge | None) -> Draft:
    """The draft with the smallest output error (the first of equals); the first one where there is no judge."""
    if judge is None:
        return next(iter(drafts))
    return min(((judge.error(draft), i, draft) for i, draft in enumerate(drafts)), key=lambda scored: scored[:2])[2]


def rounds_for(draft: Draft, rounds: int) -> int:
    """Alternations worth their time: more than one for weights of up to a million values, where they take milliseconds."""
    return rounds if draft.weight.numel() <= 1 << 20 else min(rounds, 1)


def sqnr_db(error: float) -> float:
    """Signal to quantization noise in dB from a relative squared error."""
    return -10 * math.log10(max(error, 1e-30))
