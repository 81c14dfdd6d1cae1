"""`qgen doctor`: which kernels this machine would run, and why not better ones."""

from typing import Annotated

import typer


def doctor(
    device: Annotated[
        str | None, typer.Option(help="A device such as cpu or cuda:1; default: the first GPU, else the CPU.")
    ] = None,
) -> None:
    """Say which kernels this machine would run, and why not better ones."""
    from qgen import recipes
    from qgen.cli.common import device_of
    from qgen.kernels import doctor as examine

    specs = {name: recipes.get(name).default for name in recipes.names() if name != "auto"}
    pairs = {name: (spec.weight, spec.act or "") for name, spec in specs.items() if spec}
    typer.echo(examine.report(pairs, device=device and device_of(device)))
