"""Prompts to evaluate on: built in, from a file, or from a local copy of a benchmark. Each set says its licence.

    load_prompts("builtin")              128 captions of our own, Apache-2.0
    load_prompts("demo")                 the demo pipeline's held-out prompts, Apache-2.0
    load_prompts("prompts.csv")          .txt (a line each), .json, .jsonl, .csv, .tsv
    load_prompts("mjhq:/data/mjhq30k")   meta_data.json of MJHQ-30K       coco:… captions_*.json       parti:… PartiPrompts.tsv

Nothing is downloaded. In tables the prompt is found under one of the names prompt, caption, text, in any case.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgen.errors import unknown

__all__ = ["COPIES", "PromptSet", "load_prompts", "prompt_file"]

COLUMNS = ("prompt", "caption", "text")
# What the sets' own pages say. MJHQ-30K's card names no licence; COCO's terms speak of its annotations, not of its pictures.
_NONE_STATED = "none stated, see https://huggingface.co/datasets/playgroundai/MJHQ-30K"
_PARTI = "Apache-2.0, says https://huggingface.co/datasets/nateraw/parti-prompts"


@dataclass(frozen=True)
class PromptSet:
    """n prompts, where they are from, under which licence, and the first 12 hex digits of the SHA-256 over all of them."""

    name: str
    licence: str
    prompts: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.prompts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def load_prompts(source: str | Path, n: int | None = None) -> PromptSet:
    """Returns the first n prompts of a set by name ("builtin", "demo"), "kind:path", or of a file.

    Raises ValueError for what is no set, holds no prompt, or cannot be read.
    """
    kind, _, where = str(source).partition(":")
    if str(source) in _BUILT_IN:
        found = _BUILT_IN[str(source)]()
    elif where and kind in COPIES:
        found = COPIES[kind](Path(where))
    elif Path(source).is_file():
        found = prompt_file(Path(source))
    else:
        known = [*_BUILT_IN, *(f"{name}:/path" for name in COPIES)]
        raise ValueError(
            f"{unknown('prompt set', str(source)[:80], known)}, or a .txt, .json, .jsonl, .csv or .tsv file"
        )
    prompts = tuple(found.prompts[:n])
    if not prompts:
        raise ValueError(f"{source} holds no prompt")
    return PromptSet(found.name, found.licence, prompts)


def prompt_file(path: Path) -> PromptSet:
    """Prompts of a file in its order, empty ones left out; ValueError if it is no such file. Its licence is its owner's."""
    text = _text(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            found = _from_json(json.loads(text), path)
        elif suffix == ".jsonl":
            found = [_pick(json.loads(line), path) for line in text.split("\n") if line.strip()]
        elif suffix in (".csv", ".tsv"):
            found = _from_table(text, "\t" if suffix == ".tsv" else ",", path)
        else:
            found = text.splitlines()
    except (json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} is no {suffix[1:]} of prompts: {error}") from None
    return PromptSet(path.name, "as its owner says", tuple(p.strip() for p in found if p.strip()))


def _builtin() -> PromptSet:
    from qgen.calibration.prompts import PROMPTS

    return PromptSet("qgen's 128 captions", "Apache-2.0", tuple(PROMPTS))


def _demo() -> PromptSet:
    from qgen.assets import demo_prompts

    return PromptSet("the demo's held-out prompts", "Apache-2.0", tuple(demo_prompts("held_out")))


def _mjhq(path: Path) -> PromptSet:
    """{id: {"category", "prompt"}}, in the order of ids."""
    file = _inside(path, "meta_data.json")
    data = _parsed(file)
    if not isinstance(data, dict):
        raise ValueError(f"{file}: an object of {{id: {{prompt, category}}}} wanted, found {type(data).__name__}")
    prompts = tuple(_pick(data[key], file) for key in sorted(data))
    return PromptSet("MJHQ-30K", _NONE_STATED, prompts)


def _coco(path: Path) -> PromptSet:
    """The first caption (lowest id) of every image, in the order of image ids."""
    file = _inside(path, "captions_val2014.json", "captions_val2017.json", "annotations/captions_val2014.json",
                   "annotations/captions_val2017.json")  # fmt: skip
    data = _parsed(file)
    first: dict[int, tuple[int, str]] = {}
    try:
        for entry in data["annotations"]:
            image, number, caption = int(entry["image_id"]), int(entry["id"]), str(entry["caption"]).strip()
            if image not in first or number < first[image][0]:
                first[image] = (number, caption)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: COCO's annotations with image_id, id and caption wanted") from None
    prompts = tuple(first[image][1] for image in sorted(first))
    return PromptSet(f"COCO ({file.stem})", "captions CC-BY-4.0, https://cocodataset.org/#termsofuse", prompts)


def _parti(path: Path) -> PromptSet:
    file = _inside(path, "PartiPrompts.tsv")
    return PromptSet("PartiPrompts (P2)", _PARTI, tuple(_from_table(_text(file), "\t", file)))


_BUILT_IN: dict[str, Callable[[], PromptSet]] = {"builtin": _builtin, "demo": _demo}
COPIES: dict[str, Callable[[Path], PromptSet]] = {"mjhq": _mjhq, "coco": _coco, "parti": _parti}


def _inside(path: Path, *names: str) -> Path:
    """`path` if it is a file, else the first of `names` that lies in the folder `path`."""
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            return file
    raise ValueError(f"no {names[0]} in {path}; name the file or the folder of your copy")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _parsed(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _from_json(data: Any, path: Path) -> list[str]:
    if isinstance(data, dict) and isinstance(data.get("prompts"), list):
        data = data["prompts"]
    entries: Sequence[Any] = list(data.values()) if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a list of prompts wanted, found {type(data).__name__}")
    return [_pick(entry, path) for entry in entries]


def _pick(entry: Any, path: Path) -> str:
    """The prompt of an entry: the entry itself, or its prompt, caption or text."""
    if isinstance(entry, str):
        return entry
    by_name = {str(key).lower(): value for key, value in entry.items()} if isinstance(entry, dict) else {}
    for name in COLUMNS:
        if isinstance(by_name.get(name), str):
            return by_name[name]
    raise ValueError(f"{path}: a prompt, or an object with {', '.join(COLUMNS)}, wanted; found {str(entry)[:80]}")


def _from_table(text: str, separator: str, path: Path) -> list[str]:
    # PartiPrompts holds unbalanced quotation marks, so in .tsv a quotation mark is a letter.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    before = csv.field_size_limit(1 << 30)  # the default refuses prompts over 128 KiB
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting))
    finally:
        csv.field_size_limit(before)
    head = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((head.index(name) for name in COLUMNS if name in head), None)
    if column is None:
        raise ValueError(
            f"{path}: a column called {', '.join(COLUMNS)} wanted, found {', '.join(head)[:200] or 'nothing'}"
        )
    return [row[column] for row in rows[1:] if len(row) > column]
