"""`python -m qgen.kernels.bench [linear] [attention] [act] [conv]`: how fast kernels are on this GPU, next to others.

Nothing is timed that is not right first: every kernel is held to plain torch on the same codes. Reported are medians
of CUDA events, the percent of what the card's data sheet allows, and the ratio to 16-bit torch; with the GPU, its
clocks and power limit, and the versions of what ran.

    python -m qgen.kernels.bench linear --runs 100 --json linear.json
    python -m qgen.kernels.bench linear act --tune entries.json

Exit code 0: all contestants of qgen were right; 1: one was not; 3: there is no GPU.
"""

__all__ = ["OPS", "main"]

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from qgen.errors import unknown
from qgen.kernels import bench_linear, bench_other, bench_tune, doctor, tuning
from qgen.kernels.bench_run import Contest, Result, run
from qgen.kernels.bench_timer import Clock, CudaClock, gpu_state
from qgen.kernels.roofline import card_of

OPS: dict[str, tuple[Callable[..., Contest], tuple[tuple[int, ...], ...]]] = {
    "linear": (bench_linear.contest, bench_linear.SHAPES),
    "attention": (bench_other.attention_contest, bench_other.ATTENTION_SHAPES),
    "act": (bench_other.act_contest, bench_other.ACT_SHAPES),
    "conv": (bench_linear.conv_contest, bench_linear.CONV_SHAPES),
}
OURS = ("triton", "gluon", "scaled_mm")
TUNED = {  # beginning of a contestant's name to the op of `tuning.TABLE`; the first that fits
    "triton_w4a4: 4-bit integers with zero points": "linear_zeros",
    "triton_w4a4": "linear_groups",
    "triton_w4a8": "linear_groups",
    "triton_w4a16": "w4a16",
    "triton_w": "linear",
    "triton_nvfp4": "fp4",
    "triton_mxfp4": "fp4",
    "triton_act": "act",
}


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None, device: torch.device | None = None) -> int:
    """The program; returns its exit code. clock, device: instead of CUDA events on the first GPU."""
    parser = _options()
    options = parser.parse_args(arguments)
    if wrong := [op for op in options.ops if op not in OPS]:
        parser.error(unknown("op", wrong[0], OPS))
    if device is None:
        if not torch.cuda.is_available():
            print("qgen.kernels.bench needs a GPU, torch sees none; `python -m qgen.kernels.aot` needs none")
            return 3
        device = torch.device("cuda", torch.cuda.current_device())
    clock = clock or CudaClock(device)
    state = gpu_state(device) if device.type == "cuda" else {"name": device.type}
    card = card_of(state["name"])
    print(f"{', '.join(f'{name} {value}' for name, value in state.items())}; {_versions()}")
    if card is None:
        print("The data sheet of this card is not known: no percent of the roof.")
    results: list[Result] = []
    entries: list[dict] = []
    for op in options.ops or ["linear"]:
        make, shapes = OPS[op]
        for shape in shapes[:1] if options.quick else shapes:
            contest = make(shape, device, card)
            rows = run(contest, clock, options.runs)
            _print(contest, rows)
            results += rows
            if options.tune:
                entries += _tune(contest, device, clock, shape[0])
    if options.json:
        content = {"gpu": state, "versions": _versions(), "results": [asdict(row) for row in results]}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.tune:
        options.tune.write_text(json.dumps({"gpu": state, "entries": entries}, indent=1), encoding="utf-8")
        print(f"{len(entries)} faster launches written to {options.tune}; {tuning.VARIABLE}={options.tune} uses them")
    return 1 if any(row.seconds is None and row.name.startswith(OURS) for row in results) else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qgen.kernels.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default linear")
    parser.add_argument("--runs", type=int, default=50, help="calls that are timed, per contestant")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op only")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument(
        "--tune", type=Path, metavar="FILE", help="search launch configurations and write the faster ones"
    )
    return parser


def _print(contest: Contest, rows: list[Result]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"\n{contest.op} {contest.shape}")
    print(
        f"  {'':<{width}}  {'median us':>10} {'20..80 %':>17} {'TFLOP/s':>8} {'roof':>5} {'x 16-bit':>8} {'error':>8}"
    )
    for row in rows:
        if row.seconds is None:
            print(f"  {row.name:<{width}}  {row.why}")
            continue
        spread = f"{row.low * 1e6:.1f}..{row.high * 1e6:.1f}"
        roof = "" if row.roof is None else f"{row.roof:.0%}"
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
        numbers = f"{row.seconds * 1e6:>10.1f} {spread:>17} {row.tflops:>8.1f} {roof:>5} {speedup:>8} {row.error:>8.1e}"
        print(f"  {row.name:<{width}}  {numbers}")


def _tune(contest: Contest, device: torch.device, clock: Clock, m: int) -> Iterator[dict]:
    """Faster launches for those contestants whose launch comes from `tuning.TABLE`."""
    _, capability = doctor.capability(device)
    family = tuning.family(capability)
    for contestant in contest.contestants:
        op = next((op for prefix, op in TUNED.items() if contestant.name.startswith(prefix)), None)
        if op is None or contest.op not in ("linear", "act"):
            continue
        entry, _ = bench_tune.tune(op, family, m, contestant, contest.truth(contestant.name), clock)
        if entry is not None:
            yield {**entry, "shape": contest.shape, "kernel": contestant.name}


def _versions() -> str:
    names = ("torch", "triton", "bitsandbytes", "torchao", "comfy-kitchen", "sageattention", "flash-attn")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
