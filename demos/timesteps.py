"""Timestep-aware against timestep-blind quantization on the shipped pipeline, and what the modulation cache saves.

    python demos/timesteps.py [--pairs temporal-int4,temporal-int4:1 …] [--n 64] [--samples 192] [--threads 1] [--out demos/timesteps.md]
    python demos/timesteps.py --modulation

A pair is two recipes; "name:1" is the recipe with one bin of timesteps, "name@34" with rank 34 in place of 32, which makes a recipe
without tables at least as large as one with them. Both draw the same held-out prompts from the same noise with the pipeline's own scheduler
and 20 steps, with 10 steps, and with another scheduler (Euler), none of which but the first was calibrated. Given are PSNR of the pictures
and the relative RMS error of the latents along the trajectory, against the 16-bit pipeline under the same settings, with 95 % bootstrap
intervals of the paired differences over prompts; bytes are of the denoiser, of 16 bits. The cache of modulation outputs is measured on
random models with the shapes of three families.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import qgen
from qgen.calibration.recorder import Recorder
from qgen.demo import demo_prompts
from qgen.eval.bootstrap import bootstrap_difference
from qgen.eval.generate import generate
from qgen.methods.lowrank import LowRank
from qgen.show.rows import share_of_16_bits

PAIRS = (
    "temporal-int4,svdquant-int4", "temporal-int4,svdquant-int4@34", "temporal-int4,temporal-int4:1@34",
    "temporal-nvfp4,svdquant-nvfp4@34", "w4a4-static,w4a4-static:1@34", "w4a8-static,w4a8", "w4a8-static:1,w4a8",
)  # fmt: skip
SETTINGS = {"20 steps": 20, "10 steps": 10, "Euler, 20 steps": 20}


def recipe_for(name: str) -> qgen.Recipe:
    """The recipe `name`; "name:bins" with so many bins of timesteps, "name@rank" with branches of that rank."""
    plain, bins, rank = re.fullmatch(r"([^:@]+)(?::(\d+))?(?:@(\d+))?", name).groups()
    recipe = qgen.recipes.get(plain)

    def changed(spec: qgen.Spec | None) -> qgen.Spec | None:
        if spec is None:
            return None
        ranked = lambda m: replace(m, rank=int(rank)) if rank and isinstance(m, LowRank) else m  # noqa: E731
        return replace(spec, bins=int(bins or spec.bins), methods=tuple(map(ranked, spec.methods)))

    rules = tuple(replace(rule, spec=changed(rule.spec)) for rule in recipe.rules)
    return replace(recipe, default=changed(recipe.default), rules=rules, name=name)


def euler():
    """Euler's method on the flow that the pipeline's own solver integrates; PixArt's pipeline asks for two things that it lacks."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Euler(FlowMatchEulerDiscreteScheduler):
        init_noise_sigma = 1.0

        def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
            return sample

    return Euler(num_train_timesteps=1000, shift=1.0)


def draw(pipe, prompts: list[str], setting: str) -> tuple[Tensor, Tensor]:
    """Pictures (n, H, W, 3) and latents (n, steps, …) as the denoiser saw them."""
    seen: list[Tensor] = []
    before, steps = pipe.scheduler, SETTINGS[setting]
    if setting.startswith("Euler"):
        pipe.scheduler = euler()
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).chunk(2)[0].clone()),
        with_kwargs=True,
    )
    try:
        pictures = generate(pipe, prompts, steps=steps, progress=False)
    finally:
        hook.remove()
        pipe.scheduler = before
    runs = [torch.stack(seen[i : i + steps], 1) for i in range(0, len(seen), steps)]
    return pictures, torch.cat(runs)


