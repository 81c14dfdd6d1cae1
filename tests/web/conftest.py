"""Pages that are served for tests, with a worker that is a few lines written by the test, or the real one."""

import contextlib
import dataclasses
import os
import sys

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: install qgen-diffusion[gradio]")

ENV = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR")


PRELUDE = """
import json, os, sys, time
folder = sys.argv[1]
def say(**line):
    print(json.dumps(line), flush=True)
"""


class Script:
    """A worker that is a few lines; `folder`, `say(**line)`, json, os, sys and time are at hand."""

    def __init__(self, path):
        self.path = path
        self.command = (sys.executable, str(path))

    def write(self, lines):
        self.path.write_text(PRELUDE + lines, encoding="utf-8")
        return self.command


@pytest.fixture
def script(tmp_path):
    """A function: the command of a worker that runs these lines."""
    return Script(tmp_path / "worker.py").write


@pytest.fixture(scope="session")
def serve_page():
    """A context manager: (desk, address, script) of a page with these settings. Its heavy jobs run the script, or the real worker."""
    return _served


@contextlib.contextmanager
def _served(settings, real=False, **options):
    from qgen.web.app import serve, stop

    settings.work.mkdir(parents=True, exist_ok=True)
    script = Script(settings.work / "worker.py")
    script.write("say(error='nothing was to be done')\n")
    settings = dataclasses.replace(settings, device="cpu", worker=() if real else script.command)
    before = {name: os.environ.get(name) for name in ENV}
    os.environ.pop("GRADIO_TEMP_DIR", None)
    page, desk, address = serve(settings, block=False, **options)
    desk.page = page
    try:
        yield desk, address, script
    finally:
        stop(page, desk)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
