"""diffusers and transformers learn of us when they are imported, not before: `import qgen` imports neither.

Registration waits for exactly the modules that hold their tables: of quantizers, and diffusers' attention backends.
"""

from __future__ import annotations

__all__ = ["attach", "install"]

import functools
import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qgen.onimport import when_imported

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("qgen")


def install() -> None:
    """Registers qgen with the libraries that are imported, and with the others once they are. May be called any number of times."""
    for module, register in _WHEN.items():
        when_imported(module, register)


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


def _register_attention() -> None:
    from qgen.errors import QgenError
    from qgen.nn import attention_backend

    try:
        attention_backend.register()
    except QgenError as error:
        log.error("%s", error)


_WHEN = {
    "diffusers.models.modeling_utils": _register_attention,
    "diffusers.quantizers.auto": functools.partial(_register, "diffusers"),
    "transformers.quantizers.auto": functools.partial(_register, "transformers"),
}
