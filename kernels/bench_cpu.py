"""`python -m qgen.kernels.bench_cpu`: one denoiser call on the CPU, 4-bit linear layers against bfloat16, paired in
one process.

The denoiser is diffusers' PixArt-Sigma transformer with few layers and random weights: hidden 1152, 16 heads of 72,
cross-attention to 300 text tokens, MLP 4608. Both models run alternately, which of the two first changes from pair to
pair, so that a busy machine slows both alike. Reported: medians, the median of the paired ratios with a bootstrap
interval, the same for processor time (what a machine without neighbours would show), and bytes. Before anything is
timed, every shape of layer is compared with the reference kernel.
"""

__all__ = ["main"]

import argparse
import copy
import json
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from qgen import formats
from qgen.kernels import registry
from qgen.kernels.ops import SLOTS

HIDDEN, HEADS, TEXT = 1152, 16, 300
VARIANTS = (
    ("int4_s8_g64", "int8_row"),
    ("int8_row", "int8_row"),
    ("int4_g64", ""),
    ("int4_g64", "int4_g64"),
    ("int4_g64", "uint4_g64"),
)
GROUPS = {
    "linear 4-bit": ("qgen::linear",),
    "linear bf16": ("aten::addmm", "aten::mm", "aten::linear"),
    "attention": ("scaled_dot_product", "aten::bmm", "aten::softmax"),
    "norm": ("layer_norm",),
    "gelu": ("aten::gelu",),
}


class Linear(nn.Module):
    """One quantized layer: canonical tensors packed for the chosen kernel, one op in `forward`."""

    def __init__(self, source: nn.Linear, weight: str, act: str, rank: int, kernel: str | None):
        super().__init__()
        dtype, k, n = source.weight.dtype, source.in_features, source.out_features
        w = source.weight.float()
        slots = {"smooth": (torch.rand(k) + 0.5).to(dtype), "bias": source.bias.detach()}
        if rank:
            u, s, v = torch.svd_lowrank(w, rank, niter=1)
            slots |= {"down": v.T.to(dtype).contiguous(), "up": (u * s).to(dtype)}
            w = w - slots["up"].float() @ slots["down"].float()
        kp = formats.padded(k, weight, act)
        q = formats.get(weight).quantize(nn.functional.pad(w * slots["smooth"].float(), (0, kp - k)))
        slots |= {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero}
        self.canonical = {name: t for name, t in slots.items() if t is not None}
        traits = frozenset(t for t in ("smooth", "bias", "lowrank") if t != "lowrank" or rank)
        ask = registry.Ask("linear", "cpu", weight, act, dtype, n, k, rank, None, traits)
        chosen = registry.choose(ask, kernel)
        packed = {name: t.contiguous() for name, t in chosen.pack(self.canonical, ask).items()}
        self.nbytes = sum(t.nbytes for t in packed.values())
        self.tensors = [packed.get(slot) for slot in SLOTS]
        self.rest = (weight, act, n, 0)
        self.kernel = chosen.name

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qgen.linear(x, *self.tensors, *self.rest, self.kernel)

    def error(self, rows: int = 33) -> float:
        """Relative RMS against the reference kernel on random rows."""
        x = torch.randn(rows, self.tensors[SLOTS.index("smooth")].numel()).to(torch.bfloat16)
        truth = torch.ops.qgen.linear(x, *[self.canonical.get(slot) for slot in SLOTS], *self.rest, "reference").float()
        return ((self(x).float() - truth).norm() / truth.norm()).item()


