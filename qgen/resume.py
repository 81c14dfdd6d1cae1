"""Journal: finished waves on disk, so that a killed run goes on from the last of them and ends with the same bytes.

    <folder>/journal-<denoiser>.json     fingerprint of model, recipe, calibration and seed
    <folder>/wave-<denoiser>-0003.safetensors    packed layers of one wave, and their report rows, in canonical bytes

Every file is written beside its place, flushed to disk and renamed. A journal of another job is refused, never mixed in.
"""

__all__ = ["Journal"]

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet
from qgen.errors import BadCheckpoint
from qgen.nn.packed import Layout
from qgen.recipe import Recipe

_VERSION = 1


@dataclass(frozen=True)
class Journal:
    folder: Path
    name: str
    fingerprint: str

    @classmethod
    def open(
        cls,
        folder: str | Path,
        name: str,
        module: nn.Module,
        recipe: Recipe,
        calls: CalibrationSet | None,
        seed: int,
        waves: list[list[str]],
    ) -> "Journal":
        """Starts a journal, or goes on with the one in `folder`. BadCheckpoint if that one belongs to another job.

        waves: paths of the layers of each wave; another memory budget cuts them otherwise, and files are numbered by wave.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise BadCheckpoint(f"a checkpoint is a folder in which progress is kept, {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "version": _VERSION,
            "model": _digest(module),
            "recipe": hashlib.sha256(recipe.to_json().encode()).hexdigest(),
            "calibration": calls.digest() if calls else "",
            "seed": seed,
            "waves (memory)": hashlib.sha256(json.dumps(waves).encode()).hexdigest(),
            "threads": torch.get_num_threads(),
        }
        path = folder / f"journal-{name or 'module'}.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise BadCheckpoint(f"{path}: not a journal of qgen ({error}); choose another folder") from None
            differing = [key for key in parts if not isinstance(found, dict) or found.get(key) != parts[key]]
            if differing:
                raise BadCheckpoint(
                    f"{folder} holds the progress of another job (differs in: {', '.join(differing)}); choose another folder, or delete it"
                )
        else:
            _write(path, lambda temporary: temporary.write_text(json.dumps(parts, indent=1), encoding="utf-8"))
        return cls(folder, name or "module", hashlib.sha256(json.dumps(parts).encode()).hexdigest())

    def _path(self, wave: int) -> Path:
        return self.folder / f"wave-{self.name}-{wave:04d}.safetensors"

    def write(self, wave: int, layers: dict[str, nn.Module], rows: list[dict]) -> None:
        """Keeps the layers of a finished wave and their report rows."""
        from safetensors.torch import save_file

        tensors = {
            f"{path}:{slot}": t.contiguous() for path, layer in layers.items() for slot, t in layer.canonical().items()
        }
        layouts = {path: asdict(layer.layout) for path, layer in layers.items()}
        header = json.dumps({"fingerprint": self.fingerprint, "layouts": layouts, "rows": rows})
        _write(self._path(wave), lambda temporary: save_file(tensors, temporary, {"qgen_wave": header}))

    def read(self, wave: int) -> dict[str, tuple[Layout, dict[str, Tensor], dict]] | None:
        """(layout, canonical tensors, report row) by path, or None if the wave is not finished. BadCheckpoint if the file is broken."""
        from safetensors import SafetensorError, safe_open

        path = self._path(wave)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["qgen_wave"])
                if header["fingerprint"] != self.fingerprint:
                    raise ValueError("it belongs to another job")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            rows = {row["path"]: row for row in header["rows"]}
            made = {}
            for name, data in header["layouts"].items():
                slots = {key.rpartition(":")[2]: t for key, t in tensors.items() if key.rpartition(":")[0] == name}
                made[name] = (Layout(**{**data, "slots": tuple(data["slots"])}), slots, rows[name])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadCheckpoint(
                f"{path}: cannot go on from this file ({error}); delete it to redo its layers"
            ) from None
        return made


def _digest(module: nn.Module) -> str:
    """sha256 of every parameter and buffer, names and shapes included."""
    h = hashlib.sha256()
    for name, t in module.state_dict().items():
        h.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        h.update(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _write(path: Path, writer) -> None:
    """Writes beside `path`, flushes, renames."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
