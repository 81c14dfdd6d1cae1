"""Compares recipes on the shipped pipeline: pictures of held-out prompts against the 16-bit pipeline's, from the same noise.

    python demos/compare.py [--family int4 | nvfp4 | weights] [--n 64] [--samples 192] [--json out.json]

The families build up a recipe step by step: round to nearest, + smoothing and low rank, the full default. Each gap in PSNR is given with
the 95 % bootstrap interval of the paired difference: prompts are the same, so the interval is over prompts. Nothing scored here was seen
in calibration: prompts are split by the names they draw.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import qgen
from qgen.calibration.recorder import Recorder
from qgen.demo import assets_dir, demo_prompts
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.show.rows import share_of_16_bits

FAMILIES = {
    "int4": ("rtn-int4", "svdquant-int4:2", "svdquant-int4"),
    "nvfp4": ("rtn-nvfp4", "svdquant-nvfp4:2", "svdquant-nvfp4"),
    "weights": ("w4a16", "w4a8", "w8a8", "fp8"),
}


def recipe_for(name: str) -> tuple[str, qgen.Recipe]:
    """A label and a recipe; "svdquant-int4:2" keeps the first two methods (smoothing and low rank)."""
    name, _, count = name.partition(":")
    recipe = qgen.recipes.get(name)
    if not count:
        return name, recipe
    short = lambda spec: replace(spec, methods=spec.methods[: int(count)])  # noqa: E731
    default = short(recipe.default)
    rules = tuple(replace(rule, spec=rule.spec and short(rule.spec)) for rule in recipe.rules)
    label = f"{name}, {' + '.join(m.name for m in default.methods)} only"
    return label, replace(recipe, default=default, rules=rules, name=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="int4")
    parser.add_argument("--recipes", help="comma-separated recipe names, in place of a family")
    parser.add_argument("--n", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=192, help="calibration prompts")
    parser.add_argument("--steps", type=int, default=8, help="denoiser calls kept per calibration prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = demo_prompts("held_out")[: options.n]
    reference = generate(qgen.demo_pipeline(), prompts)
    real = assets_dir() / "emoji_features.safetensors"
    results, before = [], None
    for name in options.recipes.split(",") if options.recipes else FAMILIES[options.family]:
        label, recipe = recipe_for(name)
        pipe, start = qgen.demo_pipeline(), time.perf_counter()
        calibration = Recorder(samples=options.samples, steps=options.steps)
        qgen.quantize(pipe, recipe, prompts=demo_prompts("calibration"), calibration=calibration)
        seconds = time.perf_counter() - start
        scores = qgen.evaluate(pipe, reference=reference, prompts=prompts, real=real)
        rows = pipe.transformer.qgen_report
        output = next((row["sqnr_db"] for row in rows if row["path"] == "(output)"), float("nan"))
        share = share_of_16_bits(rows)
        print(f"\n{label}: quantized in {seconds:.0f} s, output SQNR {output:.2f} dB, {share:.3f} of the 16-bit layers")
        print(scores.table())
        result = {
            "recipe": label,
            "seconds": round(seconds, 1),
            "output_sqnr_db": output,
            "scores": json.loads(scores.to_json()),
        }
        psnr = torch.tensor(scores.per_prompt["psnr"])
        if before is not None:
            gap = bootstrap_difference(psnr, before[1])
            print(f"  PSNR over {before[0]}: {gap.mean:+.2f} dB, 95 % interval [{gap.low:+.2f}, {gap.high:+.2f}]")
            result["psnr_gap"] = [gap.mean, gap.low, gap.high]
        before = (label, psnr)
        results.append(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
