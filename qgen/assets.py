"""Where the demo's files lie, and the prompts that its model knows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qgen.errors import QgenError

__all__ = ["SPLITS", "assets_dir", "demo_prompts"]

SPLITS = ("calibration", "held_out")


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


def _fraction(salt: str, text: str) -> float:
    """A number in [0, 1) that depends on the two strings alone, on every machine."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
