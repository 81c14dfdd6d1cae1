"""A heavy job in a process of its own: the page stays quick, and whatever kills the process kills nothing else.

The child writes one JSON object a line to its standard output: {"step": [text, done, total]}, {"say": line}, {"show": {…}}, and at the end
{"result": {…}} or {"error": sentence}. Its standard input is a pipe from the server that is never written to: when it closes, because the
server is gone, the child ends itself.
"""

__all__ = ["run_in_child"]

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qgen.errors import QgenError
from qgen.web.jobs import Cancelled, Job

_PATIENCE = 3.0  # seconds between asking a process to end and ending it


def run_in_child(job: Job, command: list[str]) -> None:
    """Runs `command` and the job's folder as last argument, and passes on what it says; QgenError if it fails or is killed."""
    (job.folder / "asked.json").write_text(json.dumps(job.asked, ensure_ascii=False), encoding="utf-8")
    job.step("starting a worker process")
    # The working folder holds nothing that a hub id could be mistaken for; qgen itself is found as the server found it.
    path = os.pathsep.join(
        [*filter(None, (str(Path(p).resolve()) for p in sys.path if p)), os.environ.get("PYTHONPATH", "")]
    )
    with open(job.folder / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen(
            [*command, str(job.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=job.folder,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
    job.show(pid=process.pid)
    stopper = threading.Thread(target=_stop_when_told, args=(job, process), daemon=True)
    stopper.start()
    ending: dict[str, Any] = {}
    try:
        for line in process.stdout:
            ending |= _heed(job, line)
        code = process.wait()
    finally:
        _end(process)
        stopper.join()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
    if job.stop.is_set():
        raise Cancelled
    if "error" in ending:
        raise QgenError(ending["error"])
    if code != 0 or "result" not in ending:
        raise QgenError(_why(code, job.folder / "stderr.txt"))
    job.result = ending["result"]


def _heed(job: Job, line: bytes) -> dict[str, Any]:
    """Passes one line on; returns what it says about the end."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    with contextlib.suppress(Cancelled):  # the stopper sees to the process
        if "step" in said:
            job.step(*said["step"])
        if "say" in said:
            job.say(said["say"])
        if "show" in said:
            job.show(**said["show"])
    return {key: said[key] for key in ("result", "error") if key in said}


def _stop_when_told(job: Job, process: subprocess.Popen) -> None:
    while process.poll() is None:
        if job.stop.wait(0.1):
            _end(process)
            return


def _end(process: subprocess.Popen) -> None:
    """Ends a process and everything that it started."""
    for sign in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign) if hasattr(os, "killpg") else process.kill()
        until = time.monotonic() + _PATIENCE
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)


def _why(code: int, stderr: Path) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        return (
            f"The worker process was killed (signal {-code}, {name}). Often the computer ran out of memory: fewer or smaller calibration "
            "prompts may fit. The page itself goes on working."
        )
    last = stderr.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"The worker process ended with code {code}: {last[0][:300] if last else 'it said nothing'}"
