"""Measures what each published method gains over what it refines, on the shipped pipeline, and writes `demos/methods.md`.

    python demos/methods.py [--n 24] [--samples 48] [--only adaround,vq4dit] [--out demos/methods.md]

Each line quantizes the pipeline twice, with the same formats (or those named) and the same recorded calls: once without the method and once
with it. PSNR is against the 16-bit pipeline's pictures from the same noise, on prompts whose names calibration never saw; the gain is the
mean of the paired differences with its 95 % bootstrap interval over prompts. The model is small and its activations are mild: a method that
lives on outliers gains more on large models, and one that overfits loses more here.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qgen
from qgen import Recipe, Rule, Spec, formats
from qgen.demo import demo_prompts
from qgen.engine import record
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.eval.psnr import psnr
from qgen.methods.adaround import AdaRound
from qgen.methods.gptq import GPTQ
from qgen.methods.preshift import PreShift
from qgen.methods.rotate import Rotate
from qgen.methods.signround import SignRound
from qgen.methods.smooth import Smooth
from qgen.methods.vq4dit import VQ4DiT


@dataclass(frozen=True)
class Line:
    """A comparison: `refined` against `base`. card: paper; where: module of qgen that holds the idea."""

    key: str
    card: str
    where: str
    base: Spec
    refined: Spec


def _line(key: str, card: str, where: str, weight: str, act: str | None, before: tuple, method: Any) -> Line:
    return Line(key, card, where, Spec(weight, act, before), Spec(weight, act, (*before, method)))


LINES = (
    _line("adaround", "AdaRound", "methods.adaround", "int4_g64", None, (), AdaRound()),
    _line("fp4dit", "FP4DiT (AdaRound on FP4)", "methods.adaround", "fp4_e2m1_g128", "fp8_e4m3_row", (), AdaRound()),
    _line("signround", "SignRound", "methods.signround", "uint4_g64", None, (), SignRound()),
    _line("gptq", "GPTQ", "methods.gptq", "uint4_g64", None, (), GPTQ()),
    _line("smooth", "SmoothQuant (static half of ViDiT-Q)", "methods.smooth", "int4_row", "int4_row", (), Smooth()),
    _line(
        "vidit", "ViDiT-Q: rotation after smoothing", "methods.rotate", "int4_row", "int4_row", (Smooth(),), Rotate()
    ),
    _line(
        "preshift", "LLM-FP4: pre-shifted exponents", "methods.preshift", "fp4_e2m1_row", "fp4_e2m1_row", (), PreShift()
    ),
    _line("vq4dit", "VQ4DiT", "methods.vq4dit", "vq2_d4", None, (), VQ4DiT()),
    Line("binarydm", "BinaryDM: a second basis", "formats.multibasis", Spec("binary_g64"), Spec("binary2_g64")),
    Line("bases", "BinaryDM: two bases for int2's steps", "formats.multibasis", Spec("int2_g64"), Spec("binary2_g64")),
)


def recipe_of(spec: Spec) -> Recipe:
    """The spec inside blocks; embedders and heads stay float, time and modulation layers take 4-bit weights, as in the named recipes."""
    vector = Rule("*", Spec("int4_g64"), role="vector", why="one row per sample")
    return Recipe(spec, (vector, Rule("*", None, role="outside", why="embedder or head")), "line")


def words(spec: Spec) -> str:
    steps = " + ".join(method.name for method in spec.methods) or "nearest"
    return f"{spec.weight} x {spec.act or 'float'}, {steps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=24, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=48, help="calibration prompts")
    parser.add_argument("--only", help="comma-separated keys of lines")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = demo_prompts("held_out")[: options.n]
    reference = generate(qgen.demo_pipeline(), prompts, progress=False)
    calls = record(qgen.demo_pipeline(), demo_prompts("calibration"), samples=options.samples, steps=4, progress=False)
    known: dict[Spec, torch.Tensor] = {}

    def score(spec: Spec) -> torch.Tensor:
        if spec not in known:
            pipe = qgen.demo_pipeline()
            qgen.quantize(pipe, recipe_of(spec), calibration=calls, progress=False)
            known[spec] = psnr(generate(pipe, prompts, progress=False), reference)
        return known[spec]

    rows = []
    for line in LINES:
        if options.only and line.key not in options.only.split(","):
            continue
        base, refined = score(line.base), score(line.refined)
        gap = bootstrap_difference(refined, base)
        bits = "/".join(
            dict.fromkeys(f"{formats.get(s.weight).bits_per_value(256):.2f}" for s in (line.base, line.refined))
        )
        rows.append(
            f"| {line.card} | `qgen.{line.where}` | {bits} | {words(line.base)}: {base.mean():.2f} | "
            f"{words(line.refined)}: {refined.mean():.2f} | {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}] |"
        )
        print(rows[-1], flush=True)
    head = "| card | where | bits per weight | refines: PSNR dB | with it: PSNR dB | gain, 95 % interval |\n|---|---|---|---|---|---|"
    about = "\n".join(__doc__.strip().splitlines()[4:])
    conditions = f"{options.n} prompts, 20 steps; calibrated on {options.samples} prompts x 4 steps; float32 on a CPU."
    command = f"python demos/methods.py --n {options.n} --samples {options.samples}"
    text = (
        f"# Published methods, measured\n\n{about}\n\n{conditions} Written by `{command}`.\n\n{head}\n"
        + "\n".join(rows)
        + "\n"
    )
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
