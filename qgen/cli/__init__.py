"""The command line, `qgen` or `python -m qgen`: one file per command; `app` knows them all and turns errors into one line."""

from qgen.cli.app import app, main

__all__ = ["app", "main"]
