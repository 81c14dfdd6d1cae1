"""Prompts for calibration: a small built-in set, 128 captions of varied subjects, settings and styles in our own words, or one's own."""

__all__ = ["PROMPTS", "as_prompts"]

from collections.abc import Callable, Sequence
from pathlib import Path

_SUBJECTS = (
    "a lighthouse keeper", "two red foxes", "a bowl of ramen", "an old steam locomotive", "a ballet dancer", "a stack of books",
    "a hummingbird", "a rainy street market", "a glass teapot", "a mountain climber", "a sleeping cat", "a vintage bicycle",
    "a field of tulips", "a robot gardener", "a wooden violin", "a snowy village",
)  # fmt: skip
_SETTINGS = (
    "at dawn, soft light", "under neon signs", "in a quiet library", "by the sea in a storm", "on a white background",
    "in deep forest fog", "seen from above", "in a sunlit kitchen",
)  # fmt: skip
_STYLES = (
    "photograph, 35mm", "watercolor", "oil painting", "flat vector illustration", "pencil sketch", "3d render",
    "macro photograph, shallow focus", "woodcut print",
)  # fmt: skip

PROMPTS: tuple[str, ...] = tuple(
    f"{subject} {_SETTINGS[(i + j) % len(_SETTINGS)]}, {_STYLES[(3 * i + j) % len(_STYLES)]}"
    for j in range(8)
    for i, subject in enumerate(_SUBJECTS)
)


def as_prompts(given: "str | Path | Sequence[str] | Callable[[int], Sequence[str]]", count: int = 128) -> list[str]:
    """Prompts from text (one prompt), a list, a `Path` (a file in UTF-8, one prompt in a line), or a function that is asked for `count`.

    ValueError if there are none, or something else than text.
    """
    if isinstance(given, Path):
        if not given.is_file():
            raise ValueError(f"no file of prompts {given}")
        given = [line.strip() for line in given.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif callable(given):
        given = given(count)
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise ValueError("calibration needs at least one prompt, found none; leave out `prompts` for the built-in set")
    if wrong := next((p for p in prompts if not isinstance(p, str)), None):
        raise ValueError(f"a prompt is text, found {type(wrong).__name__}")
    return prompts
