"""The page of `qgen web` from a source checkout: `python demos/app.py`, with the same options (`--help`)."""

import sys

from qgen.cli import app

if __name__ == "__main__":
    app(["web", *sys.argv[1:]], prog_name="python demos/app.py")
