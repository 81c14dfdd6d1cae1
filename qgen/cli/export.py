"""`qgen export CHECKPOINT --to … --out …`: a quantized checkpoint, qgen's own or a peer's, written as another project reads it."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Quantized: a folder of qgen's (of a pipeline with one quantized model, too), or a peer's file."
        ),
    ],
    to: Annotated[str, typer.Option(help="Who shall read it; a wrong name lists all.")],
    out: Annotated[Path, typer.Option(help="File or folder to write, whole or not at all.")],
    format: Annotated[
        str | None, typer.Option(help="Number format to bring layers into, where the target has several.")
    ] = None,
    keys: Annotated[
        str, typer.Option(help="Names of tensors: original as ComfyUI has them, keep, or auto: what the reader wants.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write over what is at --out.")] = False,
) -> None:
    """Write a quantized checkpoint for other software."""
    from qgen.cli.common import claim_path, exporter_options, note, said, watched
    from qgen.io.convert import export as run

    options = exporter_options(to, format=format)
    claim_path(out, force)
    with watched("export") as progress:
        lines = run(checkpoint, to, out, keys=keys, progress=progress, **options)
    said(lines)
    note(f"wrote {out}")
