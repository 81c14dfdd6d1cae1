"""Does rounding by second moments overfit few prompts? Measured on the shipped pipeline; writes `demos/overfitting.md`.

    python demos/overfitting.py [--recipes svdquant-int4 w4a8] [--sizes 16 64 192] [--n 64] [--threads 1] [--out demos/overfitting.md]

Each recipe is quantized twice from the same recorded calls: whole, and without GPTQ (smoothing, the low-rank branch with its refits,
rounding to nearest, bias correction; `reconstruct` goes too, since it rounds by GPTQ). PSNR is against the 16-bit pipeline's pictures from
the same noise, on prompts whose names calibration never saw; the gain is the mean of the paired differences with its 95 % bootstrap
interval over prompts. Layers are compared on rows of those unseen prompts as well: neither fitted nor used to choose anything.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import qgen
from qgen.calibration.base import CalibrationSet
from qgen.demo import demo_prompts
from qgen.engine import record
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.eval.psnr import psnr
from qgen.methods.gptq import GPTQ
from qgen.methods.reconstruct import Reconstruct
from qgen.nn.kinds import rows_of
from qgen.nn.packed import Packed
from qgen.probe import input_of


def without_gptq(recipe: qgen.Recipe) -> qgen.Recipe:
    """The recipe with every method that rounds by second moments left out."""

    def plain(spec):
        return spec and replace(spec, methods=tuple(m for m in spec.methods if not isinstance(m, (GPTQ, Reconstruct))))

    rules = tuple(replace(rule, spec=plain(rule.spec)) for rule in recipe.rules)
    return replace(recipe, default=plain(recipe.default), rules=rules, name=f"{recipe.name} without GPTQ")


@torch.no_grad()
def layer_errors(made: torch.nn.Module, original: torch.nn.Module, calls: CalibrationSet) -> dict[str, float]:
    """Squared error of each packed layer's output over its energy, by path, on inputs that flow through the float model."""
    lost: dict[str, list[float]] = {}

    def hook(path: str, layer: Packed):
        def listen(old: torch.nn.Module, args: tuple, kwargs: dict, want: Tensor) -> None:
            x = input_of(args, kwargs)
            energy = want if old.bias is None or rows_of(x, old).shape[-1] != x.shape[-1] else want - old.bias
            parts = lost.setdefault(path, [0.0, 0.0])
            parts[0] += float((layer(x) - want).square().sum())
            parts[1] += float(energy.square().sum())

        return listen

    hooks = [
        original.get_submodule(path).register_forward_hook(hook(path, layer), with_kwargs=True)
        for path, layer in made.named_modules()
        if isinstance(layer, Packed)
    ]
    for call in calls.calls:
        call.run(original)
    for handle in hooks:
        handle.remove()
    return {path: a / b for path, (a, b) in lost.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["svdquant-int4", "w4a8"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 64, 192], help="calibration prompts")
    parser.add_argument("--n", type=int, default=64, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=8, help="calls kept of each prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = demo_prompts("held_out")[: options.n]
    original = qgen.demo_pipeline()
    reference = generate(original, prompts, progress=False)
    unseen = record(original, prompts[:16], samples=16, steps=4, progress=False)
    rows = []
    for size in options.sizes:
        calls = record(
            qgen.demo_pipeline(), demo_prompts("calibration"), samples=size, steps=options.steps, progress=False
        )
        for name in options.recipes:
            scores, errors = [], []
            for recipe in (qgen.recipes.get(name), without_gptq(qgen.recipes.get(name))):
                pipe = qgen.quantize(qgen.demo_pipeline(), recipe, calibration=calls, progress=False)
                scores.append(psnr(generate(pipe, prompts, progress=False), reference))
                errors.append(layer_errors(pipe.transformer, original.transformer, unseen))
            gap = bootstrap_difference(*scores)
            ratios = torch.tensor([errors[0][path] / max(errors[1][path], 1e-30) for path in errors[0]])
            rows.append(
                f"| `{name}` | {size} | {scores[0].mean():.2f} | {scores[1].mean():.2f} | "
                f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}] | {ratios.log().mean().exp():.3f} | "
                f"{ratios.max():.3f} | {int((ratios > 1).sum())} of {len(ratios)} |"
            )
            print(rows[-1], flush=True)
    head = (
        "| recipe | calibration prompts | PSNR, dB | without GPTQ | gain, 95 % interval | layers' error, ratio (geometric mean) | "
        "largest ratio | layers above 1 |\n|---|---|---|---|---|---|---|---|"
    )
    about = "\n".join(__doc__.strip().splitlines()[4:])
    conditions = f"{options.n} prompts, 20 steps, guidance 3; {options.steps} calls of each calibration prompt; float32 on a CPU."
    sizes = " ".join(map(str, options.sizes))
    command = f"python demos/overfitting.py --recipes {' '.join(options.recipes)} --sizes {sizes} --n {options.n}"
    lines = [
        "# Few prompts and GPTQ, measured",
        about,
        f"{conditions} Written by `{command}`.",
        "\n".join((head, *rows)),
    ]
    options.out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
