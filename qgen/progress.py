"""Progress bars with an ETA, or nothing: `bars(True)(iterable, desc=...)` as tqdm takes it."""

__all__ = ["bars"]

from collections.abc import Callable
from functools import partial


def bars(show: bool | Callable) -> Callable:
    """A factory of tqdm bars; disabled ones cost nothing. A factory of other bars, such as a window's, is taken as it is."""
    if callable(show):
        return show
    from tqdm.auto import tqdm

    return partial(tqdm, disable=not show, dynamic_ncols=True)
