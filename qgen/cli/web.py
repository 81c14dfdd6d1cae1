"""`qgen web`: the page on which somebody draws at 16 and at 4 bits side by side, quantizes, evaluates and inspects.

Only this computer reaches the page unless --listen, --host or --share is given. Visitors then reach the folders given by --root and no
others.
"""

__all__ = ["web"]

import os
from pathlib import Path
from typing import Annotated

import typer

AUTH = "QGEN_WEB_AUTH"  # user:password, where other users may read the list of processes
_LOCAL = ("127.0.0.1", "localhost", "::1")


def web(
    host: Annotated[str | None, typer.Option(help="Address to listen at; default: this computer alone.")] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Let other computers in: the same as --host 0.0.0.0.")
    ] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Ask Gradio's servers for a public address (needs network).")
    ] = False,
    auth: Annotated[
        list[str] | None, typer.Option(help=f"user:password that may enter; repeatable. Or the environment's {AUTH}.")
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that path fields may reach; repeatable. Default: the current one, if only this computer is let in."
        ),
    ] = None,
    hub: Annotated[
        bool | None,
        typer.Option(
            "--hub/--no-hub",
            help="Whether models may be fetched from the hub. Default: if only this computer is let in.",
        ),
    ] = None,
    work_folder: Annotated[
        Path | None, typer.Option("--work", help="For jobs and results; default: qgen/web in the user's cache.")
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Drawings that may wait in the queue of one model.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Open a page in the browser: 16 and 4 bits side by side, quantize, evaluate, inspect."""
    from qgen.cli.common import note
    from qgen.web.app import Settings, serve, stop

    where = host or ("0.0.0.0" if listen else _LOCAL[0])
    private = where in _LOCAL and not share
    roots = tuple(root) if root else (Path.cwd(),) if private else ()
    settings = Settings(work_folder or cache(), roots, private if hub is None else hub, (waiting, 8), device=device)
    users = pairs([*(auth or []), *filter(None, [os.environ.get(AUTH)])])
    note("loading the shipped model")
    page, desk, address = serve(settings, host=where, port=port, share=share, auth=users, block=False)
    note(f"path fields reach: {desk.roots.said()}")
    if not private and not users:
        note("anybody who reaches this address may use the page; --auth user:password asks for a password")
    typer.echo(f"open {page.share_url or address}   (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        stop(page, desk)


def pairs(texts: list[str]) -> list[tuple[str, str]] | None:
    """(user, password) of each user:password; None for none. ValueError, which does not repeat what was typed, for anything else."""
    found = [text.partition(":")[::2] for text in texts]
    if not all(user and password for user, password in found):
        raise ValueError("--auth wants user:password, with something on both sides of the colon")
    return [(user, password) for user, password in found] or None


def cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgen" / "web"
