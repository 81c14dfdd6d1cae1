"""Names to things: formats, methods, adapters, calibrators, metrics.

A registry imports the modules of its own package on the first lookup that it cannot answer, then the entry points of the same name
that other distributions offer. A module whose import fails for want of an optional package is remembered with its reason.
"""

__all__ = ["Registry"]

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from qgen.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary filled by decorators, with lazy discovery.

    Arguments:
        kind: singular noun for messages, e.g. "number format".
        package: package whose modules register themselves; also the entry-point group for third parties.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self.missing: dict[str, str] = {}
        self._items: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: stores the decorated object under `name`; `ValueError` if the name is taken by another object."""

        def store(item: T) -> T:
            self.add(name, item)
            return item

        return store

    def add(self, name: str, item: T) -> T:
        """Stores `item` under `name` and returns it. The same module may be executed twice; two different owners may not share a name."""
        old = self._items.get(name)
        if old is not None and old != item and getattr(old, "__qualname__", old) != getattr(item, "__qualname__", item):
            raise ValueError(f"{self.kind} {name!r} is registered already, by {old!r}")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            self._discover()
        if name not in self._items:
            absent = "".join(f"\n  {module} could not be imported: {why}" for module, why in self.missing.items())
            raise ValueError(unknown(self.kind, name, self._items) + absent)
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        if name not in self._items:
            self._discover()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._items))

    def items(self) -> list[tuple[str, T]]:
        """All (name, item) pairs, in alphabetical order."""
        return [(name, self._items[name]) for name in self]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # first: a module may look itself up while it is imported
        try:
            self._import_all()
        except BaseException:
            self._discovered = False  # half a registry would hide the reason from the next lookup
            raise

    def _import_all(self) -> None:
        package = importlib.import_module(self.package)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            try:
                importlib.import_module(f"{self.package}.{module}")
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] == "qgen":
                    raise
                self.missing[f"{self.package}.{module}"] = f"no module named {error.name!r}"
        for entry in importlib.metadata.entry_points(group=self.package):
            entry.load()
