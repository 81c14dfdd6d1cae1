"""Rows as a table: for terminals, for Markdown, as CSV and JSON, with notes that are computed from the rows.

The best number of a column is bold among the quantized rows. A row that failed keeps its place and says why.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qgen.bench.job import Row
from qgen.bench.pareto import Point, statements
from qgen.show.rows import printable

__all__ = ["as_csv", "as_json", "as_markdown", "notes", "points", "rich_table"]

NARROW = ("bits per weight", "denoiser, MiB", "quantize, s", "time, x 16-bit", "PSNR, dB")
LIMIT = 200  # letters of an error in the table; the JSON has all of it


def points(rows: Sequence[Row]) -> list[Point]:
    """What `qgen.bench.pareto` compares: the rows that ran and are no yardsticks."""
    return [
        Point(row.name, row.peer == "qgen", row.measured["nbytes"], row.scores.per_prompt["psnr"], row.config.act)
        for row in rows
        if not row.error and not row.config.control and "psnr" in row.scores.per_prompt
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines under the table: who is better than whom, the extremes of the other columns, and what peers did to other layers than asked."""
    ran = [row for row in rows if not row.error and not row.config.control]
    lines = statements(points(rows))
    if {row.peer == "qgen" for row in ran} == {True, False}:
        for what, key, say in (
            ("Quickest to quantize", lambda m: m["seconds"], lambda m: f"{m['seconds']:.2f} s"),
            ("Smallest rise of memory", lambda m: m["peak"], lambda m: f"{m['peak'] / 2**20:.0f} MiB"),
            ("Fastest picture", lambda m: m["latency"]["ratio"], lambda m: f"{m['latency']['ratio']:.2f} x 16-bit"),
        ):
            if all(key(row.measured) is not None for row in ran):
                first = min(ran, key=lambda row: key(row.measured))
                mine = min((row for row in ran if row.peer == "qgen"), key=lambda row: key(row.measured))
                other = "" if mine is first else f"; of the recipes {mine.name}, {say(mine.measured)}"
                lines.append(f"{what}: {first.name}, {say(first.measured)}{other}.")
    for row in ran:
        m = row.measured
        if m["left"]:
            lines.append(
                f"{row.name} left {len(m['left'])} of {m['asked']} layers in floats, {m['left'][0]} among them."
            )
        if m["more"]:
            lines.append(
                f"{row.name} also changed {len(m['more'])} layers that were to stay, {m['more'][0]} among them."
            )
    return lines


def as_markdown(rows: Sequence[Row]) -> str:
    """A table in GitHub's Markdown."""
    head, lines = _cells(rows)
    best = _best(rows)
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * (len(head) - 3)]
    for i, line in enumerate(lines):
        marked = [f"**{cell}**" if (i, j) in best and cell else cell for j, cell in enumerate(line)]
        out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in marked) + " |")
    return "\n".join(out)


def rich_table(rows: Sequence[Row]) -> Any:
    """The columns that a narrow terminal has room for; a row that failed says so, and its error stands in the note under the table."""
    from rich.table import Table
    from rich.text import Text

    head, lines = _cells(rows)
    best = _best(rows)
    kept = [j for j, name in enumerate(head) if j < 3 or name in NARROW]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for j in kept:
        grid.add_column(head[j], justify="left" if j < 3 else "right", overflow="fold", no_wrap=j < 3)
    for i, line in enumerate(lines):
        cells = [*line[:3], "failed", *[""] * (len(line) - 4)] if rows[i].error else line
        style = "red" if rows[i].error else ""
        grid.add_row(*(Text(cells[j], style="bold" if (i, j) in best else style) for j in kept))
    return grid


