"""Pieces of the page as markup: a job's state, facts about a drawing, tables of scores, a plot over prompts, the heat map.

Everything passes through `qgen.show.page.tag`, which escapes: prompts, paths and names from files are untrusted.
"""

__all__ = ["facts", "heat_map", "model", "over_prompts", "scores", "status"]

import colorsys
import math
from typing import Any

from qgen.show import sections
from qgen.show.page import Markup, join, section, table, tag
from qgen.show.rows import Summary
from qgen.show.summary import mib
from qgen.web.jobs import Job

_WORDS = {"waiting": "waiting", "running": "working", "done": "done", "failed": "failed", "cancelled": "cancelled"}


def boxed(*content: Any) -> str:
    """Markup in the page's own style."""
    return str(tag("div", *content, class_="q"))


def status(job: Job, ahead: int = 0) -> str:
    """State, what is going on, a bar, and the id under which the job is found again."""
    words = job.error if job.state == "failed" else job.doing if job.state == "running" else ""
    if job.state == "waiting":
        words = f"{ahead} ahead of this one" if ahead else "next in line"
    share = min(1.0, job.done / job.total) if job.total and job.state == "running" else float(job.state == "done")
    bar = tag("div", tag("i", style=f"width:{100 * share:.0f}%"), class_="track", role="progressbar", aria_valuemin=0,
              aria_valuemax=100, aria_valuenow=f"{100 * share:.0f}", aria_label=words or job.state)  # fmt: skip
    line = tag(
        "div", tag("span", _WORDS[job.state], class_=f"chip {job.state}"), tag("span", words), tag("span", f"job {job.id}", class_="soft"),
        class_="line", role="status",
    )  # fmt: skip
    return boxed(line, bar if job.state in ("waiting", "running") else "")


def facts(result: dict[str, Any]) -> str:
    """What a drawing cost at 16 and at 4 bits, as tiles."""
    db = result["psnr"]
    tiles = [
        ("equal" if db is None else f"{db:.1f} dB", "PSNR of the 4-bit picture against the 16-bit one"),
        (f"{mib(result['bytes4'])}", f"denoiser in memory at 4 bits, {mib(result['bytes16'])} at 16"),
        (f"{result['seconds4']:.2f} s", f"to draw at 4 bits, {result['seconds16']:.2f} s at 16, on this computer"),
    ]
    if result.get("peak4"):
        tiles.append(
            (mib(result["peak4"]), f"most GPU memory at 4 bits, {mib(result['peak16'])} at 16; both models were loaded")
        )
    note = f"Kernels here: {', '.join(result['kernels'])}. "
    if "reference" in result["kernels"]:
        note += "The reference kernel is plain torch: it defines the result and is not made for speed."
    return boxed(_tiles(tiles), tag("p", note, class_="soft"))


def model(result: dict[str, Any], heat: bool = True) -> str:
    """Totals, worst layers, formats, what stayed float, and the heat map."""
    found = Summary(result["rows"], result["totals"])
    notes = [tag("p", line, class_="soft") for line in result.get("notes") or ()]
    parts = [*notes, sections.tiles(found)]
    if heat and result.get("heat"):
        parts.append(heat_map(result["heat"]))
    parts += [sections.layers(found), sections.formats(found), sections.methods(found), sections.floats(found)]
    return boxed(*parts)


def worst(result: dict[str, Any], most: int = 8) -> str:
    """Totals and the layers that lost most."""
    found = Summary(result["rows"], result["totals"])
    judged = [row for row in found if row["spec"] != "float" and _error(row) is not None]
    rows = [
        (row["path"], row["spec"], f"{_error(row):.1f} dB", f"{mib(row['bytes16'])} to {mib(row['nbytes'])}")
        for row in sorted(judged, key=_error)[:most]
    ]
    about = "SQNR of a layer's output on held-out calls, or of its weights where the recipe does not calibrate. Inspect shows all layers."
    command = result.get("command")
    return boxed(
        sections.tiles(found),
        section("Worst layers", table(("layer", "format", "SQNR", "size"), rows, (2, 3)), about=about),
        section("The same from the command line", tag("pre", command)) if command else "",
    )


def scores(rows: list[dict[str, Any]], failed: dict[str, str], drawn: int, of: int) -> str:
    """One line per metric, growing while pictures are drawn; columns that no metric fills are left out."""
    head = ("metric", "value", "95 % interval", "reference", "difference", "pictures", "network and note")
    lines = [_score(row) for row in rows]
    lines += [(name, tag("span", "not measured", class_="warn"), "", "", "", "", why) for name, why in failed.items()]
    kept = [i for i in range(len(head)) if i < 2 or any(line[i] for line in lines)]
    numbers = [place for place, i in enumerate(kept) if 1 <= i <= 5]
    body = table([head[i] for i in kept], [[line[i] for i in kept] for line in lines], numbers)
    about = (
        f"{drawn} of {of} pairs drawn. Mean over pictures, with the 95 % interval of that mean. The reference is what the 16-bit pictures "
        "get, or for Fréchet distances what chance gives; a difference whose interval leaves out zero is a real one. Values in brackets "
        "rest on too few pictures."
    )
    return boxed(section("Scores", body, about=about))


def _score(row: dict[str, Any]) -> tuple:
    network = f"{row['extractor']} {row['digest'] or ''}".strip() if row["extractor"] else ""
    unit = f" ({row['unit']})" if row["unit"] else ""
    change: Any = ""
    if row["difference"] is not None:
        small = tag("span", _span(row["difference_low"], row["difference_high"]), class_="small")
        change = tag("div", f"{float(row['difference']):+.3g}", small)
    return (
        f"{row['label']}{unit}, {row['better']} is better",
        tag("b", f"({_short(row['value'])})" if row["flagged"] else _short(row["value"])),
        _span(row["low"], row["high"]),
        "" if row["reference"] is None else _short(row["reference"]),
        change,
        row["n"],
        "; ".join(filter(None, (network, row["note"]))),
    )


