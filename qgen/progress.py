"""Progress bars with an ETA, or nothing: `bars(True)(iterable, desc=...)` as tqdm takes it."""

__all__ = ["bars", "quiet"]

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any


def bars(show: bool | Callable) -> Callable:
    """A factory of tqdm bars; disabled ones cost nothing. A factory of other bars, such as a window's, is taken as it is."""
    if callable(show):
        return show
    from tqdm.auto import tqdm

    return partial(tqdm, disable=not show, dynamic_ncols=True)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Silences a pipeline's own progress bar meanwhile: one bar over prompts says more than one per batch."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