def denoiser(layers: int) -> nn.Module:
    """The bfloat16 transformer with random weights."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_layers=layers, num_attention_heads=HEADS, attention_head_dim=HIDDEN // HEADS, cross_attention_dim=HIDDEN,
        caption_channels=None, in_channels=4, out_channels=8, sample_size=128, use_additional_conditions=False,
    )  # fmt: skip
    return model.eval().to(torch.bfloat16)


def quantized(model: nn.Module, weight: str, act: str, rank: int, kernel: str | None) -> tuple[nn.Module, dict]:
    """A copy with all linear layers of its blocks quantized, and {kernel, bytes, worst error against the reference}."""
    model = copy.deepcopy(model)
    before = after = 0
    errors: dict[tuple[int, int], float] = {}
    for block in model.transformer_blocks:
        for name, layer in [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]:
            new = Linear(layer, weight, act, rank, kernel)
            before, after = before + sum(p.nbytes for p in layer.parameters()), after + new.nbytes
            shape = (layer.out_features, layer.in_features)
            if shape not in errors:
                errors[shape] = new.error()
            new.canonical = None
            block.set_submodule(name, new)
    return model, {
        "kernel": new.kernel,
        "bytes": after,
        "bytes_bf16": before,
        "memory": after / before,
        "error": max(errors.values()),
    }


def inputs(tokens: int) -> dict:
    """Arguments of one denoiser call at `tokens` = (h / 2) (w / 2) image tokens."""
    width = 2 * max(d for d in range(1, int(tokens**0.5) + 1) if tokens % d == 0)
    return {
        "hidden_states": torch.randn(1, 4, width, 4 * tokens // width).to(torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, TEXT, HIDDEN).to(torch.bfloat16),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def compare(base: nn.Module, model: nn.Module, tokens: int, pairs: int) -> dict:
    """Alternating runs of both; milliseconds of wall and processor time, ratios with 95 % bootstrap intervals."""
    kwargs = inputs(tokens)
    wall, cpu = ([], []), ([], [])
    for pair in range(-1, pairs):  # pair -1 warms up
        for which in ((0, 1), (1, 0))[pair % 2]:
            start, used = time.perf_counter(), time.process_time()
            (base, model)[which](**kwargs)
            wall[which].append(1e3 * (time.perf_counter() - start))
            cpu[which].append(1e3 * (time.process_time() - used))
    row = {"tokens": tokens, "pairs": pairs}
    for name, (a, b) in (("wall", wall), ("cpu", cpu)):
        a, b = a[1:], b[1:]
        low, high, middle = interval([y / x for x, y in zip(a, b, strict=True)])
        row |= {f"bf16_{name}_ms": statistics.median(a), f"qgen_{name}_ms": statistics.median(b)}
        row |= {f"ratio_{name}": middle, f"ratio_{name}_interval": [low, high], f"ratio_{name}_best": min(b) / min(a)}
    return row


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Bounds of the 95 % bootstrap interval of the median, and the median."""
    v = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(v), (draws, len(v)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(v[picks].median(-1).values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high, statistics.median(values)


def breakdown(model: nn.Module, tokens: int) -> dict[str, float]:
    """Milliseconds of self time by group of ops, one profiled call."""
    kwargs = inputs(tokens)
    model(**kwargs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**kwargs)
    spent = dict.fromkeys((*GROUPS, "other"), 0.0)
    for event in profile.key_averages():
        group = next((g for g, names in GROUPS.items() if any(name in event.key for name in names)), "other")
        spent[group] += event.self_cpu_time_total / 1e3
    return spent


def machine() -> dict:
    """Processor, threads, torch."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    flags = [name for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8") if capabilities.get(name)]
    return {
        "cpu": capabilities.get("cpu_name", ""),
        "flags": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if a kernel disagrees with the reference."""
    parser = argparse.ArgumentParser(prog="qgen.kernels.bench_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--weight", help="a number format; default: all variants")
    parser.add_argument("--act", default="int8_row", help='format of activations with --weight; "" = bfloat16')
    parser.add_argument("--kernel", help="default: what `auto` chooses")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    out = sys.stdout.write
    base, failed = denoiser(args.layers), False
    where = machine() | {
        "shape": f"{args.layers} layers, {HIDDEN} = {HEADS} x {HIDDEN // HEADS}, MLP {4 * HIDDEN}, text {TEXT}"
    }
    if not args.json:
        out(
            ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in where.items())
            + "\n"
        )
        heads = f"{'variant':<30}{'kernel':<14}{'tokens':>7}{'bf16 ms':>9}{'qgen ms':>9}"
        out(f"{heads}  wall ratio [95 %]     cpu-time ratio [95 %]  bytes\n")
    for weight, act in [(args.weight, args.act)] if args.weight else VARIANTS:
        with torch.inference_mode():
            model, about = quantized(base, weight, act, args.rank, args.kernel)
            if about["error"] > 4e-3:
                out(f"{about['kernel']} differs from the reference by {about['error']:.1e} relative RMS: not timed\n")
                failed = True
                continue
            for tokens in args.tokens:
                row = {
                    "weight": weight,
                    "act": act,
                    "rank": args.rank,
                    **about,
                    **compare(base, model, tokens, args.pairs),
                }
                if args.profile:
                    row["profile_ms"] = {"bf16": breakdown(base, tokens), "qgen": breakdown(model, tokens)}
                out((json.dumps(where | row) if args.json else _line(row)) + "\n")
                sys.stdout.flush()
    return int(failed)


def _line(row: dict) -> str:
    name = f"{row['weight']} x {row['act'] or 'bf16'} r{row['rank']}"
    ratios = "  ".join(
        f"{row[f'ratio_{t}']:.3f} [{row[f'ratio_{t}_interval'][0]:.3f}, {row[f'ratio_{t}_interval'][1]:.3f}]"
        for t in ("wall", "cpu")
    )
    times = f"{row['bf16_wall_ms']:>9.1f}{row['qgen_wall_ms']:>9.1f}"
    line = f"{name:<30}{row['kernel']:<14}{row['tokens']:>7}{times}  {ratios}  {row['memory']:.3f}"
    for which, groups in row.get("profile_ms", {}).items():
        line += f"\n    {which}: " + ", ".join(f"{group} {ms:.1f}" for group, ms in groups.items() if ms)
    return line


if __name__ == "__main__":
    sys.exit(main())
