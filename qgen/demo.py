"""A trained 14 MB text-to-image pipeline and its prompts, for trying qgen without a download or a GPU.

The model draws 64 x 64 emoji from prompts such as `"noto owl"` or `"flat penguin"`: a style, then a name. It was
trained on 462 names and mostly recalls them; it is small enough that quantizing, drawing and scoring it takes a
minute on a CPU.

    pipe = qgen.demo.demo_pipeline()
    pipe("noto owl").images[0].save("owl.png")

A saved demo pipeline must come back through diffusers' own `DiffusionPipeline.from_pretrained`, which looks its class
up by name in the `diffusers` package. `register` adds that one name there (module-level `__getattr__`, PEP 562), now
or when diffusers is first imported, so that neither library is imported early and nothing of diffusers is replaced.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from qgen.assets import SPLITS, assets_dir, demo_prompts
from qgen.onimport import when_imported

if TYPE_CHECKING:
    from qgen.emoji_pipeline import EmojiPixArtPipeline

__all__ = ["SPLITS", "assets_dir", "demo_pipeline", "demo_prompts", "register"]

CLASS_NAME = "EmojiPixArtPipeline"


def demo_pipeline(dtype: torch.dtype = torch.float32) -> EmojiPixArtPipeline:
    """Returns the trained demo pipeline on the CPU, its weights cast from their float16 files to `dtype`.

    Calling it with a prompt alone gives one 64 x 64 picture (20 steps, guidance 3). Raises `QgenError` if the assets
    are missing and ValueError if `dtype` is not a floating dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch.dtype such as torch.bfloat16, found {dtype!r}")
    register()
    folder = assets_dir() / "emoji-pixart"
    return _pipeline_class().from_pretrained(folder, dtype=dtype, local_files_only=True)


def register() -> None:
    """Lets diffusers find the demo's pipeline class by name; imports nothing and may be called any number of times."""
    when_imported("diffusers", _offer)


def _pipeline_class() -> type[EmojiPixArtPipeline]:
    from qgen.emoji_pipeline import EmojiPixArtPipeline

    return EmojiPixArtPipeline


def _offer() -> None:
    """Adds our class name to diffusers' attributes; every other name goes on to whoever answered before."""
    diffusers = sys.modules["diffusers"]  # diffusers replaces itself by a lazy module while it is imported
    before = diffusers.__dict__.get("__getattr__")
    if getattr(before, "offers", None) == CLASS_NAME:
        return

    def __getattr__(name: str) -> Any:
        if name == CLASS_NAME:
            return _pipeline_class()
        if before is not None:
            return before(name)
        raise AttributeError(f"module {diffusers.__name__!r} has no attribute {name!r}")

    __getattr__.offers = CLASS_NAME  # type: ignore[attr-defined]
    diffusers.__dict__["__getattr__"] = __getattr__
