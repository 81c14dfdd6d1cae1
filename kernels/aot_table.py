"""Two tables in plain text or Markdown: what kernels compiled to, and what their loops mean for a whole layer."""

__all__ = ["layers_table", "rows_table", "table"]

from collections.abc import Iterable, Sequence

from qgen.kernels.aot_check import Row
from qgen.kernels.aot_layer import LayerShare


def rows_table(rows: Iterable[Row], markdown: bool = False) -> str:
    """One line per (kernel, target). "tensor": the share of the loop that tensor cores can work, and what limits it."""
    head = ("kernel", "target", "matrix instructions", "loop", "tensor", "regs", "spill B", "smem KiB", "")
    body = [
        (
            row.name,
            row.target,
            row.mma,
            row.loop or "",
            "" if row.share is None else f"{row.share:.0%}" + ("" if row.limit == "tensor" else f" {row.limit}"),
            row.registers or "",
            row.spills if row.instructions else "",
            f"{row.shared / 1024:.1f}" if row.instructions else "",
            "FAILED" if row.problems else row.note,
        )
        for row in rows
    ]
    return table(head, body, markdown)


def layers_table(layers: Iterable[LayerShare], markdown: bool = False) -> str:
    """One line per (kernel, card)."""
    head = ("kernel", "card", "share of peak", "in the loop", "limit", "waves filled", "outside the loop")
    body = [
        (x.name, x.card, f"{x.share:.0%}", f"{x.loop:.0%}", x.limit, f"{x.waves:.0%}", f"{x.outside:.0%}")
        for x in layers
    ]
    return table(head, body, markdown)


def table(head: Sequence[str], body: Iterable[Sequence[object]], markdown: bool = False) -> str:
    """Aligned columns; numbers to the right."""
    rows = [[str(cell) for cell in row] for row in body]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows) and rows != [] for i in range(len(head))]
    right = [r and any(row[i] for row in rows) and "instructions" not in head[i] for i, r in enumerate(right)]

    def line(cells: Sequence[str]) -> str:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip()

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), line(rule) if markdown else line(["-" * w for w in widths]), *map(line, rows)])
