"""ComfyUI's progress bar for whatever takes bars as tqdm makes them, with the time that is left at the node; and ComfyUI's interruption.

`Bars()` goes wherever qgen takes `progress`. A bar that is to vanish (`leave=False`) is a step of another one: it shows its text and
listens for the user's stop, and leaves the node's bar alone.
"""

__all__ = ["Bar", "Bars", "stop_if_asked", "tell"]

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

log = logging.getLogger("qgen")


def stop_if_asked() -> None:
    """Raises ComfyUI's own exception if the user has stopped the prompt."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def tell(text: str) -> None:
    """Shows a line at the node that runs, where this ComfyUI can."""
    log.debug(text)
    with contextlib.suppress(ImportError, AttributeError):
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        context = get_executing_context()
        if context is not None and getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(text, context.node_id)


class Bars:
    """Makes bars: `Bars()(iterable, desc=…)` or `with Bars()(total=…, desc=…) as bar: bar.update(1)`."""

    def __call__(
        self, iterable: Iterable | None = None, total: int | None = None, desc: str = "", leave: bool = True, **_: Any
    ):
        return Bar(iterable, total, desc, leave)


class Bar:
    """One bar. It asks for a stop at every step."""

    def __init__(self, iterable: Iterable | None, total: int | None, desc: str, leave: bool = True):
        from comfy.utils import ProgressBar

        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.total, self.desc = iterable, total or 0, desc
        self.done, self.began, self.told = 0, time.monotonic(), 0.0
        self.bar = ProgressBar(self.total) if leave and self.total else None

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            stop_if_asked()
            yield item
            self.update(1)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        tell("")

    def update(self, count: int = 1) -> None:
        stop_if_asked()
        self.done += count
        if self.bar is not None:
            self.bar.update_absolute(min(self.done, self.total), self.total)
        now = time.monotonic()
        if now - self.told > 0.5 or self.done >= self.total:
            self.told = now
            tell(f"{self.desc}: {self._left(now)}" if self.desc else self._left(now))

    def set_postfix(self, *_: Any, **facts: Any) -> None:
        """tqdm's; a node shows no more than its line."""

    set_description = set_postfix_str = set_postfix

    def _left(self, now: float) -> str:
        if not self.total:
            return f"{self.done}"
        seconds = (now - self.began) / max(1, self.done) * max(0, self.total - self.done)
        return f"{self.done}/{self.total}, about {_clock(seconds)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