def scores(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """PSNR in dB and trajectory error, each (n,)."""
    psnr = -10 * torch.log10((found[0] - wanted[0]).square().flatten(1).mean(1).clamp_min(1e-12))
    lost, energy = ((t.flatten(2).square().sum(2)) for t in (found[1] - wanted[1], wanted[1]))
    return {"psnr_db": psnr, "trajectory": (lost / energy).mean(1).sqrt()}


def compare(options: argparse.Namespace) -> list[dict]:
    prompts = demo_prompts("held_out")[: options.n]
    pipe = qgen.demo_pipeline()
    wanted = {setting: draw(pipe, prompts, setting) for setting in SETTINGS}
    recorder = Recorder(samples=options.samples, steps=8)
    calls = recorder.calls(pipe, {"transformer": pipe.transformer}, demo_prompts("calibration"))
    known: dict[str, dict[str, dict[str, Tensor]]] = {}
    sizes: dict[str, float] = {}
    results = []
    for pair in options.pairs:
        for name in pair.split(","):
            if name not in known:
                pipe = qgen.quantize(qgen.demo_pipeline(), recipe_for(name), calibration=calls, progress=False)
                sizes[name] = share_of_16_bits(pipe.transformer.qgen_report)
                known[name] = {s: scores(draw(pipe, prompts, s), wanted[s]) for s in SETTINGS}
        a, b = pair.split(",")
        for setting in SETTINGS:
            row = {"pair": f"`{a}` over `{b}`", "bytes": f"{sizes[a]:.3f} / {sizes[b]:.3f}", "setting": setting}
            for what, digits in (("psnr_db", 2), ("trajectory", 4)):
                x, y = known[a][setting][what], known[b][setting][what]
                gap = bootstrap_difference(x, y)
                interval = f"{gap.mean:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"
                row[what] = f"{x.mean():.{digits}f} / {y.mean():.{digits}f} | {interval}"
            results.append(row)
            print(" | ".join(row.values()), flush=True)
    return results


def modulation(options: argparse.Namespace) -> list[dict]:
    """Bytes of weights that a filled cache makes idle, and of its table, on random models with the shapes of three families."""
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

    from qgen.calibration.base import Call
    from qgen.methods.modulation import cache_modulation

    torch.manual_seed(0)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=1152, sample_size=8,
        patch_size=2, caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=[16, 56, 56],
    )  # fmt: skip
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=64, num_attention_heads=16,
        joint_attention_dim=64, caption_projection_dim=1024, pooled_projection_dim=2048, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    text, pooled = torch.randn(1, 6, 64), torch.randn(1, 768)
    made = {
        "PixArt-shaped": (pixart, lambda t: Call((torch.randn(1, 4, 8, 8),), {
            "encoder_hidden_states": text, "timestep": torch.tensor([t]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})),
        "Flux-shaped": (flux, lambda t: Call((), {
            "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": text, "pooled_projections": pooled,
            "timestep": torch.tensor([t / 1000]), "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)})),
        "SD3-shaped": (sd3, lambda t: Call((), {
            "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": text,
            "pooled_projections": torch.cat([pooled] * 3, 1)[:, :2048],
            "timestep": torch.tensor([float(t)])})),
    }  # fmt: skip
    results = []
    for name, (module, call) in made.items():
        total = 2 * sum(p.numel() for p in module.parameters())
        module = module.to(torch.bfloat16).eval()
        cast = lambda c: Call(*(_cast(part) for part in (c.args, c.kwargs)))  # noqa: E731
        cache = cache_modulation(module, cast(call(500)))
        with torch.no_grad():
            for t in torch.linspace(999, 49, options.steps).round().int().tolist():
                cast(call(t)).run(module)
        row = {"model": name, "model_bytes": total, **cache.report()}
        print(row, flush=True)
        results.append(row)
    return results


def _cast(value):
    """Floating tensors in bfloat16."""
    if isinstance(value, Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item) for key, item in value.items()}
    return tuple(_cast(item) for item in value) if isinstance(value, tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--n", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=192, help="calibration prompts")
    parser.add_argument("--steps", type=int, default=20, help="with --modulation: steps of the schedule")
    parser.add_argument("--modulation", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    caches = modulation(options)
    if not options.modulation:
        options.out.write_text(page(compare(options), caches, options), encoding="utf-8")


def page(pairs: list[dict], caches: list[dict], options: argparse.Namespace) -> str:
    """The page for the docs."""
    lines = [
        "# Timesteps, measured", "", *__doc__.strip().splitlines()[5:], "",
        f"{options.n} held-out prompts, guidance 3, {options.samples} calibration prompts; float32 on a CPU. Written by",
        f"`python demos/timesteps.py --n {options.n} --samples {options.samples} --threads {options.threads}`.", "",
        "| pair | bytes | setting | PSNR, dB | gain | trajectory error | change |", "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.values())} |" for row in pairs), "",
        f"## The modulation cache, {options.steps} steps", "",
        "| model | its bytes in 16 bits | weights that a filled cache makes idle | the table instead |", "|---|---|---|---|",
        *(f"| {c['model']} | {c['model_bytes'] / 1e6:.1f} MB | {c['weight_bytes'] / 1e6:.1f} MB | {c['table_bytes'] / 1e6:.2f} MB |"
          for c in caches),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
