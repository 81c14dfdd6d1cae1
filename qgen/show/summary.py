"""`qgen.summary(pipe)`: prints a table of layers with the totals under it, and returns the rows."""

__all__ = ["bits", "mib", "summary", "table"]

from typing import Any

from qgen.show.attention import attention_lines
from qgen.show.rows import Summary, gather, printable


def summary(x: Any) -> Summary:
    """Prints one line per layer and the totals of a quantized pipeline (all its denoisers) or module, and returns them as `Summary`.

    NotQuantizable if nothing in x is quantized.
    """
    from rich.console import Console

    found = gather(x)
    console = Console()
    console.print(table(found, console.width))
    return found


def table(found: Summary, width: int = 160) -> Any:
    """A rich renderable: the table of layers and the totals. Below 120 columns, reasons are listed under the table instead of in it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, header_style="bold", pad_edge=False)
    numbers, wide = ("N x K", "SQNR dB", "KiB", "16-bit"), width >= 120
    for name in ("layer", "N x K", "spec", "kernel", "SQNR dB", "KiB", "16-bit", *(("why",) if wide else ())):
        grid.add_column(name, justify="right" if name in numbers else "left", overflow="fold", no_wrap=name in numbers)
    several = len({row["denoiser"] for row in found}) > 1
    for row in found:
        path = f"{row['denoiser']}.{row['path']}" if several else row["path"]
        sizes = (f"{row['nbytes'] / 1024:.1f}", f"{row['bytes16'] / 1024:.1f}")
        why = (row["why"],) if wide else ()
        cells = (path, " x ".join(map(str, row["shape"])), row["spec"], row["kernel"], quality(row), *sizes, *why)
        grid.add_row(*(Text(cell) for cell in cells), style="dim" if row["spec"] == "float" else "")
    lines = [Text(line) for line in [*total_lines(found.totals), *attention_lines(found.attention)]]
    if not wide:
        reasons = {(row["spec"], row["why"]): None for row in found if row["why"] not in ("", "default")}
        lines += [Text(f"{spec}: {why}", style="dim") for spec, why in reasons]
    if any(row["sqnr_db"] is None and row["weight_sqnr_db"] is not None for row in found):
        lines.append(Text("w: error of the weights alone; nobody measured this layer's output", style="dim"))
    return Group(grid, Text(""), *lines)


def quality(row: dict) -> str:
    """Held-out SQNR as text; "w 19.3" where only the weights' error is known, "" where nothing is."""
    if row["sqnr_db"] is not None:
        return f"{row['sqnr_db']:.1f}"
    return "" if row["weight_sqnr_db"] is None else f"w {row['weight_sqnr_db']:.1f}"


def total_lines(t: dict) -> list[str]:
    """Totals in words, one fact a line."""
    size = f"{t['quantized']} of {t['layers']} layers quantized: {mib(t['bytes16'])} at 16 bits -> {mib(t['nbytes'])}"
    lines = [f"{size} ({t['ratio']:.2f} x smaller), {bits(t)}"]
    lines += [
        f"output of {printable(name)}: {db:.1f} dB SQNR on held-out calls" for name, db in t["output_sqnr_db"].items()
    ]
    return lines


def bits(t: dict) -> str:
    """Bits per quantized weight as text; the share of the low-rank branch apart, for it is large in small layers only."""
    own = t["bits_per_weight"] - t["lowrank_bits"]
    branch = f" + {t['lowrank_bits']:.2f} of the low-rank branch" if t["lowrank_bits"] else ""
    return f"{own:.2f} bits per quantized weight{branch}"


def mib(nbytes: float) -> str:
    """Bytes as text with a fitting binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
