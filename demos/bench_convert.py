"""How much memory and time `qgen convert` takes on a large single file: python demos/bench_convert.py --gb 6

Writes a file of random bfloat16 numbers in the layout and width of FLUX.1 (as many blocks as fill it) into a temporary folder, converts it
in a process of its own, and prints the process's largest resident memory, the time and the sizes. With --interrupt S the process is sent
Ctrl-C after S seconds, and what it left behind is listed.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qgen.io.peers.writer import SafetensorsWriter

H = 3072
STREAM = {
    "mod.lin": (6 * H, H), "attn.qkv": (3 * H, H), "attn.proj": (H, H), "mlp.0": (4 * H, H), "mlp.2": (H, 4 * H),
}  # fmt: skip
DOUBLE = {f"{stream}_{name}": size for stream in ("img", "txt") for name, size in STREAM.items()}
SINGLE = {"modulation.lin": (3 * H, H), "linear1": (7 * H, H), "linear2": (H, 5 * H)}
OUTER = {
    "img_in": (H, 64), "txt_in": (H, 4096), "time_in.in_layer": (H, 256), "time_in.out_layer": (H, H), "vector_in.in_layer": (H, 768),
    "vector_in.out_layer": (H, H), "guidance_in.in_layer": (H, 256), "guidance_in.out_layer": (H, H), "final_layer.linear": (64, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}  # fmt: skip
CHILD = """
import json, sys, time
start = time.monotonic()
from qgen.io.convert import convert
convert(sys.argv[1], sys.argv[2], sys.argv[3], to=sys.argv[4], progress=lambda done, total: None)
try:
    peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
print(json.dumps({"peak": peak, "seconds": time.monotonic() - start}))
"""


def layers(gb: float):
    """(name, shape) of weights, without end of blocks: two double blocks for three single ones, as many as make `gb` GB."""
    total, double, single = 0, 0, 0
    yield from OUTER.items()
    while total < gb * 1e9 or not single:
        kind = "double" if double * 3 <= single * 2 else "single"
        number = double if kind == "double" else single
        for name, shape in (DOUBLE if kind == "double" else SINGLE).items():
            yield f"{kind}_blocks.{number}.{name}", shape
            total += 2 * shape[0] * shape[1]
        double, single = double + (kind == "double"), single + (kind == "single")


def write(path: Path, gb: float) -> None:
    """The random file. Every tensor is a stretch of one pool of Gaussian numbers, repeated: quick, and no two alike."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn((1 << 24) + 1, generator=generator).mul_(0.02).bfloat16()

    def random(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = int(torch.randint(len(pool), (1,), generator=generator))
        return pool.roll(-start).repeat(-(-count // len(pool)))[:count].reshape(shape)

    with SafetensorsWriter(path, room=1 << 18) as writer:
        for name, (n, k) in layers(gb):
            writer.add(f"{name}.weight", random(n, k))
            writer.add(f"{name}.bias", random(n))
            block = name.rpartition(".")[0]
            if name.endswith("_attn.qkv") or name.endswith("linear1"):
                inner = name.removesuffix(".qkv") if name.endswith("qkv") else block
                for what in ("query", "key"):
                    writer.add(f"{inner}.norm.{what}_norm.scale", torch.ones(128, dtype=torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=6, help="size of the random file, 10^9 bytes")
    parser.add_argument("--recipe", nargs="+", default=["rtn-int4", "rtn-nvfp4"], help="data-free recipes")
    parser.add_argument("--to", default="qgen", help="exporter")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files go; default: the system's temporary folder"
    )
    parser.add_argument("--interrupt", type=float, default=0, help="send Ctrl-C after so many seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "flux.safetensors"
        write(source, args.gb)
        size = source.stat().st_size
        print(f"{source.name}: {size / 1e9:.2f} GB", flush=True)
        for recipe in args.recipe:
            target = Path(folder) / f"{recipe}.out"
            command = [sys.executable, "-c", CHILD, str(source), recipe, str(target), args.to]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if args.interrupt:
                time.sleep(args.interrupt)
                process.send_signal(signal.SIGINT)
            out, errors = process.communicate()
            left = sorted(path.name for path in Path(folder).iterdir())
            if args.interrupt:
                print(
                    f"{recipe}: interrupted after {args.interrupt:g} s, exit code {process.returncode}, in the folder: {', '.join(left)}"
                )
                continue
            if process.returncode:
                sys.exit(errors)
            found = json.loads(out.splitlines()[-1])
            made = (
                sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
                if target.is_dir()
                else target.stat().st_size
            )
            print(
                f"{recipe} to {args.to}: peak {found['peak'] / 2**30:.2f} GiB resident, {found['seconds']:.0f} s "
                f"({size / 1e6 / found['seconds']:.0f} MB/s), {made / 1e9:.2f} GB written",
                flush=True,
            )


if __name__ == "__main__":
    main()
