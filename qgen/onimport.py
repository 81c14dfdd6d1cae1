"""Runs something once another library has been imported, without importing it.

A finder on `sys.meta_path` waits for the modules by name, lets Python's own machinery find and load them, and calls back right after. If a
module was imported already, the call comes at once. Nothing of the library is replaced.
"""

from __future__ import annotations

__all__ = ["when_imported"]

import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def when_imported(module: str, call: Callable[[], None]) -> None:
    """Calls `call()` now if `module` is imported, else right after its first import. The same pair may be given any number of times."""
    if module in sys.modules:
        call()
        return
    finder = next((f for f in sys.meta_path if type(f).__qualname__ == _Waits.__qualname__), None)
    if finder is None:
        finder = _Waits()
        sys.meta_path.insert(0, finder)
    waiting = finder.waiting.setdefault(module, [])
    if call not in waiting:
        waiting.append(call)


class _Waits(importlib.abc.MetaPathFinder):
    """Wraps the loader of modules that somebody waits for; every other import passes by."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenCall(spec.loader, self.waiting.get(fullname, []))
                return spec
        return None


class _ThenCall(importlib.abc.Loader):
    """A module's own loader, followed by the calls."""

    def __init__(self, loader: Any, calls: list[Callable[[], None]]):
        self.loader, self.calls = loader, calls

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]  # from here on as if we had not been there
        self.loader.exec_module(module)
        for call in self.calls:
            call()
