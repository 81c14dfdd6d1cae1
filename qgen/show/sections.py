"""What stands on a report's page, one function per section. Each takes data and returns markup; nothing for nothing."""

__all__ = ["environment", "floats", "formats", "layers", "methods", "pictures", "reproduce", "scores", "tiles"]

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qgen.recipe import Recipe
from qgen.recipe import methods as known_methods
from qgen.show.page import Markup, join, section, table, tag
from qgen.show.rows import Summary
from qgen.show.summary import mib

SHOWN = 24  # layers before the rest is folded away
OVERFIT_DB = 1.0


def tiles(found: Summary) -> Markup:
    """The totals, large."""
    t = found.totals
    facts = [(f"{t['ratio']:.2f} × smaller", f"{mib(t['bytes16'])} at 16 bits, now {mib(t['nbytes'])}")]
    branch = f", and {t['lowrank_bits']:.2f} bits of the 16-bit low-rank branch" if t["lowrank_bits"] else ""
    facts.append(
        (f"{t['bits_per_weight'] - t['lowrank_bits']:.2f} bits", f"per quantized weight with its scales{branch}")
    )
    for name, db in t["output_sqnr_db"].items():
        facts.append((f"{db:.1f} dB", f"SQNR of the output of {name} on held-out calls, {percent(db)} error"))
    facts.append((f"{t['quantized']} of {t['layers']}", "layers quantized"))
    return tag(
        "div", *(tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in facts), class_="tiles"
    )


def pictures(pairs: Sequence[tuple[str, Any, Any]]) -> Markup:
    """Before, after and their difference, per prompt."""
    from qgen.show.pictures import GAIN, difference, png_uri

    made = []
    for caption, before, after in pairs:
        shown = (("16-bit", before), ("quantized", after), (f"difference × {GAIN}", difference(before, after)))
        cells = [tag("span", label, tag("img", src=png_uri(p, 192), alt=f"{caption}: {label}")) for label, p in shown]
        made.append(tag("figure", tag("figcaption", caption), tag("div", *cells)))
    about = "The same prompts from the same noise. The difference is zero where it is black."
    return section("Pictures", tag("div", *made, class_="pairs") if made else Markup(""), about=about)


def scores(named: Mapping[str, Any]) -> Markup:
    """One row per metric and network, one column per model: numbers by different networks or weights never share a row."""
    fullest = sorted(named.values(), key=lambda found: -len(found.rows))  # its order of metrics is the table's
    order = list(dict.fromkeys(row.metric for found in fullest for row in found.rows))
    kinds = list(dict.fromkeys(_kind(row) for found in fullest for row in found.rows))
    rows = []
    for kind in sorted(kinds, key=lambda kind: order.index(kind[0])):
        found = {name: next((row for row in s.rows if _kind(row) == kind), None) for name, s in named.items()}
        here = [row for row in found.values() if row]
        first = here[0]
        network = f"{first.extractor} {first.digest or ''}".strip() if first.extractor else ""
        label = f"{first.label}{f' ({first.unit})' if first.unit else ''}, {first.better} is better"
        counts = " / ".join(dict.fromkeys(str(row.n) for row in here))
        rows.append(
            (label, *(_score(row) for row in found.values()), counts, "; ".join(filter(None, (network, first.note))))
        )
    head = ("metric", *(name or "value" for name in named), "pictures", "network and note")
    about = "Mean over pictures, and under it the 95 % interval of that mean where there is one."
    if len(kinds) > len(order):
        about += " A metric measured by several networks has a row for each: such rows cannot be compared."
    return section("Scores", table(head, rows, range(1, len(named) + 2)) if rows else Markup(""), about=about)


def _kind(row: Any) -> tuple:
    """What two rows must share to be compared."""
    return row.metric, row.label, row.extractor, row.digest


def _score(row: Any) -> Markup:
    if row is None:
        return Markup("")
    interval = (
        "" if row.low is None or row.high is None else tag("span", f"{row.low:.4g} to {row.high:.4g}", class_="small")
    )
    return tag("div", tag("b", f"{row.value:.4g}"), interval)


