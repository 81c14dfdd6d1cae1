"""The result of an evaluation: rows that say what was measured, by which network, and how sure it is.

Frozen, printable, and equal to itself after a trip through JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from qgen.errors import unknown
from qgen.eval.bootstrap import Interval, bootstrap_difference

__all__ = ["Score", "Scores"]


@dataclass(frozen=True)
class Score:
    """One row. low and high are the 95 % interval, None where there is none; extractor and digest name the network
    and its weights.

    reference is what the 16-bit model's own samples get, for metrics that judge each by itself; difference is the mean
    of value - reference over pairs, with its paired interval. Of a Fréchet distance without such pictures the reference is
    what chance gives sets as small, and the difference what is beyond it. flagged: too few samples, the note says what to read.
    """

    metric: str
    label: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str = ""
    better: str = "higher"
    extractor: str | None = None
    digest: str | None = None
    note: str = ""
    reference: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    flagged: bool = False


@dataclass(frozen=True)
class Scores:
    """Rows in the order asked for, and the values per prompt of those metrics that have them."""

    rows: tuple[Score, ...]
    per_prompt: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Score:
        """The row of a metric, by the name given to `evaluate`, such as "psnr"."""
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(unknown("metric", metric, (row.metric for row in self.rows)))

    def difference(self, other: Scores, metric: str, seed: int = 0) -> Interval:
        """Mean of self - other over prompts for one metric, with its paired bootstrap interval.

        Raises ValueError if the two were not measured on the same prompts by the same network, or have no values per
        prompt.
        """
        if metric not in self.per_prompt or metric not in other.per_prompt:
            known = sorted(set(self.per_prompt) & set(other.per_prompt))
            raise ValueError(f"{metric!r} has no values per prompt on both sides; these have: {', '.join(known)}")
        if self.prompts != other.prompts:
            raise ValueError("the two were measured on different prompts, so their values are no pairs")
        same_network(self[metric], other[metric])
        return bootstrap_difference(self.per_prompt[metric], other.per_prompt[metric], seed=seed)

    def table(self) -> str:
        """Plain text, one line per row; ↑ and ↓ say which direction is better, brackets that there are too few samples."""
        head: tuple[str, ...] = (
            "metric",
            "value",
            "95 % interval",
            "reference",
            "difference",
            "n",
            "network",
            "note",
        )
        lines = [head, *(_cells(row) for row in self.rows)]
        kept = [i for i in range(len(head)) if i not in (3, 4) or any(line[i] for line in lines[1:])]
        lines = [tuple(line[i] for i in kept) for line in lines]
        head = lines[0]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        rule = tuple("-" * width for width in widths)
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in (head, rule, *lines[1:]))
        return "\n".join(line.rstrip() for line in padded)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """JSON text; infinite values are written as "inf" and "-inf", which JSON has no numbers for."""
        return json.dumps(_no_inf(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Reads `to_json`'s text; ValueError for unknown or missing fields."""
        data = json.loads(text)
        _check_fields(cls, data)
        for row in data["rows"]:
            _check_fields(Score, row)
        rows = tuple(
            Score(**{name: _number(v) if name in _NUMBERS else v for name, v in row.items()}) for row in data["rows"]
        )
        values = {metric: tuple(_number(v) for v in found) for metric, found in data["per_prompt"].items()}
        return cls(rows, values, tuple(data["prompts"]), data["settings"])


def same_network(a: Score, b: Score) -> None:
    """Raises ValueError if two rows of one metric come from different networks: their numbers have different scales."""
    mine, theirs = (a.label, a.extractor, a.digest), (b.label, b.extractor, b.digest)
    if mine != theirs:
        one, other = (f"{label} by {name or 'no network'} ({digest})" for label, name, digest in (mine, theirs))
        raise ValueError(f"{a.metric!r} was measured by different networks and cannot be compared: {one}, and {other}")


_NUMBERS = ("value", "low", "high", "reference", "difference", "difference_low", "difference_high")


def _check_fields(kind: type, data: Any) -> None:
    known = {f.name for f in fields(kind)}
    wanted = {f.name for f in fields(kind) if kind is Scores or f.default is MISSING}  # rows of older files lack some
    if not isinstance(data, dict) or not wanted <= set(data) <= known:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{kind.__name__} has the fields {sorted(known)}, found {found}")


def _cells(row: Score) -> tuple[str, ...]:
    arrow = "↑" if row.better == "higher" else "↓"
    label = f"{row.label} {arrow}" + (f" ({row.unit})" if row.unit else "")
    network = f"{row.extractor} {row.digest}" if row.extractor else ""
    value = f"({_short(row.value)})" if row.flagged else _short(row.value)
    reference = "" if row.reference is None else _short(row.reference)
    change = "" if row.difference is None else f"{row.difference:+.3g} {_span(row.difference_low, row.difference_high)}"
    return label, value, _span(row.low, row.high), reference, change.strip(), str(row.n), network, row.note


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{_short(low)}, {_short(high)}]"


def _short(x: float) -> str:
    return f"{x:.4g}"


def _no_inf(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _no_inf(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_no_inf(value) for value in x]
    return str(x) if isinstance(x, float) and math.isinf(x) else x


def _number(x: Any) -> Any:
    return float(x) if x in ("inf", "-inf") else x
