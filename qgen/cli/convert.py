"""`qgen convert FILE --recipe … --out …`: a file of 16-bit weights to a quantized one, tensor by tensor; no model is loaded."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file in ComfyUI's, the original or diffusers' layout, a GGUF file, or a model's folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File or folder to write, whole or not at all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="One that needs no calibration: rtn-int4, rtn-nvfp4, rtn-w4a16, fp8; or a recipe's .json file."
        ),
    ] = "rtn-w4a16",
    to: Annotated[str, typer.Option(help="Who shall read it; a wrong name lists all.")] = "qgen",
    config: Annotated[
        Path | None,
        typer.Option(help="config.json (or its folder) of the model in diffusers, where the file does not tell it."),
    ] = None,
    keys: Annotated[
        str, typer.Option(help="Names of tensors: diffusers, original, keep, or auto: what the reader wants.")
    ] = "auto",
    format: Annotated[
        str | None, typer.Option(help="Number format to bring layers into, where the target has several.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Keep layers whose path matches this glob in float; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is at --out.")] = False,
) -> None:
    """Quantize a single file without loading its model."""
    from qgen.cli.common import claim_path, exporter_options, note, read_recipe, said, watched
    from qgen.io.convert import convert as run

    options = exporter_options(to, format=format)
    chosen = read_recipe(recipe, "cpu")
    claim_path(out, force)
    with watched("convert") as progress:
        lines = run(
            file, chosen, out, to, config=config, keys=keys, skip=tuple(skip or ()), progress=progress, **options
        )
    said(lines)
    note(f"wrote {out}")