def as_csv(rows: Sequence[Row]) -> str:
    """Numbers in full, one line a row; the columns of a failed row are empty but for its error."""
    stream = io.StringIO()
    out = csv.writer(stream, lineterminator="\n")
    columns = _numbers(rows)
    out.writerow(["peer", "config", "weight_bits", "act_bits", "about", *(name for name, _, _ in columns), "error"])
    for row in rows:
        values = [("" if row.error else _or_empty(read(row))) for _, read, _ in columns]
        c = row.config
        out.writerow([row.peer, c.name, c.weight or "", c.act or "", c.about, *values, row.error])
    return stream.getvalue()


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Everything: conditions, rows with scores and values per prompt, notes."""
    data = {"about": dict(about), "rows": [row.to_dict() for row in rows], "notes": notes(rows)}
    return json.dumps(data, indent=1, ensure_ascii=False)


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def _score(metric: str, part: str = "value") -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        found = next((r for r in row.scores.rows if r.metric == metric), None)
        return None if found is None else getattr(found, part)

    return read


def _numbers(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], Any], Callable[[Row], str]]]:
    """(name, number of a row, how the table says it) of every column of numbers."""
    m = lambda key: lambda row: row.measured[key]  # noqa: E731
    t = lambda key: lambda row: row.measured["latency"][key]  # noqa: E731
    psnr, low, high = (_score("psnr", part) for part in ("value", "low", "high"))
    label = {r.metric: r.label for row in rows if row.scores for r in row.scores.rows}
    found = [
        ("bits per weight", m("bits"), lambda row: f"{row.measured['bits']:.2f}"),
        ("denoiser, MiB", lambda row: row.measured["nbytes"] / 2**20, lambda row: f"{row.measured['nbytes'] / 2**20:.2f}"),
        ("quantize, s", m("seconds"), lambda row: f"{row.measured['seconds']:.1f}"),
        ("memory rise, MiB", lambda row: row.measured["peak"] and row.measured["peak"] / 2**20,
         lambda row: "" if row.measured["peak"] is None else f"{row.measured['peak'] / 2**20:.0f}"),
        ("s per picture", t("second"), lambda row: f"{row.measured['latency']['second']:.2f}"),
        ("time, x 16-bit", t("ratio"), lambda row: "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**row.measured["latency"])),
        ("PSNR, dB", psnr, lambda row: f"{psnr(row):.1f} [{low(row):.1f}, {high(row):.1f}]"),
    ]  # fmt: skip
    for metric, part, digits in (
        ("lpips", "value", 3),
        ("fid", "value", 2),
        ("kid", "value", 2),
        ("clip", "difference", 2),
    ):
        if metric in label:
            read = _score(metric, part)
            name = f"{label[metric]} change" if part == "difference" else label[metric]
            found.append((name, read, lambda row, read=read, digits=digits: f"{read(row):.{digits}f}"))
    return found


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    columns = _numbers(rows)
    head = ["peer", "config", "W x A", *(name for name, _, _ in columns)]
    lines = []
    for row in rows:
        bits = f"W{row.config.weight}A{row.config.act}" if row.config.weight else ""
        first = [row.peer, row.config.name, bits]
        if row.error:
            said = printable(" ".join(row.error.split()), LIMIT)
            lines.append([*first, f"failed: {said}", *[""] * (len(columns) - 1)])
        else:
            lines.append([*first, *(say(row) for _, _, say in columns)])
    return head, lines


def _best(rows: Sequence[Row]) -> set[tuple[int, int]]:
    """(row, column) of the best number of each column among the rows that ran and are no yardsticks."""
    ran = [i for i, row in enumerate(rows) if not row.error and not row.config.control]
    best = set()
    for j, (name, read, say) in enumerate(_numbers(rows), start=3):
        if "change" in name or len(ran) < 2 or any(read(rows[i]) is None for i in ran):
            continue
        pick = max if name.startswith("PSNR") else min
        top = pick(read(rows[i]) for i in ran)
        shown = {say(rows[i]) for i in ran if read(rows[i]) == top}
        best |= {(i, j) for i in ran if say(rows[i]) in shown}
    return best
