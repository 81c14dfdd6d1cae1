"""Errors as visitors read them: one plain sentence, never a traceback. What nobody raised on purpose goes to the log, whole."""

__all__ = ["checked", "plain", "told", "whole"]

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from qgen.errors import QgenError

log = logging.getLogger("qgen")

LONGEST_PROMPT = 2000
_LONGEST_LINE = 700


def plain(error: BaseException) -> str:
    """A sentence for any error; bugs are logged with their traceback and named by their class alone."""
    if isinstance(error, ModuleNotFoundError):
        return f"The package {error.name} is missing on the server. Install it with: pip install 'qgen-diffusion[all]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "The server ran out of memory. A smaller size, fewer steps or fewer prompts may fit."
    if isinstance(error, (QgenError, ValueError, OSError)) and str(error):
        return one_line(str(error))
    log.error("unexpected error", exc_info=error)
    return f"Something broke on the server ({type(error).__name__}); its log has the details."


def one_line(text: str) -> str:
    """Printable, of bounded length, with a capital first letter."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 1] + "…"
    return text[:1].upper() + text[1:]


def checked(prompt: Any) -> str:
    """A prompt that is fit to be drawn; ValueError for an empty or an endless one. Any language and emoji are fine."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("write a prompt first, for example: noto owl")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are read")
    return "".join(c for c in prompt.strip() if c.isprintable() or c in "\n\u200d\u200e\u200f").replace("\n", " ")


def whole(value: Any, low: int, high: int, what: str) -> int:
    """A whole number between two bounds; ValueError that names the field otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or int(value) != value:
        raise ValueError(f"{what} must be a whole number from {low} to {high}, found {str(value)[:40]!r}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be from {low} to {high}, found {int(value)}")
    return int(value)


def told(handler: Callable) -> Callable:
    """A handler of the page whose errors become toasts; an async generator stays one."""

    def toast(error: Exception) -> Exception:
        import gradio as gr

        said = isinstance(error, gr.Error)
        return error if said else gr.Error(plain(error), duration=12, print_exception=False, title="That did not work")

    @functools.wraps(handler)
    async def stream(*args: Any) -> Any:
        try:
            async for value in handler(*args):
                yield value
        except Exception as error:
            raise toast(error) from error

    @functools.wraps(handler)
    def once(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise toast(error) from error

    return stream if inspect.isasyncgenfunction(handler) else once
