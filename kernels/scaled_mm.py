r"""Linear layers by the vendor's library, through `torch._scaled_mm`: 8-bit floats on Ada and later, NVFP4 on
Blackwell.

    y = g · sx · sw · (cx · cwᵀ) + bias + (x · downᵀ) · upᵀ

The library multiplies and scales; smoothing, rounding and the low-rank branch are torch's (or, for NVFP4 where Triton
is installed, the fused activation kernel's). Slower than one fused kernel should be, but it needs no Triton: the way
to run NVFP4 on Windows. Scales of NVFP4 lie in the order of `layouts.swizzle_scales`, which is cuBLAS's.
https://docs.nvidia.com/cuda/cublas/index.html#narrow-precision-usage
"""

__all__ = ["fp8_linear", "nvfp4_linear"]

import importlib.util

import torch
from torch import Tensor

from qgen.kernels import reference
from qgen.kernels.layouts import HADAMARDS, pad_rows, round_up, swizzle_scales, unswizzle_scales
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots

FP8 = ("fp8_e4m3_row", "fp8_e4m3_tensor")
NVFP4_BLOCK = 16


def fp8_linear(x: Tensor, slots: Slots) -> Tensor:
    """The op `qgen::linear` for e4m3 weights and activations, x (…, K) to (…, N) bf16; scales per row or per tensor."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], slots.n)
    xh = reference.transform_act(rows, slots.codes.shape[1], slots.smooth, slots.shift, slots.hadamard)
    q = reference.quantize_act(xh, slots.act, slots.act_scale)
    scale_x, scale_w = q.scales, slots.scales.T.contiguous()  # (M, 1), (1, N)
    if slots.act.endswith("tensor") and slots.weight.endswith("tensor"):
        scale_x, scale_w = scale_x[0, 0], scale_w[0, 0]  # one number each: no epilogue per row
    a, b = q.codes.view(torch.float8_e4m3fn), slots.codes.view(torch.float8_e4m3fn)
    bias = None if slots.bias is None else slots.bias.to(x.dtype)
    y = torch._scaled_mm(a, b.T, scale_x, scale_w, bias=bias, out_dtype=x.dtype)
    if slots.down is not None:
        y = torch.addmm(y, rows @ slots.down.T.to(x.dtype), slots.up.T.to(x.dtype))
    return y.view(*x.shape[:-1], slots.n)


def nvfp4_linear(x: Tensor, slots: Slots) -> Tensor:
    """The op `qgen::linear` for NVFP4 weights and activations in packed slots, x (…, K) to (…, N) bf16."""
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], slots.n)
    cx, sx, h = _quantize_nvfp4(rows, slots)
    product = torch._scaled_mm(
        cx.view(torch.float4_e2m1fn_x2), slots.codes.view(torch.float4_e2m1fn_x2).T,
        sx.flatten(), slots.scales.flatten(), out_dtype=x.dtype,
    )[:m, : slots.n]  # fmt: skip
    y = product.float() if slots.global_scale is None else product * slots.global_scale.float().reshape(1, -1)
    if slots.bias is not None:
        y = y + slots.bias
    if h is not None:
        y = y + h @ slots.up.T.to(h.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], slots.n)


def _quantize_nvfp4(rows: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (M', Kp / 2), swizzled scales, x · downᵀ (M, R) or None; M' = M or M padded to 128."""
    kp, smooth, shift, down, hadamard = 2 * slots.codes.shape[1], slots.smooth, slots.shift, slots.down, slots.hadamard
    if rows.is_cuda and importlib.util.find_spec("triton") is not None:
        from qgen.kernels.triton_act import quantize_act

        act = quantize_act(rows, "nvfp4_dynamic", kp, smooth, shift, down, hadamard)
        return act.codes, act.scales, None if down is None else act.h[:, : down.shape[0]]
    q = reference.quantize_act(reference.transform_act(rows, kp, smooth, shift, hadamard), "nvfp4_dynamic")
    h = None if down is None else rows @ down.T.to(rows.dtype)
    return pad_rows(q.codes, round_up(len(rows), 128)), swizzle_scales(q.scales), h


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical NVFP4 slots with scales in cuBLAS's order."""
    return {**slots, "scales": swizzle_scales(slots["scales"])}


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    rows, half = slots["codes"].shape
    return {**slots, "scales": unswizzle_scales(slots["scales"], rows, 2 * half // NVFP4_BLOCK)}


register(
    Kernel(
        "linear",
        "scaled_mm_fp8",
        Needs(
            devices=("cuda",),
            capability=((8, 9), (12, 1)),
            weights=FP8,
            acts=FP8,
            dtypes=(torch.bfloat16,),
            k_multiple=16,
            n_multiple=16,
            statics=("tensor",),
        ),
        fp8_linear,
        priority=10,
    )
)
register(
    Kernel(
        "linear",
        "scaled_mm_nvfp4",
        Needs(
            devices=("cuda",),
            capability=((10, 0), (12, 1)),
            weights=("nvfp4",),
            acts=("nvfp4_dynamic",),
            dtypes=(torch.bfloat16,),
            k_multiple=64,
            n_multiple=16,
            refuses=frozenset({"static_act"}),
            hadamards=HADAMARDS,
        ),
        nvfp4_linear,
        priority=10,
        pack=pack,
        unpack=unpack,
    )
)
