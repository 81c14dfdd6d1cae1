"""What a worker process is told, and what the table is made of: frozen data that is JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qgen.bench.peer import Config
from qgen.eval.scores import Scores

__all__ = ["Job", "Row"]


@dataclass(frozen=True)
class Job:
    """One config of one peer on one pipeline.

    pipeline: folder, hub id or "demo". dtype: of the 16-bit pipeline. samples, keep: calibration prompts, and denoiser calls kept of
    each. pairs: pictures drawn for the paired time. threads: of torch on the CPU, 0 = torch's own number. qgen: version of the caller.
    """

    peer: str
    config: str
    pipeline: str
    prompts: tuple[str, ...]
    dtype: str = "bfloat16"
    device: str = "cpu"
    steps: int | None = None
    seed: int = 0
    batch_size: int = 16
    samples: int = 64
    keep: int = 4
    pairs: int = 9
    threads: int = 0
    qgen: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        return cls(**{**data, "prompts": tuple(data["prompts"])})

    def settings(self) -> dict[str, Any]:
        """What rows of one table must share."""
        return {k: v for k, v in json.loads(self.to_json()).items() if k not in ("peer", "config")}


@dataclass(frozen=True)
class Row:
    """One line of the table: an error in words, or what a worker measured and the scores of its pictures.

    measured: bits (per weight, from the file), nbytes (of the denoiser's tensors), file, layers, asked, left, more, seconds, peak (bytes
    or None), latency (of `Paired`), versions {package: version}.
    """

    peer: str
    config: Config
    error: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores | None = None

    @property
    def name(self) -> str:
        return f"{self.peer} {self.config.name}"

    def to_dict(self) -> dict[str, Any]:
        scores = None if self.scores is None else json.loads(self.scores.to_json())
        return {
            "peer": self.peer, "config": asdict(self.config), "error": self.error, "measured": dict(self.measured), "scores": scores,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        scores = data["scores"] and Scores.from_json(json.dumps(data["scores"]))
        return cls(data["peer"], Config(**data["config"]), data["error"], data["measured"], scores or None)
