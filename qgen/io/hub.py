"""diffusers and transformers learn of us when they are imported, not before: `import qgen` imports neither.

A finder on `sys.meta_path` waits for exactly the two modules that hold the tables of quantizers. It lets Python's own machinery find and
load them, and registers right after. If they were imported already, registration happens at once.
"""

from __future__ import annotations

__all__ = ["attach", "install"]

import importlib
import importlib.abc
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("qgen")

_WHEN = {"diffusers.quantizers.auto": "diffusers", "transformers.quantizers.auto": "transformers"}


def install() -> None:
    """Registers qgen with the libraries that are imported, and with the others once they are. May be called any number of times."""
    for module, library in _WHEN.items():
        if module in sys.modules:
            _register(library)
    if set(_WHEN) - set(sys.modules) and not any(
        type(finder).__qualname__ == _Waits.__qualname__ for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Waits())


def attach(model: nn.Module, recipe: Any = None) -> None:
    """Call after quantizing: `model.save_pretrained` then writes a checkpoint that `from_pretrained` and `qgen.load` read.

    recipe: the Recipe to store (default: `model.qgen_recipe`). The report stored is `model.qgen_report` at the time of saving. For a
    module of neither library this only leaves the recipe on it.
    """
    from qgen.io.header import library

    whose = library(model)
    if whose != "torch":
        _hook(whose).attach(model, recipe)
    elif recipe is not None:
        model.qgen_recipe = recipe


def _hook(library: str) -> ModuleType:
    return importlib.import_module(f"qgen.io.{library}_hook")


def _register(library: str) -> None:
    """A library that changed must still import: the error is logged here, and raised where the library's hooks are needed."""
    from qgen.errors import QgenError

    try:
        _hook(library).register()
    except QgenError as error:
        log.error("%s; models of %s cannot be saved or loaded quantized", error, library)


class _Waits(importlib.abc.MetaPathFinder):
    """Wraps the loader of the modules that we wait for; every other import passes by."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname not in _WHEN:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader, _WHEN[fullname])
                return spec
        return None


class _ThenRegister(importlib.abc.Loader):
    """A module's own loader, followed by registration."""

    def __init__(self, loader: Any, library: str):
        self.loader, self.library = loader, library

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # from here on as if we had not been there
        self.loader.exec_module(module)
        _register(self.library)
