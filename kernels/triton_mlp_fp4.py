"""The fused linear layers on FP4 tensor cores: `triton_mlp` with the product of `triton_fp4`.

The tile of the first layer's output goes through ordinary stores, not through the tensor memory accelerator: what the
accelerator writes is not ordered with the atomic that announces it.
"""

__all__ = ["aot_cases", "fused_linear", "mlp", "requantized"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import registry, triton_fp4
from qgen.kernels.aot_case import AotCase
from qgen.kernels.fusion import GATED, Heads, Producer
from qgen.kernels.layouts import round_up
from qgen.kernels.registry import Kernel, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import Activations, quantize_act
from qgen.kernels.triton_fp4 import fp4_gemm, fp4_tile
from qgen.kernels.triton_linear import store_tile, tile_of
from qgen.kernels.triton_mlp import requantize_band, second_layer
from qgen.kernels.tuning import Launch, capability_of


@triton.jit
def _fp4_gemm_requantize(
    CX, SX, CW, SW, H, UP, BIAS, GLOBAL, y, counters, M, N, K,
    gate, smooth, shift, down, codes, scales, h2, K2, KP2, R2,
    R: tl.constexpr, RP: tl.constexpr, GLOBAL_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ACT2: tl.constexpr, KIND2: tl.constexpr, BM2: tl.constexpr, BK2: tl.constexpr, RP2: tl.constexpr,
    SHIFT_ROW2: tl.constexpr, HAD2: tl.constexpr, ASM2: tl.constexpr,
):  # fmt: skip
    """A tile of y (M, N), and, behind the last tile of a band of BM rows, codes, scales and h2 of the band."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = fp4_tile(
        CX, SX, CW, SW, H, UP, BIAS, GLOBAL, pm, pn, M, N, K, R, RP, GLOBAL_ROWS, ACTIVATION, BLOCK, BM, BN, BK
    )
    store_tile(y, acc, pm, pn, M, N, False, BM, BN, False)
    requantize_band(
        y, counters, pm, M, N, gate, smooth, shift, down, codes, scales, None, h2, K2, KP2, R2, ACT2, KIND2, BM, BN, BM2,
        BK2, RP2, SHIFT_ROW2, HAD2, ASM2,
    )  # fmt: skip


def fused_linear(x: Tensor, slots: Slots, producer: Producer, activation: str, heads: Heads | None) -> Tensor:
    """`fused_reference.fused_linear` for packed tensors, two launches. Heads of 16, 32, 64 or 128, else ValueError."""
    a = _quantized(x, slots, producer)
    y = fp4_gemm(
        a, slots.codes, slots.scales, slots.global_scale, slots.up, slots.bias, activation, x.dtype, heads=heads
    )
    return y.view(*x.shape[:-1], slots.n)


def mlp(x: Tensor, first: Slots, second: Slots, producer: Producer, activation: str) -> Tensor:
    """`fused_reference.mlp` for packed tensors, three launches."""
    b = requantized(_quantized(x, first, producer, clear=True), first, second, activation, x.dtype)
    y = fp4_gemm(b, second.codes, second.scales, second.global_scale, second.up, second.bias, dtype=x.dtype)
    return y.view(*x.shape[:-1], second.n)


def _quantized(x: Tensor, slots: Slots, producer: Producer, clear: bool = False) -> Activations:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if producer.gate is not None:
        producer = Producer(producer.kind, gate=producer.gate.reshape(-1, x.shape[-1]))
    return quantize_act(
        rows, slots.act, _columns(slots), slots.smooth, slots.shift, slots.down, slots.hadamard, producer, clear=clear
    )


def _columns(slots: Slots) -> int:
    """Columns of the activations: whole tiles of scales."""
    return round_up(2 * slots.codes.shape[1], 4 * triton_fp4.BLOCKS[slots.weight])


def requantized(
    a: Activations, first: Slots, second: Slots, activation: str, dtype: torch.dtype, config: Launch | None = None
) -> Activations:
    """activation(a · first) as the second layer's left operand, one launch. a: with counters. config: see `fp4_gemm`."""
    y = torch.empty(a.m, first.n, dtype=dtype, device=first.codes.device)
    out, behind = second_layer(y, second, _columns(second), activation)
    if a.m == 0:
        return out
    capability = capability_of(y.device)
    c = config or triton_fp4.configure(capability, a.m)
    grid = (triton.cdiv(a.m, c.bm) * triton.cdiv(first.n, c.bn),)
    with torch.cuda.device_of(y):
        _fp4_gemm_requantize[grid](
            **triton_fp4.operands(a, first.codes, first.scales, first.global_scale, first.up, first.bias, c),
            y=y, counters=a.counters, M=a.m, **behind, ACTIVATION="none" if activation == GATED else activation,
            GROUP=triton_fp4.GROUP, BM2=32 if behind["BK2"] <= 128 else 16, ASM2=capability is not None,
            enable_fp_fusion=False, **c.options,
        )  # fmt: skip
    return out


def _register() -> None:
    for weight in triton_fp4.BLOCKS:
        like = registry.find("linear", f"triton_{weight}")
        register(Kernel("fused_linear", like.name, like.needs, fused_linear, like.priority, like.pack, like.unpack))
        register(Kernel("mlp", like.name, like.needs, mlp, like.priority, like.pack, like.unpack))


_register()


def aot_cases() -> list[AotCase]:
    """The first layer of an MLP with GELU in NVFP4 and of a gated one in MXFP4, rank 32, for both families."""
    families = ((100, (("cuda", 100), ("cuda", 103))), (120, (("cuda", 120), ("cuda", 121))))
    return [
        _case(f"mlp/{weight}_{activation}_sm{family}", weight, activation, targets)
        for weight, activation in (("nvfp4", "gelu_tanh"), ("mxfp4", GATED))
        for family, targets in families
    ]


def _case(name: str, weight: str, activation: str, targets: tuple) -> AotCase:
    c, block, gated = triton_fp4.configure(divmod(targets[0][1], 10)), triton_fp4.BLOCKS[weight], activation == GATED
    scale, tiles = "fp8e4nv" if block == 16 else "u8", f"{c.bk // (4 * block)},2,256]>"
    signature = {
        "CX": f"tensordesc<u8[{c.bm},{c.bk // 2}]>", "SX": f"tensordesc<{scale}[{c.bm // 128},{tiles}",
        "CW": f"tensordesc<u8[{c.bn},{c.bk // 2}]>", "SW": f"tensordesc<{scale}[{c.bn // 128},{tiles}",
        **dict.fromkeys(("H", "UP", "BIAS", "y", "smooth", "down", "h2"), "*bf16"), "GLOBAL": "*fp32", "counters": "*i32",
        "codes": "*u8", "scales": f"*{scale}", **({"gate": "*bf16"} if gated else {}),
        **dict.fromkeys(("M", "N", "K", "K2", "KP2", "R2"), "i32"),
    }  # fmt: skip
    constexprs = {
        "R": 32, "RP": 32, "GLOBAL_ROWS": False, "ACTIVATION": "none" if gated else activation, "BLOCK": block, "BM": c.bm,
        "BN": c.bn, "BK": c.bk, "GROUP": triton_fp4.GROUP, "ACT2": triton_fp4.ACTS[weight],
        "KIND2": GATED if gated else "none", "BM2": 32, "BK2": 64, "RP2": 32, "SHIFT_ROW2": False, "HAD2": 0,
        "ASM2": True, "shift": None, **({} if gated else {"gate": None}),
    }  # fmt: skip
    return AotCase(
        name,
        _fp4_gemm_requantize,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, t in signature.items() if not t.startswith("tensordesc")),
        options={**c.options, "enable_fp_fusion": False},
        targets=targets,
        require={None: (r"UTCOMMA|OMMA", r"atom\S*\.gpu\.acq_rel")},
    )
