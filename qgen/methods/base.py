"""What a method is, what it may know, and the rule that a refinement stays only where it helps on calls that it was not fitted to."""

__all__ = ["Method", "Stats", "best", "refine", "sqnr_db"]

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qgen.site import Draft, Site


@dataclass(frozen=True)
class Stats:
    """What calibration knows about the input of a draft. Everything is None where no method asked for it.

    fit: (M, K) float32 rows of the calls that methods fit. held: rows of the calls held out. gram: (K, K) mean of x xᵀ over all fitted
    rows. absmax, absmean: (K,) over all fitted rows. seed: for the method's own random numbers.
    """

    fit: Tensor | None = None
    held: Tensor | None = None
    gram: Tensor | None = None
    absmax: Tensor | None = None
    absmean: Tensor | None = None
    seed: int = 0

    @property
    def judge(self) -> Tensor | None:
        """Rows on which candidates are compared: the held-out ones, or the fitted ones where nothing could be held out."""
        return self.fit if self.held is None else self.held


class Method(Protocol):
    """A frozen dataclass with a class attribute `name`, registered in `qgen.recipe.methods`.

    `optional = True`: its result is dropped where the error on held-out rows does not fall.
    """

    name: str

    def needs(self, site: Site) -> frozenset[str]:
        """Statistics it reads, of {"rows", "gram", "absmax"}; empty = data-free."""
        ...

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        """A better draft. The given one is left as it is."""
        ...


def refine(draft: Draft, stats: Stats) -> Draft:
    """Runs the methods of the draft's spec in order and rounds what is left. The log tells what each did to the held-out error."""
    error = None
    for method in draft.spec.methods:
        new = method.refine(draft, stats)
        if stats.judge is None:
            draft = new
            continue
        if error is None and getattr(method, "optional", False):
            error = draft.error(stats.judge)
        after = new.error(stats.judge)
        if getattr(method, "optional", False) and not after < error:
            draft = draft.noted(**{method.name: f"dropped (held-out error {error:.3g} -> {after:.3g})"})
        else:
            draft, error = new.noted(**{method.name: f"{after:.3g}"}), after
    return draft.rounded()


def best(drafts: Iterable[Draft], rows: Tensor | None) -> Draft:
    """The draft with the smallest output error on `rows` (the first of equals); the first one where there are no rows."""
    first, *others = drafts
    if rows is None:
        return first
    chosen, least = first, first.error(rows)
    for draft in others:
        error = draft.error(rows)
        if error < least:
            chosen, least = draft, error
    return chosen


def sqnr_db(error: float) -> float:
    """Signal to quantization noise in dB from a relative squared error."""
    return -10 * math.log10(max(error, 1e-30))
