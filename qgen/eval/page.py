"""report.html of an evaluation: pictures, tables, plots, environment and the commands to do it again, in one file.

Nothing is loaded from anywhere: pictures are data URIs, plots are SVG, and a Content-Security-Policy forbids the rest. Prompts
are untrusted and may be long or written from right to left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgen.errors import QgenError
from qgen.eval.plots import strip
from qgen.eval.scores import Score, Scores, same_network
from qgen.show import page as html
from qgen.show import sections
from qgen.show.page import Markup, section, table, tag
from qgen.show.report import environment
from qgen.show.rows import gather, printable

__all__ = ["clipped", "evaluation_report"]

LONGEST = 160  # characters of a prompt that are shown


def evaluation_report(
    path: str | Path,
    scores: Scores | Mapping[str, Scores],
    *,
    pictures: Sequence[tuple[str, Any, Any]] = (),
    commands: Sequence[str] = (),
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
    model: Any = None,
) -> Path:
    """Writes the page and returns its path; missing folders are made.

    Arguments:
        scores: of one model, or of several by name. pictures: (prompt, reference's, model's), each (H, W, 3).
        commands: what was typed. about: more facts for the table of conditions, such as the prompt set and its licence.
        model: a quantized pipeline, whose layers are then listed too.

    Raises ValueError, before anything is written, if a metric was measured by different networks.
    """
    named = {"": scores} if isinstance(scores, Scores) else dict(scores)
    _check(named)
    first = next(iter(named.values()))
    facts = {**(about or {}), **{name: str(value) for name, value in first.settings.items() if value is not None}}
    layers = () if model is None else gather(model)
    parts = [
        sections.tiles(layers) if len(layers) else Markup(""),
        _pictures(pictures),
        _tables(named),
        _plots(named),
        section("Conditions", table(("what", "value"), facts.items()) if facts else Markup("")),
        sections.layers(layers) if len(layers) else Markup(""),
        sections.formats(layers) if len(layers) else Markup(""),
        sections.environment(environment()),
        sections.reproduce({}, list(commands)),
        _prompts(first.prompts),
    ]
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html.page(title, parts), encoding="utf-8")
    except OSError as error:
        raise QgenError(f"could not write {path}: {error}") from error
    return path


def clipped(prompt: str) -> str:
    """A prompt on one line, cut off with an ellipsis where it is long, without control characters."""
    return printable(" ".join(prompt[: 4 * LONGEST].split()), LONGEST)


def _check(named: Mapping[str, Scores]) -> None:
    seen: dict[str, Score] = {}
    for found in named.values():
        for row in found.rows:
            same_network(seen.setdefault(row.metric, row), row)


def _pictures(pairs: Sequence[tuple[str, Any, Any]]) -> Markup:
    return sections.pictures([(clipped(caption), before, after) for caption, before, after in pairs])


def _tables(named: Mapping[str, Scores]) -> Markup:
    """One table per model; columns without any entry are left out."""
    made = []
    for name, found in named.items():
        rows = [_cells(row) for row in found.rows]
        head = ("metric", "value", "reference", "difference", "samples", "network and hash", "note")
        kept = [i for i in range(len(head)) if i < 2 or any(cells[i] for cells in rows)]
        numbers = [k for k, i in enumerate(kept) if i in (1, 2, 3, 4)]
        body = table([head[i] for i in kept], [[cells[i] for i in kept] for cells in rows], numbers)
        made += [tag("h3", name) if name else Markup(""), body]
    about = (
        "Mean over samples, and under it the 95 % bootstrap interval. The difference is model minus reference on the same prompts, for "
        "Fréchet distances value minus chance; an interval that leaves out zero is a real difference. Values in brackets rest on too "
        "few samples. Numbers by different networks are never comparable."
    )
    return section("Scores", *made, about=about)


def _cells(row: Score) -> tuple[Any, ...]:
    unit = f" ({row.unit})" if row.unit else ""
    value = tag(
        "b", f"({row.value:.4g})" if row.flagged else f"{row.value:.4g}", class_="warn" if row.flagged else None
    )
    change: Any = ""
    if row.difference is not None:
        change = tag("div", f"{row.difference:+.3g}", _span(row.difference_low, row.difference_high))
    network = tag("div", row.extractor, tag("span", row.digest, class_="small")) if row.extractor else ""
    label = tag("div", f"{row.label}{unit}", tag("span", f"{row.better} is better", class_="small"))
    reference = "" if row.reference is None else f"{row.reference:.4g}"
    return label, tag("div", value, _span(row.low, row.high)), reference, change, row.n, network, row.note


def _span(low: float | None, high: float | None) -> Markup:
    return Markup("") if low is None or high is None else tag("span", f"{low:.4g} to {high:.4g}", class_="small")


def _plots(named: Mapping[str, Scores]) -> Markup:
    rows = {row.metric: row for found in named.values() for row in found.rows}
    drawn = []
    for metric, row in rows.items():
        values = {name: found.per_prompt[metric] for name, found in named.items() if metric in found.per_prompt}
        plot = strip(values) if values else Markup("")
        if plot:
            drawn.append(
                tag(
                    "figure",
                    tag("figcaption", f"{row.label}{f' ({row.unit})' if row.unit else ''}, {row.better} is better"),
                    plot,
                )
            )
    about = "Each dot is one sample; above the dots the mean (dark) and its 95 % interval."
    return section("Sample by sample", *drawn, about=about)


def _prompts(prompts: Sequence[str]) -> Markup:
    if not prompts:
        return Markup("")
    items = [tag("li", clipped(prompt), dir="auto") for prompt in prompts]
    return section("Prompts", tag("details", tag("summary", f"{len(prompts)} prompts"), tag("ol", *items)))
