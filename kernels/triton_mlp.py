r"""Fused linear layers on integer tensor cores: a producer in front, q/k preparation behind, and an MLP in three launches.

    fused_linear   1  produce, quantize, low-rank down          2  product, + low rank + bias, activation, heads
    mlp            1  produce, quantize, low-rank down          2  product, activation, *requantize for the second layer*
                                                                3  product

A scale per row, and the second layer's own low-rank product, need whole rows of what the second launch writes a tile at a
time. So each program writes its 16-bit tile, then counts itself in for its band of rows; the last one to do so finds the
band complete, still in the L2 cache, and quantizes it with the code of launch 1. Nobody waits for anybody, sums have one
fixed order whoever comes last, and every format of activations, smoothing, shift, transform and rank is served with the
codes of the unfused layers. The counters are zeroed by launch 1.

What it saves is a launch and the pass over the (M, K) activations by all processors; what it costs is the last band of a
wave, quantized by one processor each while others idle. The idea of a last arriver: "threadFenceReduction" in NVIDIA's CUDA
samples, https://github.com/NVIDIA/cuda-samples; of quantizing behind the product: https://arxiv.org/abs/2411.05007
"""

__all__ = ["aot_cases", "fused_linear", "mlp"]

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import layouts, registry, triton_linear, tuning
from qgen.kernels.aot_case import AotCase, Target
from qgen.kernels.fusion import ACTIVATIONS, GATED, Heads, Producer
from qgen.kernels.layouts import GROUP
from qgen.kernels.registry import Kernel, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import (
    Activations,
    allocate,
    padded_rank,
    quantize_act,
    rows_to_blocks,
    rows_to_int8,
)
from qgen.kernels.triton_linear import gemm_tile, store_tile, tile_of


@triton.jit
def requantize_band(
    y, counters, pm, M, N, gate, smooth, shift, down, codes, scales, zeros, h, K2, KP2, R2,
    ACT2: tl.constexpr, KIND2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BM2: tl.constexpr, BK2: tl.constexpr,
    RP2: tl.constexpr, SHIFT_ROW2: tl.constexpr, HAD2: tl.constexpr, ASM2: tl.constexpr,
):  # fmt: skip
    """Counts a tile that was stored into y (M, N); whoever completes band pm quantizes its rows, K2 columns each, for ACT2.

    gate: where the gate of "silu_mul" lies, rows N apart like y's, or None.
    """
    tl.debug_barrier()  # all threads have written; the atomic publishes that to the device, and sees what others wrote
    before = tl.atomic_add(counters + pm, 1, sem="acq_rel")
    if before == tl.cdiv(N, BN) - 1:
        for first in range(0, BM, BM2):
            rows = (pm * BM + first).to(tl.int64) + tl.arange(0, BM2)
            if ACT2 == "int8_row":
                rows_to_int8(
                    y, smooth, shift, down, None, codes, scales, h, None, None, None, None, gate, rows, M, K2, KP2, R2, N, 1, N,
                    0.0, BM2, BK2, RP2, SHIFT_ROW2, HAD2, KIND2,
                )  # fmt: skip
            else:
                rows_to_blocks(
                    y, smooth, shift, down, None, codes, scales, zeros, h, None, None, None, None, gate, rows, M, K2, KP2, R2,
                    N, 1, N, 0.0, ACT2, BM2, BK2, RP2, SHIFT_ROW2, False, HAD2, KIND2, ASM2,
                )  # fmt: skip


