"""qgen: turns a 16-bit vision generator into a 4-bit one. `pipe = qgen.quantize(pipe)`.

This module is the public API and nothing else. Names are imported on first use, so that `import qgen` needs torch and the standard library
and wakes no GPU; diffusers and transformers learn to load qgen's checkpoints when they are imported, not before.
"""

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
# In a source checkout kernels/, calibration/ and nodes/ lie beside this folder; a wheel has them inside it.
if (
    not (_here / "kernels").is_dir()
    and (_here.parent / "kernels").is_dir()
    and (_here.parent / "pyproject.toml").is_file()
):
    __path__.append(str(_here.parent))

import qgen.calibration as _calibration  # noqa: E402 (after the path is complete)
from qgen.demo import register as _register_demo  # noqa: E402
from qgen.io.hub import install as _install  # noqa: E402

_register_demo()
_install()


def _verb(name: str) -> Any:
    """record, save and load of `qgen.calibration`, a folder without `__init__.py`, whichever of its modules was imported before."""
    if name not in ("record", "save", "load"):
        raise AttributeError(f"module 'qgen.calibration' has no attribute {name!r}")
    importlib.import_module("qgen.engine")  # hangs them on the folder
    return vars(_calibration)[name]


_calibration.__getattr__ = _verb  # type: ignore[method-assign]

if TYPE_CHECKING:
    from qgen import recipes as recipes
    from qgen.demo import demo_pipeline as demo_pipeline
    from qgen.engine import prepare as prepare
    from qgen.engine import quantize as quantize
    from qgen.eval.evaluate import evaluate as evaluate
    from qgen.io.checkpoint import load as load
    from qgen.io.checkpoint import save as save
    from qgen.io.config import QGenConfig as QGenConfig
    from qgen.io.convert import export as export
    from qgen.nn.lora import fuse_lora as fuse_lora
    from qgen.nn.lora import unfuse_lora as unfuse_lora
    from qgen.recipe import Recipe as Recipe
    from qgen.recipe import Rule as Rule
    from qgen.recipe import Spec as Spec
    from qgen.show.report import report as report
    from qgen.show.summary import summary as summary
    from qgen.train.finetune import finetune as finetune

_PUBLIC = {
    "quantize": "qgen.engine",
    "prepare": "qgen.engine",
    "finetune": "qgen.train.finetune",
    "save": "qgen.io.checkpoint",
    "load": "qgen.io.checkpoint",
    "export": "qgen.io.convert",
    "QGenConfig": "qgen.io.config",
    "summary": "qgen.show.summary",
    "report": "qgen.show.report",
    "Recipe": "qgen.recipe",
    "Rule": "qgen.recipe",
    "Spec": "qgen.recipe",
    "demo_pipeline": "qgen.demo",
    "evaluate": "qgen.eval.evaluate",
    "fuse_lora": "qgen.nn.lora",
    "unfuse_lora": "qgen.nn.lora",
}
_MODULES = ("recipes", "calibration", "kernels", "formats", "methods")

__all__ = [*_PUBLIC, "recipes"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qgen.{name}")
    if name == "__version__":
        return importlib.metadata.version("qgen-diffusion")
    raise AttributeError(f"module 'qgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_MODULES])
