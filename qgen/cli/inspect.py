"""`qgen inspect PATH`: format, origin, layers and bits per weight of a quantized checkpoint, qgen's own or a peer's; no model is built."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a quantized pipeline, model or module; or a file of qgen's or any peer's.")
    ],
) -> None:
    """Show per layer what a quantized checkpoint holds, and who wrote it."""
    from rich.console import Console

    from qgen.show.headers import ours, read, read_peer
    from qgen.show.summary import table

    console = Console()
    if checkpoint.is_dir() and ((checkpoint / "model_index.json").is_file() or ours(checkpoint)):
        console.print(table(read(checkpoint), console.width))
        return
    found, lines = read_peer(checkpoint)
    if found:
        console.print(table(found, console.width))
    for line in lines:
        console.print(line, markup=False, highlight=False)
