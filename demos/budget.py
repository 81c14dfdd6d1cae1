"""Mixed precision at equal bits on the shipped pipeline: the allocator against random mixes and allocation by size, in PSNR.

    python demos/budget.py [--bits 5] [--draws 20] [--n 32] [--recipe rtn-int4] [--metric output] [--json out.json]

All mixes use the same two formats, the recipe's own and its 8-bit neighbour, and as many 8-bit layers as fit into the average. Random mixes
fill the budget with layers in random order, "by size" with the smallest layers first and with the largest first. The prompts that are drawn
were never seen in calibration, and every mix starts from the same noise; the interval is that of the paired difference over prompts.
"""

import argparse
import glob
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import qgen
from qgen.allocate import Budget
from qgen.allocate.candidates import bits_of, ladder
from qgen.demo import demo_prompts
from qgen.engine import record
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.eval.psnr import psnr
from qgen.probe import probe


def mixes(sites: list, recipe: qgen.Recipe, bits: float, draws: int) -> dict[str, qgen.Recipe]:
    """Recipes of at most `bits` on average: `draws` random ones, and two by size."""
    pairs = [(site, spec) for site in sites if (spec := recipe.spec_for(site)) is not None]
    whole = sum(site.shape[0] * site.shape[1] for site, _ in pairs)

    def fill(order: list, name: str) -> qgen.Recipe:
        left = bits * whole - sum(bits_of(spec, s) * s.shape[0] * s.shape[1] for s, spec in pairs)
        rules = []
        for site, spec in order:
            wide = ladder(spec)[1]
            more = (bits_of(wide, site) - bits_of(spec, site)) * site.shape[0] * site.shape[1]
            if more <= left:
                left -= more
                rules.append(qgen.Rule(glob.escape(site.path), wide, why=name))
        return replace(recipe, rules=(*recipe.rules, *rules), name=name)

    by_size = sorted(pairs, key=lambda pair: pair[0].shape[0] * pair[0].shape[1])
    found = {"smallest first": fill(by_size, "smallest first"), "largest first": fill(by_size[::-1], "largest first")}
    for draw in range(draws):
        order = random.Random(draw).sample(pairs, len(pairs))
        found[f"random {draw}"] = fill(order, f"random {draw}")
    return found


def compare(
    recipe: qgen.Recipe, bits: float = 5.0, draws: int = 20, n: int = 32, samples: int = 64, metric: str = "output",
    tell: Callable[[str, torch.Tensor], None] = lambda name, values: None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """PSNR (n,) in dB of the allocated mix ("allocated") and of the others, by name, on held-out prompts; each is told as it comes."""
    prompts = demo_prompts("held_out")[:n]
    reference = generate(qgen.demo_pipeline(), prompts, progress=False)
    calls = record(qgen.demo_pipeline(), demo_prompts("calibration"), samples=samples, steps=4, progress=False)
    sites = probe(qgen.demo_pipeline().transformer, calls.calls[0])
    found = {}
    for name, mix in {"allocated": recipe, **mixes(sites, recipe, bits, draws)}.items():
        pipe = qgen.demo_pipeline()
        budget = Budget(bits, "bits", metric) if name == "allocated" else None
        qgen.quantize(pipe, mix, calibration=calls, budget=budget, progress=False)
        found[name] = psnr(generate(pipe, prompts, progress=False), reference)
        tell(name, found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--n", type=int, default=32, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=64, help="calibration prompts")
    parser.add_argument("--recipe", default="rtn-int4")
    parser.add_argument("--metric", default="output", help="damage that the allocator keeps small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = qgen.recipes.get(options.recipe)
    found = compare(
        recipe, options.bits, options.draws, options.n, options.samples, options.metric,
        lambda name, values: print(f"{name:16s} {values.mean():6.2f} dB", flush=True),
    )  # fmt: skip
    print()
    best = found["allocated"]
    for name, values in sorted(found.items(), key=lambda pair: -float(pair[1].mean())):
        gap = bootstrap_difference(best, values)
        print(
            f"{name:16s} {values.mean():6.2f} dB   allocated − this {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
        )
    if options.json:
        options.json.write_text(json.dumps({k: v.tolist() for k, v in found.items()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
