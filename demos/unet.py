"""A Stable-Diffusion-style UNet at 4 bits: its recipes compared, with convolutions in 8 bits and in 4, and a picture of what they draw.

    python demos/unet.py [--n 64] [--samples 48] [--only rtn-int4,w4a8] [--out demos/unet.md]

All recipes draw held-out prompts from the same noise; scores compare with the 16-bit pipeline's pictures. The gain is the mean of the
paired differences in PSNR to the first line, with its 95 % bootstrap interval over prompts. The model is half trained (see
demos/unet/ATTRIBUTION.md): its blobs are its own, what counts is how far 4 bits move them.
"""

import argparse
import copy
import functools
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import qgen
from qgen import recipes
from qgen.calibration.recorder import Recorder
from qgen.demo import assets_dir, demo_prompts
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.show.pictures import grid
from qgen.show.rows import share_of_16_bits

HERE = Path(__file__).resolve().parent
DEFAULTS = {"num_inference_steps": 10, "guidance_scale": 3.0, "height": 64, "width": 64}
METRICS = ("psnr", "ssim", "lpips", "fid", "clip")
COLUMNS = ("noto red apple", "noto grinning face", "noto frog", "flat cactus")


# Named recipes keep convolutions at 8 bits; the last line treats them as linear layers, at 4.
LINES = {name: recipes.get(name) for name in ("rtn-int4", "svdquant-int4", "w4a8")}
LINES["svdquant-int4, convolutions W4A4"] = recipes.get("svdquant-int4").without("conv*")


def pipeline() -> Any:
    """The trained pipeline, float32, with defaults that suit 64 pixels."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    class Emoji(StableDiffusionPipeline):
        @functools.wraps(StableDiffusionPipeline.__call__)
        def __call__(self, *args: Any, **options: Any) -> Any:
            asked = inspect.signature(super().__call__).bind_partial(*args, **options).arguments
            return super().__call__(**(DEFAULTS | asked | asked.pop("kwargs", {})))

    vae = AutoencoderKL.from_pretrained(assets_dir() / "emoji-pixart" / "vae", local_files_only=True)
    return Emoji.from_pretrained(HERE / "unet", vae=vae, dtype=torch.float32, local_files_only=True)


def table(results: list[dict]) -> str:
    scores = "PSNR, dB | over the first line | SSIM | LPIPS-EffNetLite0 | FD-EffNetLite0 to real | CLIP-lite"
    rows = [f"| recipe | of the 16-bit layers | {scores} |", "|---|---|---|---|---|---|---|---|"]
    for r in results:
        s, gap = r["scores"], r["gap"]
        told = "" if gap is None else f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
        interval = f"{s['psnr'].value:.2f} [{s['psnr'].low:.2f}, {s['psnr'].high:.2f}]"
        rest = f"{s['ssim'].value:.3f} | {s['lpips'].value:.3f} | {s['fid'].value:.1f} | {s['clip'].value:.2f}"
        rows.append(f"| {r['label']} | {r['size']:.3f} | {interval} | {told} | {rest} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=48, help="calibration prompts")
    parser.add_argument("--steps", type=int, default=4, help="denoiser calls kept per calibration prompt")
    parser.add_argument("--only", help="labels of lines, separated by semicolons")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "unet.md")
    parser.add_argument("--picture", type=Path, default=HERE / "pictures" / "unet.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = demo_prompts("held_out")[: options.n]
    pipe = pipeline()
    float_unet, real = pipe.unet, assets_dir() / "emoji_features.safetensors"
    reference = generate(pipe, prompts, progress=False)
    before = qgen.evaluate(reference, prompts=prompts, metrics=("fid", "clip"), real=real)
    shown = [("16 bits", generate(pipe, COLUMNS, progress=False))]
    recorder = Recorder(samples=options.samples, steps=options.steps)
    calls = recorder.calls(pipe, {"unet": float_unet}, demo_prompts("calibration"))
    results: list[dict] = []
    for label, recipe in LINES.items():
        if options.only and label not in options.only.split(";"):
            continue
        pipe.unet = copy.deepcopy(float_unet)
        qgen.quantize(pipe, recipe, calibration=calls, progress=False)
        scores = qgen.evaluate(pipe, reference=reference, prompts=prompts, metrics=METRICS, real=real, progress=False)
        report = pipe.unet.qgen_report
        size = share_of_16_bits(report)
        psnr = torch.tensor(scores.per_prompt["psnr"])
        gap = bootstrap_difference(psnr, results[0]["psnr"]) if results else None
        output = next((row["sqnr_db"] for row in report if row["path"] == "(output)"), float("nan"))
        results.append({"label": label, "size": size, "scores": scores, "psnr": psnr, "gap": gap})
        print(f"{label}: output SQNR {output:.2f} dB\n{scores.table()}", flush=True)
        if recipe == recipes.get(recipe.name):  # what a user gets by name
            shown.append((label, generate(pipe, COLUMNS, progress=False)))
    about = "\n".join(__doc__.strip().splitlines()[4:])
    command = shlex.join(["python", "demos/unet.py", *sys.argv[1:]])
    text = (
        f"# A UNet at 4 bits\n\n{about}\n\n{len(prompts)} prompts, 10 steps, guidance 3; calibrated on {options.samples} prompts x "
        f"{options.steps} steps; float32 on a CPU. The 16-bit pipeline's own pictures: FD-EffNetLite0 {before['fid'].value:.1f}, CLIP-lite "
        f"{before['clip'].value:.2f}. Written by `{command}`. Unless the line says "
        "otherwise, convolutions inside blocks have 8-bit weights and inputs (int8, a scale per output and per patch); time-embedding "
        "layers keep 16-bit inputs, as in every recipe.\n\n"
        f"{table(results)}\n\n![The same prompts and noise at 16 bits and at 4](pictures/unet.png)\n"
    )
    options.out.write_text(text, encoding="utf-8")
    grid(shown, COLUMNS, "64 x 64 UNet, half trained: same prompts, same noise").save(options.picture)


if __name__ == "__main__":
    main()
