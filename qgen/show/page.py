"""The shell of a report: escaping, tables, sections, and one style sheet for screens of any width, dark mode and paper.

Every function takes plain text and returns markup; only `Markup` passes unescaped. Links, scripts and outside resources do not occur, and
a Content-Security-Policy forbids them, so that not even a mistake here could load something.
"""

__all__ = ["Markup", "page", "section", "table", "tag"]

import html
from collections.abc import Iterable, Sequence
from typing import Any

from qgen.show.rows import printable


class Markup(str):
    """Text that is markup already."""


def esc(value: Any) -> Markup:
    """Markup for any value: itself if it is markup, else its text, escaped and without control characters."""
    if isinstance(value, Markup):
        return value
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(value))
    return Markup(html.escape(text, quote=True))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """<name …>content</name>; content and attributes are escaped. `class_` stands for class; None leaves an attribute out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{esc(value)}"' for key, value in attributes.items() if value is not None
    )
    inner = "".join(esc(c) for c in content)
    return Markup(f"<{name}{said}>" if name in ("img", "meta", "col") else f"<{name}{said}>{inner}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    return Markup("".join(esc(part) for part in parts))


def section(title: str, *content: Any, about: Any = "") -> Markup:
    """A section with a heading and, under it, a sentence that says how to read it. Empty content gives nothing."""
    if not any(content):
        return Markup("")
    return tag("section", tag("h2", title), tag("p", about, class_="about") if about else Markup(""), *content)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> Markup:
    """A table that becomes a list of labelled lines on narrow screens. numbers: columns set flush right."""
    wide = set(numbers)
    kinds = ["n" if i in wide else None for i in range(len(head))]
    top = tag("tr", *(tag("th", name, class_=kind, scope="col") for name, kind in zip(head, kinds, strict=True)))
    body = []
    for row in rows:
        cells = zip(row, head, kinds, strict=True)
        body.append(tag("tr", *(tag("td", cell, class_=kind, data_label=name) for cell, name, kind in cells)))
    return tag("table", tag("thead", top), tag("tbody", *body))


def page(title: str, parts: Iterable[Markup]) -> str:
    """The whole document."""
    name = printable(title)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = join(
        [
            tag("meta", charset="utf-8"),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{name} - qgen report"),
            Markup(f"<style>{STYLE}</style>"),
        ]
    )
    top = tag("header", tag("p", "qgen report", class_="kicker"), tag("h1", name))
    body = tag("main", top, *parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


STYLE = """
:root{--paper:#fff;--ink:#18181b;--soft:#5b5b66;--line:#e2e2e8;--card:#f6f6f9;--held:#2563c9;--fit:#9dbcf0;--weight:#8b8b96;--warn:#b42318}
@media (prefers-color-scheme:dark){:root{--paper:#131316;--ink:#ececf1;--soft:#a3a3b0;--line:#2e2e36;--card:#1d1d22;--held:#6ea3ff;
--fit:#35517f;--weight:#77778a;--warn:#ff8a7a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
.kicker{margin:0;color:var(--soft);font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{margin:2px 0 20px;font-size:28px;line-height:1.2;overflow-wrap:anywhere}
h2{margin:44px 0 6px;font-size:19px}
h3{margin:20px 0 4px;font-size:15px}
.about{margin:0 0 14px;color:var(--soft);max-width:80ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-size:14px}
th{padding:6px 10px 6px 0;text-align:left;color:var(--soft);font-weight:600;font-size:13px;border-bottom:1px solid var(--line)}
td{padding:7px 10px 7px 0;vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th.n+th:not(.n),td.n+td:not(.n){padding-left:16px}
th:last-child,td:last-child{padding-right:0}
.small{display:block;color:var(--soft);font-size:12.5px}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre,.path{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:13px}
pre{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:10px;
white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;padding:8px 0;color:var(--held);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 8px;color:var(--soft);font-size:13px}
.key{display:inline-block;width:22px;height:9px;margin-right:7px;border-radius:2px}
.layers{border-top:1px solid var(--line)}
.layer{display:grid;grid-template-columns:minmax(230px,31%) 1fr 172px;gap:2px 18px;padding:9px 0;border-bottom:1px solid var(--line);
break-inside:avoid}
.layer .path{overflow-wrap:anywhere;font-weight:600}
.facts{grid-column:1/-1;color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
.bars{align-self:center}
.bar{height:9px;margin:2px 0;border-radius:2px;min-width:2px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.held{background:var(--held)}.fit{background:var(--fit)}.weight{background:var(--weight)}
.db{text-align:right;font-variant-numeric:tabular-nums}
.db b{font-size:15px}.db span{color:var(--soft);font-size:12.5px}
.warn{color:var(--warn);font-weight:600}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:20px}
figure{margin:0;break-inside:avoid}
figure div{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}
figure span{display:block;color:var(--soft);font-size:12px}
figcaption{font-weight:600;margin-bottom:3px;overflow-wrap:anywhere}
img{width:100%;display:block;image-rendering:pixelated;border:1px solid var(--line);border-radius:4px;background:#fff}
@media (max-width:700px){
main{padding:20px 16px 40px}h1{font-size:22px}.tiles{grid-template-columns:1fr 1fr}.tile b{font-size:20px}.tile{padding:11px 12px}
.pairs{grid-template-columns:1fr}
.layer{grid-template-columns:1fr auto}.layer .path{grid-column:1/-1}
thead{display:none}table,tbody,tr,td{display:block}tr{padding:8px 0;border-bottom:1px solid var(--line)}
td,td.n{display:flex;gap:14px;justify-content:space-between;padding:2px 0;border:0;text-align:right;white-space:normal}
td:empty{display:none}td.n+td:not(.n){padding-left:0}
td::before{content:attr(data-label);flex:none;color:var(--soft);text-align:left}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--card:#fff;--held:#2563c9;--fit:#9dbcf0;--weight:#777;--warn:#900}
main{max-width:none;padding:0}summary{list-style:none}details::details-content{display:block;content-visibility:visible;block-size:auto}}
"""
