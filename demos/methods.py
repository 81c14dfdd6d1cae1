"""Measures what each published method gains over what it refines, on the shipped pipeline, and writes `demos/methods.md`.

    python demos/methods.py [--n 24] [--samples 48] [--only adaround,vq4dit] [--out demos/methods.md]

Each line quantizes the pipeline twice, with the same formats (or those named) and the same recorded calls: once without the method and once
with it. PSNR is against the 16-bit pipeline's pictures from the same noise, on prompts whose names calibration never saw; the gain is the
mean of the paired differences with its 95 % bootstrap interval over prompts. The model is small and its activations are mild: a method that
lives on outliers gains more on large models, and one that overfits loses more here. Lines of attention round nothing but its probabilities.
The line of MixDQ's start token draws with the UNet of `demos/unet.py`, which reads CLIP, and rounds nothing but what reads the text.
"""

import argparse
import functools
import importlib.util
from contextlib import nullcontext
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
from qgen.methods.dither import Dither
from qgen.methods.format_search import FormatSearch
from qgen.methods.gptq import GPTQ
from qgen.methods.learned_bases import LearnedBases
from qgen.methods.lowrank import LowRank
from qgen.methods.preshift import PreShift
from qgen.methods.reparametrize import Reparametrize
from qgen.methods.rotate import Rotate
from qgen.methods.signround import SignRound
from qgen.methods.smooth import Smooth
from qgen.methods.start_token import StartToken
from qgen.methods.temporal import Center, Static
from qgen.methods.vq4dit import VQ4DiT
from qgen.nn.probabilities import ProbabilitySpec, simulated


@dataclass(frozen=True)
class Line:
    """A comparison: `refined` against `base`. card: paper; where: module of qgen that holds the idea.

    vector: methods of time and modulation layers in `refined`. text: whether it is about the UNet's layers that read text alone.
    """

    key: str
    card: str
    where: str
    base: Spec | ProbabilitySpec
    refined: Spec | ProbabilitySpec
    vector: tuple = ()
    text: bool = False


def _line(key: str, card: str, where: str, weight: str, act: str | None, before: tuple, method: Any) -> Line:
    return Line(key, card, where, Spec(weight, act, before), Spec(weight, act, (*before, method)))


SPLITS = ("fp4_e1m2_g64", "fp4_e2m1_g64", "fp4_e3m0_g64")
UNSIGNED = ("ufp4_e1m3_g64", "ufp4_e2m2_g64", "ufp4_e3m1_g64")
STATIC = Spec("int4_g64", "int8_row", (Static(),))
BINNED = Spec("int4_g64", "int8_row", (Static(),), bins=8)
GROUPED = Spec("int4_g64", "int8_row", (Center("middle"), Reparametrize(groups=16), Static()), bins=8)

W4A4 = (Smooth(), LowRank(32), GPTQ())

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
    _line(
        "llmfp4",
        "LLM-FP4: format and range by layer",
        "methods.format_search",
        SPLITS[1],
        SPLITS[1],
        (),
        FormatSearch(SPLITS, SPLITS),
    ),
    _line(
        "msfp",
        "MSFP: unsigned floats where they serve",
        "methods.format_search",
        SPLITS[1],
        SPLITS[1],
        (),
        FormatSearch(SPLITS, (*SPLITS, *UNSIGNED)),
    ),
    _line(
        "genie",
        "Genie: steps learned with roundings",
        "methods.adaround",
        "int4_row",
        None,
        (),
        AdaRound(step_rate=1e-3),
    ),
    Line("bins", "TFMQ-DM: ranges by timestep", "methods.temporal", STATIC, BINNED),
    Line(
        "dither",
        "qgen's own: temporal dither",
        "methods.dither",
        Spec("int4_g64", "uint4_g64", W4A4),
        Spec("int4_g64", "uint4_g64", (*W4A4, Dither()), bins=32),
    ),
    Line("tfmq", "TFMQ-DM: time layers learned on their timesteps", "methods.adaround", BINNED, BINNED, (AdaRound(),)),
    Line(
        "repquant",
        "RepQuant: one scale for all channels",
        "methods.reparametrize",
        STATIC,
        Spec("int4_g64", "int8_row", (Center("middle"), Reparametrize(), Static())),
    ),
    Line(
        "mixdq",
        "MixDQ: the start token apart",
        "methods.start_token",
        Spec("int8_row", "int8_row", (Static(),)),
        Spec("int8_row", "int8_row", (StartToken(), Static())),
        text=True,
    ),
    Line("dgq", "DGQ: 16 groups of channels", "methods.reparametrize", BINNED, GROUPED),
    Line(
        "log2",
        "DGQ: logarithms of probabilities",
        "nn.probabilities",
        ProbabilitySpec("uniform", 4),
        ProbabilitySpec("log2", 4),
    ),
    Line(
        "logsqrt2",
        "RepQuant: half octaves",
        "nn.probabilities",
        ProbabilitySpec("log2", 4),
        ProbabilitySpec("logsqrt2", 4),
    ),
    Line(
        "regions",
        "TQ-DiT: two regions",
        "nn.probabilities",
        ProbabilitySpec("uniform", 4),
        ProbabilitySpec("regions", 4),
    ),
    _line(
        "bases_learned", "BinaryDM: learned scales", "methods.learned_bases", "binary2_g64", None, (), LearnedBases()
    ),
    _line("vq4dit", "VQ4DiT", "methods.vq4dit", "vq2_d4", None, (), VQ4DiT()),
    Line("binarydm", "BinaryDM: a second basis", "formats.multibasis", Spec("binary_g64"), Spec("binary2_g64")),
    Line("bases", "BinaryDM: two bases for int2's steps", "formats.multibasis", Spec("int2_g64"), Spec("binary2_g64")),
)


