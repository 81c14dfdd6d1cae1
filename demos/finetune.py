"""What fine-tuning by the 16-bit teacher gains on the shipped pipeline, per method and weight format, on prompts that nobody was fitted to.

    python demos/finetune.py [--recipe rtn-int4] [--weights int4_g64 int3_g64] [--methods full qvgen …] [--steps 200] [--out table.md]

The teacher draws calibration prompts; its denoiser's calls are the lessons. Judged is the denoiser on the teacher's calls for held-out
prompts: error = ‖ŷ − y‖² / ‖y‖², by prompt, mean over steps and both halves of guidance. Given are the means before and after and the
paired difference with its 95 % bootstrap interval over prompts: above zero is a gain. "slots" says whether every layer ended with
the tensors that it had, `seconds` is processor time of the fine-tuning. --pictures adds the PSNR of pictures, paired likewise.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import qgen
from qgen.calibration.base import CalibrationSet
from qgen.calibration.recorder import Recorder
from qgen.demo import demo_prompts
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.train.distill import first

METHODS = ("full", "efficientdm", "quest", "qvgen", "scales", "bias", "qzo", "brecq", "qdrop")


def errors(module: torch.nn.Module, calls: CalibrationSet, answers: list[Tensor]) -> Tensor:
    """(n,) relative error by prompt: a call holds both halves of guidance for its prompts."""
    found: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for call, want in zip(calls.calls, answers, strict=True):
            lost = (first(call.run(module)) - want).flatten(1).square().sum(1) / want.flatten(1).square().sum(1)
            found.setdefault(call.moment.sample, []).append(torch.stack(lost.chunk(2)).mean(0))
    return torch.cat([torch.stack(rows).mean(0) for rows in found.values()])


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """(n,) in dB."""
    return -10 * torch.log10((found - wanted).square().flatten(1).mean(1).clamp_min(1e-12))


def shapes(module: torch.nn.Module) -> dict:
    return {name: (t.shape, t.dtype) for name, t in module.state_dict().items()}


def student(options: argparse.Namespace, weight: str, calls: CalibrationSet):
    """A fresh quantized pipeline; `weight` takes the place of the recipe's main weight format."""
    recipe = qgen.recipes.get(options.recipe)
    recipe = replace(recipe, default=replace(recipe.default, weight=weight))
    pipe = qgen.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return qgen.quantize(pipe, recipe, calibration=calls, seed=options.seed, progress=False)


def measure(options: argparse.Namespace) -> list[dict]:
    teacher = qgen.demo_pipeline()
    teacher.set_progress_bar_config(disable=True)
    record = lambda count, keep, split: Recorder(count, keep, batch=options.prompts_per_call).calls(  # noqa: E731
        teacher, {"transformer": teacher.transformer}, demo_prompts(split), seed=options.seed
    )["transformer"]
    lessons, judged = record(options.samples, 8, "calibration"), record(options.n, 4, "held_out")
    with torch.no_grad():
        answers = [first(call.run(teacher.transformer)) for call in judged.calls]
    prompts = demo_prompts("held_out")[: options.n]
    drawn = generate(teacher, prompts, progress=False) if options.pictures else None
    results = []
    for weight in options.weights:
        for method in options.methods:
            pipe = student(options, weight, lessons)
            before, slots = errors(pipe.transformer, judged, answers), shapes(pipe.transformer)
            pictures = generate(pipe, prompts, progress=False) if options.pictures else None
            start = time.process_time()
            qgen.finetune(
                pipe, teacher, method, steps=options.steps, calibration=lessons, seed=options.seed, progress=options.progress,
                every=options.every, checkpoint=options.checkpoint and options.checkpoint / f"{options.recipe}-{weight}-{method}",
            )  # fmt: skip
            seconds = time.process_time() - start
            after = errors(pipe.transformer, judged, answers)
            gain = bootstrap_difference(before, after)
            told = pipe.transformer.qgen_tuning
            row = {
                "recipe": options.recipe, "weight": weight, "method": method, "n": len(before), "before": float(before.mean()),
                "after": float(after.mean()), "gain": [gain.mean, gain.low, gain.high], "best": told["best"], "steps": options.steps,
                "slots": shapes(pipe.transformer) == slots, "seconds": seconds, "held": told["held"],
            }  # fmt: skip
            if drawn is not None:
                now = psnr(generate(pipe, prompts, progress=False), drawn)
                gap = bootstrap_difference(now, psnr(pictures, drawn))
                row["psnr_db"] = {"after": float(now.mean()), "gain": [gap.mean, gap.low, gap.high]}
            results.append(row)
            print(line(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def line(row: dict) -> str:
    """A row of the table."""
    gain = "{:.4f} [{:.4f}, {:.4f}]".format(*row["gain"])
    cells = [row["recipe"], row["weight"], row["method"], f"{row['before']:.4f}", f"{row['after']:.4f}", gain]
    if "psnr_db" in row:
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}] dB".format(*row["psnr_db"]["gain"]))
    cells += ["same" if row["slots"] else "CHANGED", f"{row['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def table(results: list[dict]) -> str:
    names = ["recipe", "weights", "method", "error before", "error after", "gain (95 %)"]
    names += ["PSNR gain (95 %)"] * ("psnr_db" in results[0]) + ["slots", "seconds"]
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(line(row) for row in results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="rtn-int4")
    parser.add_argument("--weights", nargs="+", default=["int4_g64", "int3_g64"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=200, help="of brecq and qdrop: for each block")
    parser.add_argument(
        "--every", type=int, default=50, help="steps between looks at the calls held out of the lessons"
    )
    parser.add_argument("--n", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=160, help="prompts that are learned from")
    parser.add_argument("--prompts-per-call", type=int, default=4)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="folder for progress: the same command goes on from there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="the table in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = table(measure(options))
    if options.out:
        options.out.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
