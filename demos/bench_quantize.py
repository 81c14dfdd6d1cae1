"""Time, peak memory and size of quantizing a PixArt-Σ-sized transformer (0.6 B random parameters) on this machine's CPU.

    python demos/bench_quantize.py [--recipe svdquant-int4] [--layers 28] [--calls 16] [--tokens 256] [--threads 2] [--json out.json]

Prints where the time goes (recording is not part of it: the calls are given), the peak resident memory above the loaded 16-bit model, and
the size on disk against 16-bit weights, everything counted: codes, scales, low rank, smoothing, layers kept in 16 bits.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch

import qgen
import qgen.engine
from qgen import waves


def pixart_sigma(layers: int, tokens: int):
    """PixArt-Σ's transformer with random weights: hidden 1152, 16 heads, MLP 4608, captions of 4096; bf16."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    side = round(tokens**0.5) * 2
    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers, cross_attention_dim=1152,
        caption_channels=4096, sample_size=side, patch_size=2, use_additional_conditions=False, norm_type="ada_norm_single",
    )  # fmt: skip
    return model.to(torch.bfloat16).eval(), side


def calls_for(model, side: int, count: int):
    """Random denoiser calls, one prompt each: latents, 120 text tokens, timesteps spread over the schedule."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return [
        {
            "hidden_states": noise(1, 4, side, side),
            "encoder_hidden_states": noise(1, 120, 4096),
            "timestep": torch.tensor([round(999 * (i + 0.5) / count)]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        for i in range(count)
    ]


class Peak(threading.Thread):
    """Samples resident memory until stopped; `top` is the largest value seen, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.top, self.going = 0, True
        self.start()

    def run(self):
        while self.going:
            self.top = max(self.top, resident())
            time.sleep(0.02)

    def stop(self) -> int:
        self.going = False
        self.join()
        return self.top


def resident() -> int:
    """Resident bytes of this process (Linux); elsewhere the peak so far."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clocked(clock: dict, owner, name: str, label: str):
    """Adds the time spent in `owner.name` to `clock[label]`, and takes it off whatever it was called from."""
    inner = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            clock[label] += time.perf_counter() - start

    setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="svdquant-int4")
    parser.add_argument("--layers", type=int, default=28, help="transformer blocks (28 = PixArt-Σ)")
    parser.add_argument("--calls", type=int, default=16, help="recorded denoiser calls, one prompt each")
    parser.add_argument("--tokens", type=int, default=256, help="image tokens per call")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, side = pixart_sigma(options.layers, options.tokens)
    calls = calls_for(model, side, options.calls)
    bytes16 = sum(p.nbytes for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    recipe = qgen.recipes.get(options.recipe)
    clock: dict[str, float] = defaultdict(float)
    clocked(clock, qgen.engine, "measure", "replay and observe")
    for method in recipe.default.methods:
        clocked(clock, type(method), "refine", method.name)
    clocked(clock, waves, "refine", "methods, all")
    loaded, peak, start = resident(), Peak(), time.perf_counter()
    qgen.quantize(model, recipe, calibration=calls)
    seconds, top = time.perf_counter() - start, peak.stop()
    with tempfile.TemporaryDirectory() as folder:
        qgen.save(model, folder)
        disk = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    clock["rest"] = seconds - clock["methods, all"] - clock["replay and observe"]
    output = next(row["sqnr_db"] for row in model.qgen_report if row["path"] == "(output)")
    result = {
        "recipe": options.recipe,
        "parameters": count,
        "seconds": round(seconds, 1),
        "peak_above_model": round((top - loaded) / bytes16, 3),
        "disk_ratio": round(disk / bytes16, 4),
        "output_sqnr_db": round(output, 2),
        "clock": {name: round(value, 1) for name, value in sorted(clock.items(), key=lambda item: -item[1])},
        **{name: getattr(options, name) for name in ("layers", "calls", "tokens", "threads")},
    }
    print(f"{options.recipe} on {options.layers} blocks, {bytes16 / 1e6:.0f} MB at 16 bits, {options.threads} threads")
    print(f"  time                     {seconds:8.1f} s")
    for name, value in result["clock"].items():
        print(f"    {name:<22} {value:8.1f} s")
    print(
        f"  peak above loaded model  {(top - loaded) / 1e6:8.0f} MB = {result['peak_above_model']:.2f} x the 16-bit model"
    )
    print(f"  on disk                  {disk / 1e6:8.1f} MB = {result['disk_ratio']:.4f} of 16 bits")
    print(f"  output SQNR              {output:8.2f} dB on held-out calls")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