def layers(found: Summary) -> Markup:
    """Error bars, the worst layer first; layers without any measured error come last."""
    packed = sorted((row for row in found if row["spec"] != "float"), key=_rank)
    errors = [error(db) for row in packed for db in (_judged(row), row["sqnr_fit_db"]) if db is not None]
    top = max(errors, default=1.0) or 1.0
    several = len({row["denoiser"] for row in packed}) > 1
    lines = [_layer(row, top, several) for row in packed]
    rest: Any = ""
    if len(lines) > SHOWN:
        rest = tag("details", tag("summary", f"{len(lines) - SHOWN} more layers"), *lines[SHOWN:])
    keys = []
    if any(row["sqnr_db"] is not None for row in packed):
        keys = [("held", "held-out calls"), ("fit", "calls the methods were fitted to")]
    if any(row["sqnr_db"] is None for row in packed):
        keys.append(("weight", "error of the weights alone"))
    legend = tag("div", *(tag("span", tag("i", class_=f"key {kind}"), words) for kind, words in keys), class_="legend")
    about = (
        f"RMS error of each layer's output relative to the float layer's, worst first; the longest bar is {100 * top:.1f} %. "
        "On the right the same as SQNR. Where the held-out error is much larger than the fitted one, the layer overfits its calibration."
    )
    return section("Layers", legend, tag("div", *lines[:SHOWN], rest, class_="layers"), about=about)


def formats(found: Summary) -> Markup:
    """Layers, weights and bytes by format."""
    groups: dict[str, list[dict]] = {}
    for row in found:
        groups.setdefault(row["spec"] or "?", []).append(row)
    rows = []
    for spec, members in sorted(groups.items(), key=lambda item: -sum(row["nbytes"] for row in item[1])):
        weights, nbytes = (sum(row[key] for row in members) for key in ("bytes16", "nbytes"))
        kernels = ", ".join(sorted({row["kernel"] for row in members if row["kernel"]}))
        bits = f"{16 * nbytes / weights:.2f}" if weights else ""
        rows.append((spec, len(members), f"{weights / 2e6:.3g} M", mib(weights), mib(nbytes), bits, kernels))
    head = ("weights x activations", "layers", "weights", "at 16 bits", "now", "bits per weight", "kernel here")
    return section("Formats", table(head, rows, (1, 2, 3, 4, 5)))


def methods(found: Summary) -> Markup:
    """What each method did over all layers: how often it was kept, and the held-out SQNR after it."""
    kept: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    dropped: dict[str, int] = {}
    for row in found:
        before = None
        for name, db in steps(row["log"]):
            kept.setdefault(name, [])
            if db is None:
                dropped[name] = dropped.get(name, 0) + 1
                continue
            kept[name].append(db)
            if before is not None:
                gains.setdefault(name, []).append(db - before)
            before = db
    rows = []
    for name, dbs in kept.items():
        after = f"{statistics.median(dbs):.1f} dB" if dbs else ""
        gain = f"{statistics.median(gains[name]):+.2f} dB" if gains.get(name) else ""
        rows.append((name, len(dbs), dropped.get(name, 0), after, gain))
    about = (
        "In the order in which they ran. A method whose result was worse on held-out calls is dropped for that layer."
    )
    head = ("method", "kept on layers", "dropped", "median SQNR after it", "median gain where kept")
    return section("Methods", table(head, rows, (1, 2, 3, 4)) if rows else Markup(""), about=about)


def floats(found: Summary) -> Markup:
    """Layers that stay float, by reason."""
    groups: dict[str, list[dict]] = {}
    for row in found:
        if row["spec"] == "float":
            groups.setdefault(row["why"] or "?", []).append(row)
    rows = [
        (why, ", ".join(row["path"] for row in group), mib(sum(row["nbytes"] for row in group)))
        for why, group in groups.items()
    ]
    return section("Kept float", table(("why", "layers", "bytes"), rows, (2,)) if rows else Markup(""))


def environment(facts: Mapping[str, str]) -> Markup:
    return section("Environment", table(("what", "value"), facts.items()), about="Of the process that wrote this page.")