@triton.jit
def _gemm_requantize(
    a, a_scale, zeros, h, w, w_scale, sub, sums, up, bias, y, counters, M, N, K, R,
    gate, smooth, shift, down, codes, scales, zeros2, h2, K2, KP2, R2,
    A: tl.constexpr, W: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, RP: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEIGHT: tl.constexpr, ASM: tl.constexpr,
    ACT2: tl.constexpr, KIND2: tl.constexpr, BM2: tl.constexpr, BK2: tl.constexpr, RP2: tl.constexpr,
    SHIFT_ROW2: tl.constexpr, HAD2: tl.constexpr,
):  # fmt: skip
    """A tile of y (M, N), and, behind the last tile of a band of BM rows, codes, scales, zeros2 and h2 of the band."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, HEIGHT)
    out = gemm_tile(
        a, a_scale, zeros, h, w, w_scale, sub, sums, up, bias, pm, pn, M, N, K, R, A, W, EVEN_K, EVEN_N, RP, ACTIVATION,
        BM, BN, ASM,
    )  # fmt: skip
    store_tile(y, out, pm, pn, M, N, EVEN_N, BM, BN, False)
    requantize_band(
        y, counters, pm, M, N, gate, smooth, shift, down, codes, scales, zeros2, h2, K2, KP2, R2, ACT2, KIND2, BM, BN, BM2,
        BK2, RP2, SHIFT_ROW2, HAD2, False,
    )  # fmt: skip


def fused_linear(x: Tensor, slots: Slots, producer: Producer, activation: str, heads: Heads | None) -> Tensor:
    """`fused_reference.fused_linear` for packed tensors, two launches. Heads of 16, 32, 64 or 128, else ValueError."""
    a = _quantized(x, slots, producer)
    y = triton_linear.gemm(
        a, slots.codes, slots.scales, slots.global_scale, slots.up, slots.bias, slots.weight, slots.act, slots.n, x.dtype,
        activation, heads=heads,
    )  # fmt: skip
    return y.view(*x.shape[:-1], slots.n)


def mlp(x: Tensor, first: Slots, second: Slots, producer: Producer, activation: str) -> Tensor:
    """`fused_reference.mlp` for packed tensors, three launches."""
    a = _quantized(x, first, producer, clear=True)
    b = requantized(a, first, second, activation, x.dtype)
    y = triton_linear.gemm(
        b, second.codes, second.scales, second.global_scale, second.up, second.bias, second.weight, second.act, second.n,
        x.dtype,
    )  # fmt: skip
    return y.view(*x.shape[:-1], second.n)


def _quantized(x: Tensor, slots: Slots, producer: Producer, clear: bool = False) -> Activations:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if producer.gate is not None:
        producer = Producer(producer.kind, gate=producer.gate.reshape(-1, x.shape[-1]))
    kp = layouts.round_up(triton_linear.columns(slots.codes), GROUP)
    return quantize_act(
        rows, slots.act, kp, slots.smooth, slots.shift, slots.down, slots.hadamard, producer, clear=clear,
        act_scale=slots.act_scale,
    )  # fmt: skip


def requantized(
    a: Activations, first: Slots, second: Slots, activation: str, dtype: torch.dtype, asm: bool | None = None
) -> Activations:
    """activation(a · first) as the second layer's left operand, one launch. a: with counters; the rest as in `mlp`."""
    y = torch.empty(a.m, first.n, dtype=dtype, device=first.codes.device)
    kp2 = layouts.round_up(triton_linear.columns(second.codes), GROUP)
    out, behind = second_layer(y, second, kp2, activation)
    if a.m == 0:
        return out
    capability = tuning.capability_of(y.device)
    config = tuning.launch("mlp", capability, a.m)
    grid = (triton.cdiv(a.m, config.bm) * triton.cdiv(first.n, config.bn),)
    columns = triton_linear.columns(first.codes)
    with torch.cuda.device_of(y):
        _gemm_requantize[grid](
            *triton_linear.operands(a, first.codes, first.scales, first.global_scale, first.up, first.bias),
            y=y, counters=a.counters, M=a.m, N=first.n, K=columns, R=first.rank, zeros2=out.zeros, **behind,
            A=triton_linear.kind_a(first.act), W=triton_linear.kind_w(first.weight), EVEN_K=columns % GROUP == 0,
            EVEN_N=first.n % config.bn == 0, RP=0 if a.h is None else a.h.shape[1],
            ACTIVATION="none" if activation == GATED else activation, BM=config.bm, BN=config.bn,
            HEIGHT=triton_linear.ROWS_OF_TILES, ASM=isinstance(capability, tuple) if asm is None else asm,
            BM2=min(config.bm, 32 if behind["BK2"] <= 128 else 16), enable_fp_fusion=False, **config.options,
        )  # fmt: skip
    return out


