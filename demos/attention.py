"""Low-bit attention on the shipped pipeline: what it costs in pictures, layer by layer, on top of quantized linear layers.

    python demos/attention.py [--n 32] [--recipe svdquant-int4] [--markdown demos/attention.md]

Held-out prompts are drawn by the 16-bit pipeline, by one with quantized linear layers and torch's attention, and by the same linear layers
with each way of attention, from the same noise; each row gives the PSNR against the 16-bit pictures, and what attention took from it. The
linear layers are quantized once: attention is chosen from the same recorded calls and put on and taken off the same model. Then every
choice is measured again on calls of held-out prompts: an "auto" choice is to stay within its budget there too, or says by how much not.
"""

import argparse
from pathlib import Path

import torch

import qgen
from qgen.calibration.recorder import Recorder
from qgen.demo import demo_prompts
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.methods.attention import AttentionSpec, choose, observe
from qgen.nn.attention import install, remove

WAYS = {
    "auto": AttentionSpec("auto"),
    "int8": AttentionSpec("int8"),
    "int8, P v in 16 bits": AttentionSpec("int8", budget=1e-9),
    "fp4": AttentionSpec("fp4"),
}


def decibel(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """PSNR of each picture (N, H, W, C) in [0, 1]."""
    return -10 * (images.float() - wanted.float()).square().flatten(1).mean(1).clamp_min(1e-12).log10()


def worst_errors(module: torch.nn.Module, choices, calls) -> list[float]:
    """Worst error of each owner's choices on these calls, in the ranges where it is not torch's own attention."""
    remove(module)
    seen = observe(module, calls.calls, choices.edges, [spec for spec in choices.specs if spec])
    found = []
    for path, used in choices.layers.items():
        errors = seen.owners[path].errors
        found.append(max(errors[i][spec] for i, spec in enumerate(used) if spec and i in errors))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=32, help="held-out prompts")
    parser.add_argument("--recipe", default="svdquant-int4")
    parser.add_argument("--samples", type=int, default=64, help="calibration prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = demo_prompts("held_out")[: options.n]
    reference = generate(qgen.demo_pipeline(), prompts)
    pipe = qgen.demo_pipeline()
    parts = {"transformer": pipe.transformer}
    calls = Recorder(options.samples).calls(pipe, parts, demo_prompts("calibration"))["transformer"]
    unseen = Recorder(16).calls(pipe, parts, prompts)["transformer"]
    qgen.quantize(pipe, options.recipe, calibration=calls, progress=False)
    before = decibel(generate(pipe, prompts), reference)
    rows = [("torch's, 16 bits", f"{float(before.mean()):.2f}", "", "", "", "")]
    listed = []
    for name, spec in WAYS.items():
        choices, report = choose(pipe.transformer, spec, calls)
        worst = max(worst_errors(pipe.transformer, choices, unseen), default=0.0)
        install(pipe.transformer, choices)
        now = decibel(generate(pipe, prompts), reference)
        remove(pipe.transformer)
        change = bootstrap_difference(now, before)
        served = {row["spec"] for row in report if row["spec"] != "float"}
        untouched = [f"{name}: `{row['path']}`: {row['why']}" for row in report if row["spec"] == "float"]
        listed += untouched
        budget = f"{spec.budget:g}" if spec.mode == "auto" else ""
        interval = f"{change.mean:+.2f} ({change.low:+.2f} … {change.high:+.2f})"
        many = f"{len(report) - len(untouched)} of {len(report)}"
        rows.append((name, f"{float(now.mean()):.2f}", interval, many, f"{worst:.4f}", budget))
        print(*rows[-1], sorted(served), flush=True)
    page = markdown(rows, listed, options)
    print(page)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")


def markdown(rows: list[tuple[str, ...]], listed: list[str], options: argparse.Namespace) -> str:
    """The page for the docs."""
    lines = [
        "# Attention in low bits", "",
        f"The shipped pipeline, linear layers by `{options.recipe}`, {options.n} held-out prompts, PSNR against the 16-bit",
        f"pipeline's pictures of the same noise; torch {torch.__version__.split('+')[0]}, CPU:",
        f"`python demos/attention.py --n {options.n}`. Change: paired, with the 95 % bootstrap interval over prompts.",
        "Worst error: of any layer's attention, relative, on calls of held-out prompts.", "",
        "| attention | PSNR dB | change | layers served | worst error | budget |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Untouched:" if listed else "No layer was left untouched.", *(f"* {line}" for line in listed)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
