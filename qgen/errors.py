"""What can go wrong, by name.

`ValueError` is for what the user passed and `TypeError` for what the programmer passed; the children of `QgenError` are for what
the computer, a file or the data lack. Every message says what was wanted, what was found and what to do.
"""

__all__ = ["BadCheckpoint", "BadData", "NoKernel", "NotQuantizable", "QgenError", "unknown"]

import difflib
from collections.abc import Iterable


class QgenError(Exception):
    """Base of all errors that qgen raises on purpose."""


class NoKernel(QgenError):
    """No kernel serves a request on this device; the message lists every candidate with its reason."""


class NotQuantizable(QgenError, ValueError):
    """The object has nothing to quantize, or is quantized already."""


class BadData(QgenError, ValueError):
    """Weights or recorded activations hold NaN or infinity, or do not fit together."""


class BadCheckpoint(QgenError, ValueError):
    """A file is truncated, tampered with, or belongs to another architecture."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for an unknown name: the nearest known one first, then all of them, or of very many those most like it."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if len(known) > _MANY:
        like = difflib.get_close_matches(str(name), known, n=_MANY // 2, cutoff=0.0)
        return f"unknown {kind} {name!r}{hint}; nearest of {len(known)} known: {', '.join(sorted(like))}"
    return f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}"


_MANY = 32  # names that still make a line to read