def second_layer(y: Tensor, second: Slots, kp2: int, activation: str) -> tuple[Activations, dict]:
    """Empty operands of the second layer, and the arguments of `requantize_band` that depend on it alone.

    y: (M, N), what the first layer gives, gate and value side by side if gated. ValueError if the layers do not fit.
    """
    gated = activation == GATED
    if not gated and activation not in ACTIVATIONS:
        raise ValueError(f"activations of an MLP are {', '.join((*ACTIVATIONS, GATED))}, found {activation!r}")
    k2 = y.shape[1] // 2 if gated else y.shape[1]
    if not 0 <= kp2 - k2 < max(2 * GROUP, second.hadamard) + GROUP:
        raise ValueError(f"the first layer gives {k2} values, the second takes {kp2}")
    out = allocate(y, y.shape[0], second.act, kp2, second.rank, second.down)
    return out, {
        "gate": y[:, k2:] if gated else None, "smooth": second.smooth, "shift": second.shift, "down": second.down,
        "codes": out.codes, "scales": out.scales, "h2": out.h, "K2": k2, "KP2": kp2, "R2": second.rank, "ACT2": second.act,
        "KIND2": GATED if gated else "none", "BK2": max(64, second.hadamard), "RP2": padded_rank(second.rank),
        "SHIFT_ROW2": second.shift is not None and second.shift.ndim > 0, "HAD2": second.hadamard,
    }  # fmt: skip


def _register() -> None:
    """The integer kernels of op "linear" serve the fused ops under the same names, needs and layouts.

    The second layer's scales are measured behind the first product: stored ones are for the layers one by one.
    """
    for name in triton_linear.NAMES:
        like = registry.find("linear", name)
        measured = replace(like.needs, refuses=like.needs.refuses | {"static_act"})
        register(Kernel("fused_linear", name, like.needs, fused_linear, like.priority, like.pack, like.unpack))
        register(Kernel("mlp", name, measured, mlp, like.priority, like.pack, like.unpack))


_register()


def aot_cases() -> list[AotCase]:
    """The first layer of an MLP with GELU, and of a gated one, for int8 rows; one with zero points; rank 32."""
    targets: tuple[Target, ...] = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120))
    return [
        _case("w4s_a8_gelu", "int8", "sub4", "int8_row", "gelu_tanh", targets),
        _case("w4s_a8_silu_mul", "int8", "sub4", "int8_row", GATED, targets),
        _case("w4_a4_gelu", "int4", "group4", "uint4_g64", "gelu_tanh", targets),
    ]


def _case(name: str, a: str, w: str, act: str, activation: str, targets: tuple[Target, ...]) -> AotCase:
    config = tuning.launch("mlp", None, 4096)
    gated, int8 = activation == GATED, act == "int8_row"
    tensors = {
        "a": "*i8" if a == "int8" else "*u8", "a_scale": "*fp32", "zeros": None, "h": "*bf16", "w": "*u8",
        "w_scale": "*fp32", "sub": "*i32" if w == "sub4" else None, "sums": None, "up": "*bf16", "bias": "*bf16",
        "y": "*bf16", "counters": "*i32", "gate": "*bf16" if gated else None, "smooth": "*bf16", "shift": None,
        "down": "*bf16", "codes": "*i8" if int8 else "*u8", "scales": "*fp32", "zeros2": "*bf16" if not int8 else None,
        "h2": "*bf16",
    }  # fmt: skip
    signature = {n: t for n, t in tensors.items() if t} | dict.fromkeys(("M", "N", "K", "R", "K2", "KP2", "R2"), "i32")
    constexprs = {n: None for n, t in tensors.items() if not t} | {
        "A": a, "W": w, "EVEN_K": True, "EVEN_N": True, "RP": 32, "ACTIVATION": "none" if gated else activation,
        "BM": config.bm, "BN": config.bn, "HEIGHT": triton_linear.ROWS_OF_TILES, "ASM": True, "ACT2": act,
        "KIND2": GATED if gated else "none", "BM2": 32, "BK2": 64, "RP2": 32, "SHIFT_ROW2": False, "HAD2": 0,
    }  # fmt: skip
    return AotCase(
        f"mlp/{name}",
        _gemm_requantize,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(signature),
        options={**config.options, "enable_fp_fusion": False},
        targets=targets,
        require={None: (r"atom\S*\.gpu\.acq_rel",)},
    )
