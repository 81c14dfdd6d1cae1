"""`qgen recipes [NAME]`: what there is to choose from, or one recipe as JSON."""

from typing import Annotated

import typer


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe's JSON, to save, change and pass to --recipe.")
    ] = None,
) -> None:
    """List the named recipes, or print one as JSON."""
    from rich.console import Console
    from rich.table import Table

    from qgen import recipes as known

    if name is not None:
        typer.echo(known.get(name).to_json())
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe", "weights x activations", "about"):
        grid.add_column(column, overflow="fold")
    for label in known.names():
        recipe = known.get(label)
        about = "picks for the device: NVFP4 where tensor cores run it, else W4A8" if label == "auto" else recipe.about
        grid.add_row(label, "" if label == "auto" else str(recipe.default), about)
    Console().print(grid)
