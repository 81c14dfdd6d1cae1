"""Folders of models as diffusers and transformers lay them out: their components, whether qgen quantized them, what they hold.

Nothing is loaded: configurations and headers are read.
"""

__all__ = ["config_in", "float_dtype", "parts", "quantized"]

import json
from pathlib import Path
from typing import Any


def parts(folder: Path) -> list[Path]:
    """Folders with weights: the folder itself, or the components of a pipeline."""
    index = config_in(folder / "model_index.json")
    names = [name for name, value in index.items() if isinstance(value, list) and name.isidentifier()]
    return [folder / name for name in names if (folder / name).is_dir()] if index else [folder]


def quantized(folder: Path) -> bool:
    """Whether a component's config.json says that qgen quantized it."""
    said = config_in(folder / "config.json").get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "qgen"


def float_dtype(folder: Path) -> Any:
    """The float dtype of most tensors of a folder, None where it holds no safetensors."""
    from qgen.errors import BadCheckpoint
    from qgen.io.files import scan

    counts: dict[Any, int] = {}
    try:
        entries = scan(folder).tensors.values()
    except BadCheckpoint:
        return None  # no weights, or unreadable ones: whoever loads them says what is wrong
    for entry in entries:
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def config_in(path: Path) -> dict:
    """The object of a JSON file; {} where there is no such file. ValueError for what is no JSON."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return data if isinstance(data, dict) else {}
