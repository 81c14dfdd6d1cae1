"""Peak memory of calibration under `memory=`, each measured in a process of its own, and whether the packed layers are the same.

    python demos/bench_memory.py [--memory none 256MiB 64MiB] [--width 512] [--blocks 6] [--calls 8] [--tokens 512]

The model: transformer blocks with random weights whose statistics (second moments and samples of rows) are larger than itself. Peak is the
largest resident memory during `qgen.quantize` above that right before it (Linux: VmHWM, reset by `clear_refs`), so that it holds what
methods and packed layers take besides; "planned" is the largest sum of statistics that a replay gathers.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import qgen
from qgen import engine
from qgen.methods.gptq import GPTQ
from qgen.nn.packed import Packed


class Block(nn.Module):
    """An MLP with a residual: two layers, two inputs, of width K and 4 K."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def status(word: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(word)).split()[1])


def measure(options: argparse.Namespace) -> dict:
    """In this process: one quantization under one budget."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks))).eval().requires_grad_(False)
    calls = [torch.randn(1, options.tokens, options.width) for _ in range(options.calls)]
    weights = sum(p.nbytes for p in model.parameters())
    planned, replays, whole = [], [], engine.measure

    def counted(module, wave, *rest):
        planned.append(wave.nbytes)
        replays.append(1)
        return whole(module, wave, *rest)

    engine.measure = counted
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    recipe = qgen.Recipe(qgen.Spec("int4_g64", None, (GPTQ(damps=(0.02,)),)))
    memory = None if options.one == "none" else options.one
    qgen.quantize(model, recipe, calibration=calls, memory=memory, progress=False)
    digest = hashlib.sha256()
    for path, layer in model.named_modules():
        if isinstance(layer, Packed):
            for slot, t in layer.canonical().items():
                digest.update(f"{path}.{slot}".encode() + t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "memory": options.one,
        "peak": status("VmHWM") - before,
        "planned": max(planned),
        "replays": len(replays),
        "weights": weights,
        "bytes": digest.hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", nargs="+", default=["none", "256MiB", "64MiB"], help="budgets; none = the default")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("width", "blocks", "calls", "tokens")]
    print("| memory= | replays | planned statistics, MB | peak above start, MB | 32-bit weights, MB | packed layers |")
    print("|---|---|---|---|---|---|")
    for memory in options.memory:
        command = [sys.executable, __file__, *sizes, "--one", memory]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        mb = {name: f"{row[name] / 1e6:.0f}" for name in ("planned", "peak", "weights")}
        print(
            f"| {memory} | {row['replays']} | {mb['planned']} | {mb['peak']} | {mb['weights']} | {row['bytes']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
