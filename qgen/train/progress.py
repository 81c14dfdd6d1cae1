"""Progress on disk: leaves, optimizer, the best state so far, random numbers and the curve: one safetensors file, JSON in its header.

It is written beside its place, flushed and renamed: a killed run finds the last whole one. A file of another job is refused.
"""

__all__ = ["Progress"]

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint


@dataclass
class Progress:
    """Where a run stands.

    step: finished steps. curve: loss of each. held: {step: mean held-out distance}. best: step of the best state, 0 = the start.
    packed: {path: canonical slots} of the best state, empty for the start. leaves, adam: tensors by name. blocks: what block by block
    methods tell of each finished block.
    """

    step: int = 0
    curve: list[float] = field(default_factory=list)
    held: dict[int, float] = field(default_factory=dict)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    best: int = 0
    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    adam: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[dict] = field(default_factory=list)

    def write(self, path: Path, job: dict[str, Any]) -> None:
        """Keeps the progress of `job` (what must be equal for a run to go on) in the file `path`."""
        from safetensors.torch import save_file

        tensors = {f"leaf/{name}": t.detach() for name, t in self.leaves.items()}
        tensors |= {f"adam/{name}": t for name, t in self.adam.items()}
        tensors |= {f"best/{p}:{slot}": t for p, slots in self.packed.items() for slot, t in slots.items()}
        tensors["rng"] = torch.get_rng_state()
        said = {key: getattr(self, key) for key in ("step", "curve", "held", "before", "after", "best", "blocks")}
        header = {"qgen_tuning": json.dumps({"job": job, **said})}
        tensors = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, header)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, job: dict[str, Any]) -> "Progress | None":
        """The progress kept in `path`, None if there is no such file. BadCheckpoint if it is broken or of another job.

        torch's random state is put back as it was.
        """
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {})["qgen_tuning"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = said.pop("job")
            differing = [key for key in job if not isinstance(found, dict) or found.get(key) != job[key]]
            if differing:
                raise BadCheckpoint(
                    f"{path} holds the progress of another job (differs in: {', '.join(differing)}); choose another folder, or delete it"
                )
            said["held"] = {int(step): error for step, error in said["held"].items()}
            made = cls(**said)
            for name, t in tensors.items():
                kind, _, rest = name.partition("/")
                if kind == "best":
                    where, _, slot = rest.rpartition(":")
                    made.packed.setdefault(where, {})[slot] = t
                elif kind in ("leaf", "adam"):
                    (made.leaves if kind == "leaf" else made.adam)[rest] = t
            torch.set_rng_state(tensors["rng"])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, BadCheckpoint):
                raise
            raise BadCheckpoint(f"{path}: cannot go on from this file ({error}); delete it to begin again") from None
        return made
