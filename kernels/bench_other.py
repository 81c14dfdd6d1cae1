"""Contests of attention and of activation quantization: torch's own attention in bf16 as the baseline, memory as the
roof."""

__all__ = ["ACT_SHAPES", "ATTENTION_SHAPES", "act_contest", "attention_contest"]

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen import formats
from qgen.formats import QTensor
from qgen.kernels import attention_ops, doctor, layouts, reference, registry
from qgen.kernels.bench_packages import attention_packages
from qgen.kernels.bench_run import Contest, Contestant
from qgen.kernels.registry import Ask
from qgen.kernels.roofline import Card, attention_seconds

ATTENTION_SHAPES = ((1, 24, 4608, 128), (1, 24, 16384, 128), (2, 20, 4096, 64))  # B, H, L, D
ACT_SHAPES = ((4096, 3072), (4096, 12288))  # M, K
OPERAND = {"int8": "s8", "e4m3": "fp8", "e2m1": "fp4", "fp16": "f16"}
# Relative RMS against float32 attention of Gaussian q, k, v: measured on the reference, and a half more.
ATTENTION_TOLERANCE = {"int8": 0.03, "int8_fp8": 0.06, "fp4_fp8": 0.25, "fp4": 0.3}
FP4 = ("nvfp4_dynamic", "mxfp4")
ACT_TOLERANCE = 2e-3  # codes that fall the other way at a tie


def attention_contest(
    shape: tuple[int, int, int, int],
    device: torch.device,
    card: Card | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Contest:
    """Every attention kernel that serves this device, for q, k, v of `shape` (B, H, L, D)."""
    b, h, tokens, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, tokens, d, generator=generator).to(device, dtype) for _ in range(3))
    kind, capability = doctor.capability(device)

    def bound(qk: str, pv: str) -> float | None:
        known = card is not None and qk in card.tflops and pv in card.tflops
        return attention_seconds(b, h, tokens, d, qk, pv, card) if known else None

    contestants = [
        Contestant("torch SDPA bf16", lambda: F.scaled_dot_product_attention(q, k, v), 1e-2, bound("bf16", "bf16"))
    ]
    for spec, (qk, pv) in attention_ops.SPECS.items():
        ask = Ask("attention", kind, qk, pv, dtype, k=d, capability=capability)
        for _, kernel in registry.kernels.items():
            if kernel.op == "attention" and kernel.name != "reference" and not kernel.needs.refusals(ask):
                call = _attention(kernel.run, q, k, v, spec)
                tolerance = ATTENTION_TOLERANCE[spec]
                contestants.append(Contestant(kernel.name, call, tolerance, bound(OPERAND[qk], OPERAND[pv])))
    contestants += [Contestant(name, call, 0.06) for name, call in attention_packages(q, k, v)]
    truth = _once(lambda: _exact(q, k, v))
    label = f"B={b} H={h} L={tokens} D={d}"
    flop = 4 * b * h * tokens**2 * d
    return Contest("attention", label, flop, tuple(contestants), lambda name: truth(), "torch SDPA bf16")


def _attention(run, q: Tensor, k: Tensor, v: Tensor, spec: str):
    return lambda: run(q, k, v, None, False, q.shape[-1] ** -0.5, spec, True, False)[0]


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, head by head: all logits of one head at a time."""
    heads = [t.float().flatten(0, 1) for t in (q, k, v)]
    out = [torch.softmax(a @ b.T * a.shape[-1] ** -0.5, -1) @ c for a, b, c in zip(*heads, strict=True)]
    return torch.stack(out).view(q.shape)


def _once(make):
    kept: list[Tensor] = []

    def value() -> Tensor:
        if not kept:
            kept.append(make())
        return kept[0]

    return value


def act_contest(
    shape: tuple[int, int], device: torch.device, card: Card | None = None, dtype: torch.dtype = torch.bfloat16
) -> Contest:
    """The fused activation kernel for each format it serves, on x of `shape` (M, K), held to the reference's codes.

    The baseline is a copy of x: what reading and writing it once costs.
    """
    from qgen.kernels.triton_act import ACTS, quantize_act

    m, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    smooth = (torch.rand(k, generator=generator) + 0.5).to(device, dtype)
    down = (torch.randn(32, k, generator=generator) / k**0.5).to(device, dtype)
    _, capability = doctor.capability(device)
    contestants = [Contestant("copy of x", x.clone, 0.0, _memory(4 * m * k, card))]
    truths = {"copy of x": x.float}
    for act in ACTS:
        if act in FP4 and not (isinstance(capability, tuple) and capability >= (10, 0)):
            continue
        nbytes = 2 * m * k + m * k * formats.get(act).bits_per_value(k) / 8 + 4 * m * 32
        call, read = partial(quantize_act, x, act, k, smooth, None, down), partial(_values, act)
        contestants.append(Contestant(f"triton_act {act}", call, ACT_TOLERANCE, _memory(nbytes, card), read))
        truths[f"triton_act {act}"] = partial(_rounded, x, smooth, act)
    label = f"M={m} K={k} R=32"
    return Contest("act", label, 2 * m * k * 32, tuple(contestants), lambda name: truths[name](), "copy of x")


def _rounded(x: Tensor, smooth: Tensor, act: str) -> Tensor:
    return reference.quantize_act(reference.transform_act(x, x.shape[1], smooth, None, 0), act).dequantize()


def _values(act: str, result) -> Tensor:
    """What the codes of the activation kernel stand for, (M, K) float32."""
    if act == "int8_row":
        codes = layouts.codes_from_groups(result.codes.view(torch.uint8), 8)
        return codes.view(torch.int8).float() * result.scales[:, None]
    if act in FP4:
        codes = result.codes[: result.m]
        scales = layouts.unswizzle_scales(result.scales, result.m, 2 * codes.shape[1] // formats.get(act).block)
    else:
        codes, scales = layouts.codes_from_groups(result.codes, 4), result.scales.T.to(torch.bfloat16)
    return QTensor(codes, scales, None, result.zeros, act).dequantize()


def _memory(nbytes: float, card: Card | None) -> float | None:
    return None if card is None else nbytes / (card.bandwidth * 1e9)