def reproduce(recipes: Mapping[str, Recipe], commands: Sequence[str]) -> Markup:
    """Commands, and the recipe as JSON that `quantize` reads."""
    texts = {recipe.to_json(): [] for recipe in recipes.values()}
    for name, recipe in recipes.items():
        texts[recipe.to_json()].append(name)
    folds = []
    for text, names in texts.items():
        whose = f" of {', '.join(names)}" if any(names) and len(texts) > 1 else ""
        folds.append(tag("details", tag("summary", f"recipe{whose} as JSON"), tag("pre", text)))
    lines = tag("pre", "\n".join(commands)) if commands else Markup("")
    return section("Do it again", lines, *folds)


def error(db: float) -> float:
    """Relative RMS error from SQNR in dB."""
    return 10 ** (-max(-60.0, min(300.0, db)) / 20)


def percent(db: float) -> str:
    return f"{100 * error(db):.2g} %"


def steps(log: Mapping[str, str]) -> list[tuple[str, float | None]]:
    """(method, held-out SQNR in dB after it) in order; None = dropped. What else a log holds are facts, not steps."""
    found: list[tuple[str, float | None]] = []
    for name, value in log.items():
        if name not in known_methods:
            continue
        if value.startswith("dropped"):
            found.append((name, None))
            continue
        try:
            left = float(value)
        except ValueError:
            continue
        if left > 0 and math.isfinite(left):
            found.append((name, -10 * math.log10(left)))
    return found


def _judged(row: dict) -> float | None:
    return row["weight_sqnr_db"] if row["sqnr_db"] is None else row["sqnr_db"]


def _rank(row: dict) -> tuple[bool, float]:
    """Measured outputs first; the error of weights alone is another thing and stands apart."""
    db = _judged(row)
    return row["sqnr_db"] is None, math.inf if db is None else db


def _layer(row: dict, top: float, several: bool) -> Markup:
    held, fit = row["sqnr_db"], row["sqnr_fit_db"]
    path = f"{row['denoiser']}.{row['path']}" if several else row["path"]
    bars = [("held", held), ("fit", fit)] if held is not None else [("weight", row["weight_sqnr_db"])]
    drawn = [
        tag("div", class_=f"bar {kind}", style=f"width:{100 * error(db) / top:.2f}%")
        for kind, db in bars
        if db is not None
    ]
    words = []
    if held is not None:
        words = [
            tag("b", f"{held:.1f} dB"),
            tag("span", f" {percent(held)}" + (f", fit {fit:.1f}" if fit is not None else "")),
        ]
    elif row["weight_sqnr_db"] is not None:
        words = [tag("b", f"{row['weight_sqnr_db']:.1f} dB"), tag("span", " weights")]
    facts = [" × ".join(map(str, row["shape"])), row["spec"], f"{mib(row['bytes16'])} to {mib(row['nbytes'])}"]
    facts.append({"default": "the recipe's default", "": ""}.get(row["why"], f"why: {row['why']}"))
    facts += [f"kernel: {row['kernel']}"] if row["kernel"] else []
    about: list[Any] = [" · ".join(filter(None, facts))]
    if held is not None and fit is not None and fit - held > OVERFIT_DB:
        about.append(tag("span", f" · overfits by {fit - held:.1f} dB", class_="warn"))
    if row["log"]:
        about.append(tag("div", _log(row["log"])))
    return tag(
        "div", tag("div", path, class_="path"), tag("div", *drawn, class_="bars"), tag("div", *words, class_="db"),
        tag("div", *about, class_="facts"), class_="layer",
    )  # fmt: skip


def _log(log: Mapping[str, str]) -> Markup:
    """ "smooth 19.4 → lowrank 25.3 → gptq 26.7 dB; reconstruct dropped; damp 0.01"."""
    went = steps(log)
    chain = " → ".join(f"{name} {db:.1f}" for name, db in went if db is not None)
    dropped = [f"{name} dropped" for name, db in went if db is None]
    facts = [f"{name} {value}" for name, value in log.items() if name not in {step for step, _ in went}]
    return join(["; ".join(filter(None, [chain + " dB" if chain else "", *dropped, *facts]))])
