"""Mixed precision on the report's page: which layer got how many bits, and the damage that decided it, as a heat map.

One row per unit of choice in the order of execution, one column per candidate. The darker a cell, the larger the damage, on a logarithmic
scale from the smallest to the largest of the model; the chosen cell is framed, and the bar shows its bits.
"""

__all__ = ["allocation"]

import math
from collections.abc import Mapping
from typing import Any

from qgen.models import adapter_for
from qgen.show.page import Markup, join, section, table, tag
from qgen.show.sections import SHOWN

_WIDEST = 16.0


def allocation(x: Any) -> Markup:
    """The section for a pipeline or module that `quantize(budget=…)` made; nothing for others."""
    made = []
    for name, module in adapter_for(x).denoisers(x).items():
        record = getattr(module, "qgen_allocation", None)
        if isinstance(record, Mapping) and record.get("units"):
            made.append(_denoiser(name, record))
    about = (
        "Each layer's damage in each format, measured with this layer alone quantized: the darker, the worse, on a logarithmic scale. "
        "The framed format was chosen; the bar and number on the left are its stored bits per weight."
    )
    return section("Bits", *made, about=about)


def _denoiser(name: str, record: Mapping) -> Markup:
    units, labels = record["units"], list(record["labels"])
    parts = [tag("p", _totals(name, record), class_="about"), *_bits(units)]
    for metric in units[0]["damage"]:
        rows = [_row(unit, metric, labels, *_span(units, metric)) for unit in units]
        head = ("layer", "bits", *labels)
        parts.append(tag("h3", f"Sensitivity: {metric}"))
        parts.append(table(head, rows[:SHOWN], (1,)))
        if len(rows) > SHOWN:
            more = tag("summary", f"{len(rows) - SHOWN} more layers")
            parts.append(tag("details", more, table(head, rows[SHOWN:], (1,))))
    return tag("div", *parts)


def _totals(name: str, record: Mapping) -> str:
    reached = record["reached"]
    words = [
        f"asked: {record['asked']}",
        f"reached: {reached['bits']:.3f} bits per weight",
        f"{reached['bytes'] / 2**20:.2f} MiB in all",
    ]
    if "seconds" in reached:
        words.append(f"{1e3 * reached['seconds']:.3g} ms in these layers")
    return f"{name + ': ' if name else ''}{', '.join(words)}"


def _bits(units: list) -> list[Markup]:
    """Weights by chosen format, the widest share first."""
    shares: dict[str, float] = {}
    for unit in units:
        shares[unit["chosen"]] = shares.get(unit["chosen"], 0.0) + unit["weights"]
    whole = sum(shares.values()) or 1.0
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return [
        tag(
            "div", tag("div", "", class_="bar held", style=f"width:{100 * part / whole:.1f}%"),
            tag("span", f"{kind}: {100 * part / whole:.1f} % of the weights", class_="small"),
        )
        for kind, part in ordered
    ]  # fmt: skip


def _span(units: list, metric: str) -> tuple[float, float]:
    """Logarithms of the smallest and the largest damage that is not 0."""
    logs = [math.log10(d) for unit in units for d in unit["damage"][metric].values() if d > 0 and math.isfinite(d)]
    return (min(logs), max(logs)) if logs else (0.0, 1.0)


def _row(unit: Mapping, metric: str, labels: list[str], low: float, high: float) -> tuple:
    paths = unit["paths"]
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    chosen = unit["chosen"]
    bits = unit["bits"][chosen]
    bar = tag("div", "", class_="bar held", style=f"width:{100 * min(1.0, bits / _WIDEST):.1f}%")
    cells = [_cell(unit["damage"][metric].get(label), low, high, label == chosen) for label in labels]
    return (tag("span", name, class_="path"), join([f"{bits:.2f}", bar]), *cells)


def _cell(damage: float | None, low: float, high: float, chosen: bool) -> Markup:
    """A coloured cell with its number; nothing where the layer has no such candidate."""
    if damage is None or not math.isfinite(damage):
        return Markup("")
    heat = 0.0 if damage <= 0 else 0.06 + 0.74 * (math.log10(damage) - low) / max(high - low, 1e-9)
    frame = "outline:2px solid var(--ink);" if chosen else ""
    style = f"background:rgba(214,69,48,{min(1.0, max(0.0, heat)):.3f});padding:2px 8px;border-radius:4px;{frame}"
    return tag("span", f"{damage:.2g}", style=f"display:inline-block;min-width:76px;{style}")
