"""A folder that remembers finished pictures, so that a killed evaluation goes on where it stopped.

    settings.json               what decides the pictures: model, seed, steps, …; another set of these is refused
    pictures/<key>.png          one per distinct prompt; key = the prompt's seed, a hash of prompt and run seed
    records/<batch>.json        {key: {"prompt", "sha256"}}: written last, whole or not at all, once per batch

A picture counts as finished when a record names it and its file has that hash. A process killed at any moment leaves
either a whole batch or none of it, so a batch is drawn again in the same company, and the numbers of an interrupted run
equal those of an uninterrupted one bit for bit. Pictures are kept as 8-bit PNG, as people see and publish them; scores are
computed from what was read back, resumed or not. Several processes may write into one folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadData, QgenError
from qgen.eval.generate import seed_of

__all__ = ["Store"]

log = logging.getLogger("qgen")


class Store:
    """Pictures of one model under one set of settings, by prompt.

    Arguments:
        folder: made if absent. settings: whatever decides the pictures, as JSON data; "seed" among them.

    Raises ValueError if the folder holds pictures drawn with other settings, QgenError if it cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder, self.seed = Path(folder), int(settings["seed"])
        self._known: dict[str, str] = {}  # key → hash of its file, from records read so far
        self._read: set[str] = set()
        self._sound: set[str] = set()  # keys whose file has been seen to have its hash
        try:
            for name in ("pictures", "records"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._claim(json.loads(json.dumps(settings)))
        except OSError as error:
            raise QgenError(f"cannot keep pictures in {self.folder}: {error}") from error

    def _claim(self, settings: dict[str, Any]) -> None:
        """Writes settings.json if nobody did, and compares otherwise."""
        path = self.folder / "settings.json"
        if not path.exists():
            stage = _staged(path, json.dumps(settings, indent=1).encode())
            try:
                os.link(stage, path)  # unlike a rename it fails if another process was first
            except FileExistsError:
                pass
            finally:
                stage.unlink()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no settings file of qgen: {error}; name another folder") from None
        differ = [k for k in sorted({*settings, *found}) if settings.get(k) != found.get(k)]
        if differ:
            said = ", ".join(f"{k} {found.get(k)!r} (now {settings.get(k)!r})" for k in differ)
            raise ValueError(
                f"{self.folder} holds pictures drawn with other settings: {said}; name another folder, or delete this one"
            )

    def key(self, prompt: str) -> str:
        return f"{seed_of(prompt, self.seed):016x}"

    def finished(self, prompt: str) -> bool:
        """Whether the prompt's picture lies here whole."""
        key = self.key(prompt)
        if key in self._sound:
            return True
        self._refresh()
        if key not in self._known:
            return False
        try:
            whole = _hash((self._path(key)).read_bytes()) == self._known[key]
        except OSError:
            whole = False
        if not whole:
            log.warning("%s is damaged or gone and will be drawn again", self._path(key))
            return False
        self._sound.add(key)
        return True

    def add(self, prompts: Sequence[str], pictures: Tensor) -> None:
        """Keeps one batch: uint8 pictures (B, H, W, 3) of B prompts. Returns once it is on the disk."""
        record = {}
        try:
            for prompt, picture in zip(prompts, pictures, strict=True):
                key, data = self.key(prompt), _png(picture)
                os.replace(_staged(self._path(key), data), self._path(key))
                record[key] = {"prompt": prompt, "sha256": _hash(data)}
            path = self.folder / "records" / f"{_hash(' '.join(record).encode())[:16]}.json"
            os.replace(_staged(path, json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")), path)
        except OSError as error:
            raise QgenError(
                f"could not keep pictures in {self.folder}: {error}; free some space and run again"
            ) from error
        self._refresh()

    def read(self, prompts: Sequence[str]) -> Tensor:
        """The pictures of prompts, (n, H, W, 3) float32 in [0, 1]; BadData if one is not finished."""
        from qgen.eval.images import as_images

        for prompt in prompts:
            if not self.finished(prompt):
                raise BadData(f"{self.folder} has no finished picture for {prompt[:80]!r}")
        return as_images([_open(self._path(self.key(prompt))) for prompt in prompts], f"pictures of {self.folder}")

    def _path(self, key: str) -> Path:
        return self.folder / "pictures" / f"{key}.png"

    def _refresh(self) -> None:
        """Reads records that appeared since the last look, whoever wrote them."""
        for path in (self.folder / "records").glob("*.json"):
            if path.name in self._read:
                continue
            try:
                entries = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
                self._known |= {str(key): str(entry["sha256"]) for key, entry in entries.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                log.warning("%s is no record of qgen and is ignored", path)
            self._read.add(path.name)


def _staged(path: Path, data: bytes) -> Path:
    """A file beside `path` with these bytes, flushed to the disk; its name is nobody else's."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _png(picture: Tensor) -> bytes:
    from PIL import Image

    if picture.dtype != torch.uint8:
        raise TypeError(f"uint8 pictures wanted, found {picture.dtype}")
    stream = io.BytesIO()
    Image.fromarray(picture.cpu().numpy()).save(stream, "PNG")
    return stream.getvalue()


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
