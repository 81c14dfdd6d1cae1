"""All commands under one name, and what happens when one fails: a readable line on stderr and exit code 2, or 130 after Ctrl-C.

`--debug` may stand anywhere and shows the traceback instead. Bugs (errors that nobody raised on purpose) always show theirs.
"""

__all__ = ["app", "main"]

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qgen.cli.bench import bench
from qgen.cli.common import DEBUG, TYPED, explain
from qgen.cli.convert import convert
from qgen.cli.demo import demo
from qgen.cli.doctor import doctor
from qgen.cli.evaluate import evaluate
from qgen.cli.export import export
from qgen.cli.finetune import finetune
from qgen.cli.inspect import inspect
from qgen.cli.quantize import quantize
from qgen.cli.recipes import recipes
from qgen.cli.web import web


class Group(TyperGroup):
    """Remembers what was typed, for reports, and explains errors."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = [arg for arg in args if arg != "--debug"]
        debug = ["--debug"] if "--debug" in args else []
        return super().parse_args(ctx, [*debug, *ctx.meta[TYPED]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was changed" + ctx.meta.get("qgen.resume", ""), err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            line = explain(error)
            if line is None or ctx.meta.get(DEBUG):
                raise
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turns a 16-bit vision generator into a 4-bit one. Start with `qgen demo`.",
)
for command in (demo, quantize, finetune, convert, export, evaluate, inspect, recipes, doctor, web):
    app.command("eval" if command is evaluate else command.__name__)(command)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from qgen.show.report import version

        typer.echo(f"qgen {version()}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print qgen's version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    ctx.meta[DEBUG] = debug


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="qgen")
