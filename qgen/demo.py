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

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qgen.errors import QgenError
from qgen.onimport import when_imported

if TYPE_CHECKING:
    from qgen.emoji_pipeline import EmojiPixArtPipeline

__all__ = ["SPLITS", "assets_dir", "demo_pipeline", "demo_prompts", "register"]

SPLITS = ("calibration", "held_out")
CLASS_NAME = "EmojiPixArtPipeline"


def assets_dir() -> Path:
    """Returns the folder with the demo's model, prompts and scores' weights.

    That is `demos/assets` of a source checkout, or `qgen/_assets` of an installed wheel. Raises `QgenError` if
    neither exists.
    """
    package = Path(__file__).resolve().parent
    places = (package.parent / "demos" / "assets", package / "_assets")
    for place in places:
        if (place / "emoji-pixart" / "model_index.json").is_file():
            return place
    raise QgenError(
        f"demo assets wanted, found neither {places[0]} nor {places[1]}; work in a full source checkout, "
        "or install a wheel that was built with the demo assets"
    )


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


def demo_prompts(split: str) -> list[str]:
    """Returns the demo's prompts, each "style name", for "calibration" or "held_out".

    A name belongs to one split only, by a hash of the name, so no picture of a held-out name is seen while
    calibrating. About three names in ten are held out. Order is fixed and mixes names and styles, so the first n
    prompts are a fair sample. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    concepts = json.loads((assets_dir() / "emoji_concepts.json").read_text(encoding="utf-8"))["concepts"]
    held_out = split == "held_out"
    prompts = [
        f"{style} {concept['name']}"
        for concept in concepts
        if (_fraction("split", concept["name"]) < 0.3) == held_out
        for style in concept["styles"]
    ]
    return sorted(prompts, key=lambda prompt: _fraction("order", prompt))


def register() -> None:
    """Lets diffusers find the demo's pipeline class by name; imports nothing and may be called any number of times."""
    when_imported("diffusers", _offer)


def _pipeline_class() -> type[EmojiPixArtPipeline]:
    from qgen.emoji_pipeline import EmojiPixArtPipeline

    return EmojiPixArtPipeline


def _fraction(salt: str, text: str) -> float:
    """A number in [0, 1) that depends on the two strings alone, on every machine."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
