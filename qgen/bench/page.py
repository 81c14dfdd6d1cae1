"""peers.md: the table with its conditions, what is compared, and the computed notes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgen.bench.job import Job, Row
from qgen.bench.table import as_markdown, notes, points

__all__ = ["markdown"]

METHOD = (
    "Every row is a process of its own with the same 16-bit pipeline, prompts, noise and calibration calls. All are asked to quantize the "
    "same linear layers: those that qgen's probe finds inside the repeated blocks, and those that see one row per sample (time and "
    "modulation). Embedders, heads and convolutions stay in 16 bits.",
    "*W x A*: bits of weights and of inputs. A16 rows quantize weights only and multiply 16-bit inputs: no rivals of A4 rows, whose "
    "inputs are rounded too. Layers that see one row per sample have 16-bit inputs in every row, and 4-bit weights in all recipes. "
    "qgen's W4A4 recipes keep **8-bit inputs where text becomes keys and values** (the two `nunchaku` recipes do not); peers have no "
    "such rule.",
    "*bits per weight* counts, in the file that the peer itself writes, every tensor under a quantized layer's name (codes, scales, zero "
    "points, low rank, smoothing, codebooks, biases) and divides by the layer's weights; *denoiser* is all of the file's tensors. Where a "
    "peer stores a byte per 4-bit code, a byte is counted.",
    "*quantize* includes recording calibration calls. *memory rise* is the highest resident memory while quantizing above that before. "
    "*time* is the median over pairs of pictures, 16-bit and quantized in turn in one process. PSNR, LPIPS, FD and KD compare with the "
    "16-bit pictures of the same prompts and noise; *change* is the paired difference from them. Brackets are 95 % bootstrap intervals. "
    "FD of few pictures is biased upward: compare within this table only.",
    "`unquantized float32` shows what 16-bit arithmetic alone does: no quantizer can be told from the original beyond it. Times are "
    "of this computer: peers whose kernels are for GPUs run their plain fallbacks on a CPU.",
)


def markdown(rows: Sequence[Row], job: Job, prompts: Any, typed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(text, the conditions as a mapping). typed: the words after `qgen`; interpreters' paths are left out."""
    about = _conditions(rows, job, prompts, typed)
    parts = [
        "# qgen and its peers, side by side",
        f"Made by `{about['command']}`.",
        "![PSNR over bytes](pictures/peers.png)" if points(rows) else "",
        as_markdown(rows),
        "## What the rows say" if notes(rows) else "",
        "\n".join(f"- {line}" for line in notes(rows)),
        "## How it was measured",
        "\n\n".join(METHOD),
        "\n".join(f"- {name}: {value}" for name, value in about.items() if name != "command"),
        "Configs:",
        "\n".join(f"- `{row.name}`: {row.config.about}" for row in rows if row.config.about),
    ]
    failed = [f"- `{row.name}`: {' '.join(row.error.split())}" for row in rows if row.error]
    if failed:
        parts += ["## What failed, in full", "\n".join(failed)]
    return "\n\n".join(part for part in parts if part) + "\n", about


def _conditions(rows: Sequence[Row], job: Job, prompts: Any, typed: Sequence[str]) -> dict[str, str]:
    from qgen.show.report import environment

    here = environment()
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row.measured.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    used = " or ".join(sorted({str(row.measured["threads"]) for row in rows if row.measured}))
    networks = {
        r.label: f"{r.label} by {r.extractor} ({r.digest})"
        for row in rows
        if row.scores
        for r in row.scores.rows
        if r.extractor
    }
    return {
        "command": shlex.join(["qgen", *(_shown(word) for word in typed)]),
        "pipeline": Path(job.pipeline).name if Path(job.pipeline).is_absolute() else job.pipeline,
        "prompts": f"{prompts.name}, {len(job.prompts)} of them ({prompts.digest})",
        "drawing": f"{job.dtype}, {job.steps or 'the pipeline’s own'} steps, seed {job.seed}, batches of {job.batch_size}",
        "calibration": f"at most {job.samples} prompts, {job.keep} calls of each batch, by whoever calibrates",
        "time": f"{job.pairs} pairs of one picture",
        "device": job.device if job.device != "cpu" else f"{here['processor']}, {used} thread(s), {here['system']}",
        "versions": ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())),
        "networks": "; ".join(networks.values()),
    }  # fmt: skip


def _shown(word: str) -> str:
    """--python torchao=env/bin/python → torchao=PYTHON."""
    peer, equal, path = word.partition("=")
    return f"{peer}=PYTHON" if equal and "/" in path and not peer.startswith("-") else word
