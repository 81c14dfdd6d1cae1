"""What became of each attention, for `qgen.summary`: which numbers serve it, or why it stays as it is.

Rows come from the report, which a stranger may have written: texts are cleaned, and only owners that the model really has rerouted now
count as served.
"""

__all__ = ["attention_lines", "attention_rows"]

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qgen.show import rows as clean


def attention_rows(denoisers: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """One row per attention that was looked at: denoiser, path, spec ("float" = as it is), kernel, why, sqnr_db (worst call, or None)."""
    made = []
    for name, module in denoisers.items():
        choices = getattr(module, "qgen_attention", None)
        if choices is None:
            continue
        report = [row for row in getattr(module, "qgen_report", None) or () if isinstance(row, dict)]
        known = {
            row["path"]: row for row in report if row.get("kind") == "attention" and isinstance(row.get("path"), str)
        }
        for path in [*choices.layers, *(path for path in known if path not in choices.layers)]:
            row = known.get(path, {})
            told = clean.printable(row.get("why", ""))
            specs = ", ".join(spec or "16-bit" for spec in dict.fromkeys(choices.layers.get(path, ("float",))))
            served = path in choices.layers
            made.append(
                {
                    "denoiser": clean.printable(name),
                    "path": clean.printable(path),
                    "spec": clean.printable(row["spec"]) if served and row.get("spec") else specs,
                    "kernel": clean.printable(row.get("kernel", "")) if served else "",
                    "why": told,
                    "sqnr_db": clean.number(row.get("sqnr_db")) if served else None,
                }
            )
    return made


def attention_lines(found: Iterable[dict[str, Any]]) -> list[str]:
    """One line for all of them, and one for each that stays as it is."""
    found = list(found)
    if not found:
        return []
    served = [row for row in found if row["spec"] != "float"]
    lines = [f"attention: {len(served)} of {len(found)} in low bits"]
    for spec in dict.fromkeys(row["spec"] for row in served):
        mine = [row for row in served if row["spec"] == spec]
        worst = min((row["sqnr_db"] for row in mine if row["sqnr_db"] is not None), default=None)
        lines.append(f"  {len(mine)} x {spec}" + ("" if worst is None else f", worst call {worst:.1f} dB"))
    lines += [f"  untouched: {row['path'] or row['denoiser']}: {row['why']}" for row in found if row["spec"] == "float"]
    return lines
