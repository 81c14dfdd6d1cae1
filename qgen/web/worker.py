"""The process of a heavy job: reads what was asked, does it, and says how it goes, one JSON object a line (see `child`).

Progress bars of the whole library are turned into such lines: `Meter` takes the place of tqdm's class, in this process only. What anybody
prints goes to standard error, so that the lines stay clean.
"""

__all__ = ["Reporter", "command", "work"]

import contextlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qgen.web.errors import plain


class Reporter:
    """What a job says to the server. Safe to use from several threads."""

    def __init__(self, stream: Any):
        self._stream, self._lock, self._last = stream, threading.Lock(), 0.0

    def step(self, doing: str, done: float = 0, total: float = 0) -> None:
        self._write(step=[doing, done, total])

    def say(self, line: str) -> None:
        self._write(say=line)

    def show(self, **live: Any) -> None:
        self._write(show=live)

    def end(self, **how: Any) -> None:
        self._write(**how)

    def progress(self, doing: str, done: float, total: float) -> None:
        """As `step`, at most ten times a second, and always the last."""
        now = time.monotonic()
        if now - self._last > 0.1 or done >= total:
            self._last = now
            self.step(doing, done, total)

    def _write(self, **said: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(said, ensure_ascii=True, default=str) + "\n")
            self._stream.flush()


def command(device: str) -> tuple[str, ...]:
    """What starts a worker; the job's folder is to follow."""
    return sys.executable, "-c", f"import sys; from qgen.web.worker import work; work(sys.argv[1], {device!r})"


def work(folder: str, device: str = "auto") -> None:
    """Runs the job of a folder and leaves the process with code 0, also after an error that was told in words."""
    stream = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    report = Reporter(stream)
    try:
        asked = json.loads((Path(folder) / "asked.json").read_text(encoding="utf-8"))
        report.step("importing torch and diffusers")
        _listen(report)
        report.end(result=_task(asked)(asked, Path(folder), device, report))
    except Exception as error:
        report.end(error=plain(error))


def _task(asked: dict[str, Any]) -> Any:
    if "metrics" in asked:
        from qgen.web.work_evaluate import evaluate

        return evaluate
    if "recipe" in asked:
        from qgen.web.work_quantize import quantize

        return quantize
    from qgen.web.work_inspect import inspect

    return inspect


def _leave_with_the_server() -> None:
    """The server holds the other end of standard input; when it is gone, nobody waits for this job any more."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the process ends
            pass
    os._exit(3)


def _listen(report: Reporter) -> None:
    """Progress bars and warnings of the library, as lines."""
    import tqdm
    import tqdm.auto
    from tqdm.std import tqdm as original

    class Meter(original):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs["file"] = open(os.devnull, "w")  # noqa: SIM115 (as long as the bar)
            super().__init__(*args, **kwargs)

        def display(self, *_: Any, **__: Any) -> None:
            if not self.disable:
                rest = self.total - self.n if self.total else 0
                left = rest / self.format_dict["rate"] if rest and self.format_dict["rate"] else None
                words = f"{self.desc.rstrip(': ') or 'working'}" + (f", {left:.0f} s left" if left else "")
                report.progress(words, self.n, self.total or 0)

    tqdm.tqdm = tqdm.auto.tqdm = Meter

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report.say(record.getMessage()[:500])

    logger = logging.getLogger("qgen")
    logger.addHandler(Lines(logging.INFO))
    logger.setLevel(logging.INFO)