def _span(low: Any, high: Any) -> str:
    return "" if low is None or high is None else f"{_short(low)} to {_short(high)}"


def over_prompts(per_prompt: dict[str, list], rows: list[dict[str, Any]]) -> str:
    """Per metric one plot: a bar a prompt, sorted, and the mean as a dashed line."""
    labels = {row["metric"]: f"{row['label']}{' in ' + row['unit'] if row['unit'] else ''}" for row in rows}
    drawn = [
        section(labels.get(name, name), _bars(sorted(map(float, values)), labels.get(name, name)))
        for name, values in per_prompt.items()
    ]
    return boxed(*drawn) if drawn else ""


def heat_map(heat: dict[str, Any], most: int = 120) -> Markup:
    """Layers down, timesteps across; the colour is the layer's own relative error, the number the same in dB."""
    values = [v for line in heat["db"] for v in line if v is not None and v > -119]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    order = sorted(
        range(len(heat["layers"])), key=lambda i: -max((v for v in heat["db"][i] if v is not None), default=-120)
    )
    shared = _shared(heat["layers"])
    place = tag("span", f" in {shared.rstrip('.')}", class_="path") if shared else ""
    head = tag("tr", tag("th", "layer", place), *(tag("th", step, scope="col") for step in heat["steps"]))
    body = []
    for index in order[:most]:
        cells = [_cell(value, low, high) for value in heat["db"][index]]
        name = heat["layers"][index]
        body.append(tag("tr", tag("th", tag("bdi", name[len(shared) :]), scope="row", title=name), *cells))
    about = (
        "Columns are timesteps, noise first. Each number is the layer's own error relative to its output, in dB: -20 dB is a tenth, "
        f"-40 dB a hundredth. Darker is worse. Worst layers first{f'; {most} of {len(order)} are shown' if len(order) > most else ''}."
    )
    grid = tag(
        "table",
        tag("thead", head),
        tag("tbody", *body),
        class_="heat",
        aria_label="error of each layer at each timestep in dB",
    )
    return section(
        "Error by timestep",
        tag("div", grid, class_="scroll", tabindex=0, role="region", aria_label="heat map"),
        about=about,
    )


def _shared(names: list[str]) -> str:
    """The dotted beginning of all names, with its last dot; "" where they share none."""
    shared = ""
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}."
    return shared


def _cell(value: float | None, low: float, high: float) -> Markup:
    if value is None:
        return tag("td", "")
    share = 0.0 if high <= low else max(0.0, (value - low) / (high - low))
    light = round(94 - 62 * share)  # of a blue that fades to white where errors are small
    ink = "#fff" if _luminance(light) < 0.179 else "#000"  # where both stand out from the ground equally, by 4.6 to 1
    return tag("td", f"{value:.0f}", style=f"background:hsl(216 70% {light}%);color:{ink}", title=f"{value:.1f} dB")


def _luminance(light: int) -> float:
    """Relative luminance (WCAG 2) of the heat map's blue of so many percent lightness."""
    parts = colorsys.hls_to_rgb(216 / 360, light / 100, 0.7)
    return sum(
        weight * (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4)
        for weight, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def _bars(values: list[float], label: str, width: int = 640, height: int = 150) -> Markup:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return tag("p", "Every pair is equal: there is nothing to plot.", class_="soft")
    top, bottom = max(finite), min(0.0, *finite)
    mean = sum(finite) / len(finite)
    left, pad = 46, 10
    span = (top - bottom) or 1.0
    y = lambda v: pad + (height - 2 * pad) * (top - min(v, top)) / span  # noqa: E731
    each = (width - left) / len(values)
    marks = [
        tag(
            "rect",
            tag("title", _short(v)),
            class_="mark",
            x=f"{left + i * each + each * 0.1:.1f}",
            y=f"{min(y(v), y(0)):.1f}",
            width=f"{max(0.5, each * 0.8):.1f}",
            height=f"{max(0.5, abs(y(0) - y(v))):.1f}",
        )
        for i, v in enumerate(values)
    ]
    line = tag("line", class_="mean", x1=left, x2=width, y1=f"{y(mean):.1f}", y2=f"{y(mean):.1f}")
    base = tag("line", class_="axis", x1=left, x2=width, y1=f"{y(0):.1f}", y2=f"{y(0):.1f}")
    texts = [
        tag("text", _short(v), x=left - 6, y=f"{min(height - 4, y(v) + 4):.1f}", text_anchor="end")
        for v in dict.fromkeys((top, bottom))
    ]
    words = f"{label} of {len(values)} prompts, sorted: from {_short(values[0])} to {_short(values[-1])}, mean {_short(mean)}"
    picture = tag("svg", *marks, base, line, *texts, role="img", aria_label=words, viewBox=f"0 0 {width} {height}")
    return join([picture, tag("p", words + " (dashed).", class_="soft")])


def _tiles(pairs: list[tuple[str, str]]) -> Markup:
    return tag(
        "div", *(tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in pairs), class_="tiles"
    )


def _error(row: dict) -> float | None:
    return row["weight_sqnr_db"] if row["sqnr_db"] is None else row["sqnr_db"]


def _short(x: Any) -> str:
    return f"{float(x):.4g}"
