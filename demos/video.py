"""A video model at 4 bits: PSNR of every frame and flicker between frames, and film strips of what the recipes draw.

    python demos/video.py [--n 32] [--samples 32] [--only rtn-int4,w4a8] [--out demos/video.md]

The model is a Wan transformer of 1.2 M parameters that draws 8 frames of 32 x 32 pixels: one coloured shape that moves. It was trained by
demos/train/train_video.py (16 CPU minutes: colours are right, outlines are blobs) on films made by demos/train/moving_shapes.py; 256
tokens of all frames lie in one sequence. Prompts that are
scored were not used in calibration. All recipes start from the same noise; scores compare with the 16-bit model's films. Flicker is the
mean difference of frame differences: an error that stays the same in every frame costs nothing there, one that comes and goes does.
"""

import argparse
import copy
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

import qgen
from qgen.calibration.recorder import Recorder
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import seed_of
from qgen.eval.psnr import psnr
from qgen.eval.video import evaluate_video
from qgen.show.pictures import grid

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "train"))  # the films and the pipeline are the training script's

from moving_shapes import ShapesPipeline, prompts  # noqa: E402

RECIPES = ("rtn-int4", "svdquant-int4", "temporal-int4", "w4a8", "w4a16")
SHOWN = ("green triangle left", "red square away")


def draw(pipe: ShapesPipeline, asked: list[str]) -> Tensor:
    """Films (n, T, H, W, 3), each from noise that depends on its prompt alone."""
    return pipe(asked, [torch.Generator().manual_seed(seed_of(prompt)) for prompt in asked])


def per_frame(films: Tensor, reference: Tensor) -> tuple[list[float], list[float]]:
    """Mean PSNR of each frame in dB, and mean flicker between each frame and the next in 1/255."""
    frames = [float(psnr(films[:, t], reference[:, t]).clamp_max(100).mean()) for t in range(films.shape[1])]
    change = (films.diff(dim=1) - reference.diff(dim=1)).abs() * 255
    return frames, change.mean((0, 2, 3, 4)).tolist()


def text(results: list[dict], options: argparse.Namespace) -> str:
    about = "\n".join(__doc__.strip().splitlines()[4:])
    lines = [
        "# A video model at 4 bits", "", about, "",
        f"{options.n} films, 20 steps, guidance 2; calibrated on {options.samples} prompts x {options.steps} steps; float32 on a CPU. "
        f"Written by `{shlex.join(['python', 'demos/video.py', *sys.argv[1:]])}`.", "",
        "| recipe | per-frame PSNR, dB | over the first line | flicker, 1/255 | over the first line |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results:
        cells = []
        for metric in ("video_psnr", "video_flicker"):
            gap = r["gaps"].get(metric)
            cells += [
                f"{r['scores'][metric].value:.2f} [{r['scores'][metric].low:.2f}, {r['scores'][metric].high:.2f}]"
            ]
            cells += ["" if gap is None else f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"]
        lines.append(f"| `{r['recipe']}` | " + " | ".join(cells) + " |")
    count = len(results[0]["frames"][0])
    for title, at in (("PSNR by frame, dB", 0), ("Flicker between a frame and the next, 1/255", 1)):
        steps = range(1, count + 1 - at)
        lines += [
            "",
            f"{title}:",
            "",
            "| recipe | " + " | ".join(map(str, steps)) + " |",
            "|---" * (len(steps) + 1) + "|",
        ]
        lines += [f"| `{r['recipe']}` | " + " | ".join(f"{v:.2f}" for v in r["frames"][at]) + " |" for r in results]
    return "\n".join([*lines, "", "![Film strips at 16 bits and at 4](pictures/video.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=32, help="films that are scored")
    parser.add_argument("--samples", type=int, default=32, help="calibration prompts")
    parser.add_argument("--steps", type=int, default=6, help="denoiser calls kept per calibration prompt")
    parser.add_argument("--only", help="comma-separated recipes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=HERE / "video")
    parser.add_argument("--out", type=Path, default=HERE / "video.md")
    parser.add_argument("--picture", type=Path, default=HERE / "pictures" / "video.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = ShapesPipeline.from_folder(options.model)
    asked, original = prompts()[1::2][: options.n], pipe.transformer
    reference, strips = draw(pipe, asked), draw(pipe, list(SHOWN))
    rows = [(f"16 bits\n{prompt}", film) for prompt, film in zip(SHOWN, strips, strict=True)]
    recorder = Recorder(samples=options.samples, steps=options.steps)
    calls = recorder.calls(pipe, pipe.components, pipe.calibration_prompts)
    results: list[dict] = []
    for name in options.only.split(",") if options.only else RECIPES:
        pipe.transformer = copy.deepcopy(original)
        qgen.quantize(pipe, name, calibration=calls, progress=False)
        films = draw(pipe, asked)
        scores = evaluate_video(films, reference)
        gaps = {
            metric: bootstrap_difference(scores.per_prompt[metric], results[0]["scores"].per_prompt[metric])
            for metric in ("video_psnr", "video_flicker")
            if results
        }
        results.append({"recipe": name, "scores": scores, "gaps": gaps, "frames": per_frame(films, reference)})
        print(f"{name}\n{scores.table()}", flush=True)
        if name in ("rtn-int4", "svdquant-int4"):
            strips = draw(pipe, list(SHOWN))
            rows += [(f"{name}\n{prompt}", film) for prompt, film in zip(SHOWN, strips, strict=True)]
    options.out.write_text(text(results, options), encoding="utf-8")
    rows.sort(key=lambda row: SHOWN.index(row[0].partition("\n")[2]))  # by prompt, recipes in order
    frames = [f"frame {t + 1}" for t in range(reference.shape[1])]
    grid(rows, frames, "Moving shapes, 8 frames of 32 x 32: same prompts, same noise", least=96).save(options.picture)


if __name__ == "__main__":
    main()
