"""Plots for a page, drawn as SVG by hand: no library, no script, colours of the page in light, dark and print.

`strip` shows every value of a metric as a dot, one line of dots per model, with the mean and its 95 % interval above them. What a
mean hides (two groups, one ruined picture) is seen at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qgen.eval.bootstrap import bootstrap_mean
from qgen.show.page import Markup, tag

__all__ = ["strip"]

WIDTH, LINE, TOP, LEFT, RIGHT = 720, 44, 10, 150, 20


def strip(named: Mapping[str, Sequence[float]]) -> Markup:
    """An SVG for values by model name; infinite ones are left out and counted in the label. Nothing for nothing finite."""
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in named.items()}
    everything = [v for values in finite.values() for v in values]
    if not everything:
        return Markup("")
    low, high = min(everything), max(everything)
    pad = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad

    def at(value: float) -> str:
        return f"{LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT):.1f}"

    height = TOP + LINE * len(named) + 34
    parts: list[Any] = []
    for row, (name, values) in enumerate(finite.items()):
        y = TOP + LINE * row + LINE // 2
        left_out = len(named[name]) - len(values)
        label = (name or "model")[:22]
        parts.append(_text(4, y + 4, label, "start", bold=True))
        if left_out:
            parts.append(_text(4, y + 18, f"{left_out} of {len(named[name])} infinite", "start"))
        # Dots of near values are spread over the height in a fixed order, so that none hides another.
        for i, value in enumerate(values):
            dot = {
                "cx": at(value),
                "cy": y + 4 + (i * 5) % 13 - 3,
                "r": 2.6,
                "style": "fill:var(--held);fill-opacity:.45",
            }
            parts.append(tag("circle", **dot))
        if values:
            mean = bootstrap_mean(values)
            parts.append(_line(at(mean.low), y - 9, at(mean.high), y - 9, 5, "--fit"))
            parts.append(_line(at(mean.mean), y - 15, at(mean.mean), y - 3, 2.5, "--ink"))
    axis = TOP + LINE * len(named)
    parts.append(_line(LEFT, axis, WIDTH - RIGHT, axis, 1, "--line"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(_line(at(value), axis, at(value), axis + 5, 1, "--soft"))
        parts.append(_text(at(value), axis + 20, f"{value:.3g}", "middle"))
    said = ", ".join(f"{name or 'model'} {len(values)} values" for name, values in finite.items())
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=said,
        style="width:100%;max-width:820px;display:block",
    )


def _text(x: Any, y: Any, words: str, anchor: str, bold: bool = False) -> Markup:
    weight = "600" if bold else "400"
    return tag(
        "text",
        words,
        x=x,
        y=y,
        text_anchor=anchor,
        style=f"fill:var({'--ink' if bold else '--soft'});font-size:12px;font-weight:{weight}",
    )


def _line(x1: Any, y1: Any, x2: Any, y2: Any, width: float, colour: str) -> Markup:
    return tag(
        "line", x1=x1, y1=y1, x2=x2, y2=y2, style=f"stroke:var({colour});stroke-width:{width};stroke-linecap:round"
    )