def recipe_of(spec: Spec, vector: tuple = ()) -> Recipe:
    """The spec inside blocks; embedders and heads stay float, time and modulation layers take 4-bit weights, as in the named recipes."""
    rule = Rule("*", Spec("int4_g64", None, vector), role="vector", why="one row per sample")
    return Recipe(spec, (rule, Rule("*", None, role="outside", why="embedder or head")), "line")


def pipeline_for(text: bool) -> Any:
    """The shipped pipeline, or the UNet that reads CLIP."""
    if not text:
        return qgen.demo_pipeline()
    spec = importlib.util.spec_from_file_location("unet", Path(__file__).with_name("unet.py"))
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo.pipeline()


def words(spec: Spec | ProbabilitySpec, vector: tuple = ()) -> str:
    if isinstance(spec, ProbabilitySpec):
        return f"probabilities in {spec.kind}, {spec.bits} bits"
    steps = " + ".join(method.name for method in spec.methods) or "nearest"
    timed = f", {spec.bins} bins" if spec.bins > 1 else ""
    return f"{spec.weight} x {spec.act or 'float'}{timed}, {steps}" + (
        ", time layers " + vector[0].name if vector else ""
    )


def bits_of(spec: Spec | ProbabilitySpec) -> str:
    return "16" if isinstance(spec, ProbabilitySpec) else f"{formats.get(spec.weight).bits_per_value(256):.2f}"


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
    known: dict[tuple, torch.Tensor] = {}

    @functools.cache
    def float_model(text: bool) -> tuple[torch.Tensor, Any]:
        """Pictures of the 16-bit pipeline, and recorded calls."""
        pipe = pipeline_for(text)
        calls = record(pipe, demo_prompts("calibration"), samples=options.samples, steps=4, progress=False)
        return generate(pipe, prompts, progress=False), calls

    def score(spec: Spec | ProbabilitySpec, vector: tuple = (), text: bool = False) -> torch.Tensor:
        if (spec, vector, text) not in known:
            pipe, around = pipeline_for(text), nullcontext()
            reference, calls = float_model(text)
            if isinstance(spec, ProbabilitySpec):
                around = simulated(spec.kind, spec.bits, spec.apart, spec.scope)
            else:
                how = Recipe(None, (Rule("*", spec, role="context"),), "line") if text else recipe_of(spec, vector)
                qgen.quantize(pipe, how, calibration=calls, progress=False)
            with around:
                known[spec, vector, text] = psnr(generate(pipe, prompts, progress=False), reference)
        return known[spec, vector, text]

    rows = []
    for line in LINES:
        if options.only and line.key not in options.only.split(","):
            continue
        base, refined = score(line.base, text=line.text), score(line.refined, line.vector, line.text)
        gap = bootstrap_difference(refined, base)
        bits = "/".join(dict.fromkeys(map(bits_of, (line.base, line.refined))))
        rows.append(
            f"| {line.card} | `qgen.{line.where}` | {bits} | {words(line.base)}: {base.mean():.2f} | "
            f"{words(line.refined, line.vector)}: {refined.mean():.2f} | {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}] |"
        )
        print(rows[-1], flush=True)
    head = "| card | where | bits per weight | refines: PSNR dB | with it: PSNR dB | gain, 95 % interval |\n|---|---|---|---|---|---|"
    about = "\n".join(__doc__.strip().splitlines()[4:])
    conditions = f"{options.n} prompts, 20 steps (the UNet: 10); calibrated on {options.samples} prompts x 4 steps; float32 on a CPU."
    command = f"python demos/methods.py --n {options.n} --samples {options.samples}"
    text = (
        f"# Published methods, measured\n\n{about}\n\n{conditions} Written by `{command}`.\n\n{head}\n"
        + "\n".join(rows)
        + "\n"
    )
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
