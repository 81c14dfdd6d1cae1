"""Which files and folders of this computer visitors may name: those inside the allowed roots, after links are followed.

A path is resolved first (`..`, symbolic links), then compared, so that no spelling leads outside. What lies outside is refused in the same
words whether it exists or not: the page tells nobody what else is on the disk.
"""

__all__ = ["Roots"]

import re
from collections.abc import Iterable
from pathlib import Path

_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LONGEST = 4096


class Roots:
    """The allowed folders. hub: whether names such as owner/name may be fetched from Hugging Face's hub."""

    def __init__(self, folders: Iterable[str | Path], hub: bool = False):
        self.folders = tuple(dict.fromkeys(Path(folder).resolve() for folder in folders))
        self.hub = hub
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"--root {folder} is no folder; name one that exists")

    def inside(self, text: str) -> Path:
        """The real path behind what was typed, existing or not; ValueError if it lies outside every root.

        Relative paths start at a root: the first in which they exist, else the first of all.
        """
        text = _clean(text)
        given = Path(text).expanduser()
        tries = [given] if given.is_absolute() else [root / given for root in self.folders]
        found = [path for path in map(_resolve, tries) if path is not None and self.holds(path)]
        for path in found:
            if path.exists():
                return path
        if found:
            return found[0]
        raise ValueError(f"{_shown(text)} is outside the folders that this page may use: {self.said()}")

    def existing(self, text: str) -> Path:
        """As `inside`, for a file or folder that must be there."""
        path = self.inside(text)
        if not path.exists():
            raise ValueError(f"nothing is at {_shown(_clean(text))}; this page may use {self.said()}")
        return path

    def holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.folders)

    def model(self, text: str) -> str:
        """What a loader understands: "demo", an absolute path inside the roots, or a hub id. ValueError otherwise."""
        text = _clean(text)
        if text == "demo":
            return text
        looks_like_hub = _HUB.fullmatch(text) is not None and ".." not in text
        try:
            path = self.inside(text)
        except ValueError:
            if not looks_like_hub:
                raise
            path = None
        if path is not None and path.exists():
            return str(path)
        if not looks_like_hub:
            raise ValueError(f"nothing is at {_shown(text)}; this page may use {self.said()}")
        if not self.hub:
            raise ValueError(
                f"there is no folder {_shown(text)} here, and this page may not fetch from the hub (start it with --hub)"
            )
        return text

    def said(self) -> str:
        """The roots, as a visitor reads them."""
        return ", ".join(map(str, self.folders)) or "none (start it with --root)"


def _clean(text: str) -> str:
    text = str(text or "").strip()
    if not text:
        raise ValueError("write the path of a file or folder first")
    if len(text) > _LONGEST or "\0" in text or not text.isprintable():
        raise ValueError("that is no path: it is too long, or holds characters that no path has")
    return text


def _resolve(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a name too long, a circle of links
        return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
