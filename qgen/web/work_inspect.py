"""An inspect job, in its own process, for files may be of strangers: what the headers of a quantized checkpoint say. No model is built."""

__all__ = ["inspect"]

from pathlib import Path
from typing import Any

from qgen.errors import QgenError


def inspect(asked: dict[str, Any], folder: Path, device: str, report: Any) -> dict[str, Any]:
    """{"rows", "totals", "notes"}; QgenError for what is no quantized checkpoint."""
    from qgen.show.headers import read, read_peer

    path = Path(asked["checkpoint"])
    report.step(f"reading {path.name}")
    notes: list[str] = []
    try:
        found = read(path) if path.is_dir() else None
    except QgenError:
        found = None  # not qgen's own; perhaps a peer's
    if found is None:
        found, notes = read_peer(path)
    return {"rows": list(found), "totals": found.totals, "notes": notes, "heat": None}
