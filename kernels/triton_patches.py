r"""Convolutions whose activations have a scale per group, without ever writing the unfolded 16-bit patches.

    y[b, :, i, j] = linear(patch(b, i, j)),      K = channels · kernel height · kernel width, channels slowest

The first launch reads each patch where it lies in the image, by strides, transforms and quantizes it exactly as the
linear layer's activation kernel would, and computes the low-rank branch's h. The second is the linear layer's own
product. Groups of 64 columns cross from one channel to the next, so that codes have to be made in this order of K and
exist once per patch: 4 bits per value are written, 9 times for a kernel of 3 × 3. Formats with one scale per patch
have no such order and go through `triton_conv`; here they serve what that cannot, a Hadamard transform along K.

The image may have any strides; channels-last images give channels-last outputs at no cost, and every output is
channels-last in memory. A 1 × 1 convolution is the linear layer itself. Weights are packed as for `linear`.
"""

__all__ = ["aot_cases", "conv2d", "quantize_patches", "rows_of"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import layouts, registry, triton_linear, tuning
from qgen.kernels.aot_case import AotCase
from qgen.kernels.conv_ops import Geometry
from qgen.kernels.layouts import GROUP
from qgen.kernels.registry import Kernel, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import (
    Activations,
    add_down,
    allocate,
    check_static,
    clamp,
    int8_scale,
    inverse,
    padded_rank,
    per_group,
    store_int4,
    store_int8,
    tile_for,
    transform,
)  # fmt: skip


@triton.jit
def _patches(
    x, rows, cols, keep, H, W, H_OUT, W_OUT, stride_b, stride_c, stride_h, stride_w,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    DY: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """Columns `cols` of the patches of output pixels `rows`, (BM, BK) in the image's dtype; zeros outside the image."""
    channel, tap = cols // (KH * KW), cols % (KH * KW)
    down, right = (tap // KW) * DY, (tap % KW) * DX
    image, pixel = rows // (H_OUT * W_OUT), rows % (H_OUT * W_OUT)
    top, left = (pixel // W_OUT) * SY - PY, (pixel % W_OUT) * SX - PX
    corner = image.to(tl.int64) * stride_b + top * stride_h + left * stride_w
    within = channel.to(tl.int64) * stride_c + down * stride_h + right * stride_w
    i, j = top[:, None] + down[None, :], left[:, None] + right[None, :]
    inside = (i.to(tl.uint32) < H.to(tl.uint32)) & (j.to(tl.uint32) < W.to(tl.uint32))  # negative is huge
    return tl.load(x + corner[:, None] + within[None, :], mask=keep & inside, other=0.0)


@triton.jit
def _quantize_patches(
    x, smooth, shift, down, act_scale, codes, scales, zeros, h, M, K, KP, R, H, W, H_OUT, W_OUT, stride_b, stride_c, stride_h,
    stride_w, ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr, SCALE_ROW:
    tl.constexpr, HAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX:
    tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """`triton_act`'s kernels for patches: codes, scales, zeros and h as there."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    rows, live = pixel.to(tl.int64), pixel < M
    amax = tl.zeros((BM,), dtype=tl.float32)
    if ACT == "int8_row" and act_scale is not None:
        scale = amax + tl.load(act_scale)
        steps = inverse(scale)[:, None]
    low_rank = tl.zeros((BM, RP if RP > 0 else 1), dtype=tl.float32)
    for k0 in range(0, KP, BK):
        cols = k0 + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        tile = _patches(
            x,
            pixel,
            cols,
            keep,
            H,
            W,
            H_OUT,
            W_OUT,
            stride_b,
            stride_c,
            stride_h,
            stride_w,
            KH,
            KW,
            SY,
            SX,
            PY,
            PX,
            DY,
            DX,
        )
        if RP > 0:
            low_rank = add_down(low_rank, tile, cols, down, K, R, RP)
        t = transform(tile, cols, keep, K, smooth, shift, SHIFT_ROW, BM, BK, HAD)
        if ACT != "int8_row":
            store_int4(t, k0, rows, live, act_scale, codes, scales, zeros, M, KP, ACT, BM, BK, SCALE_ROW)
        elif act_scale is not None:
            store_int8(clamp(t * steps, -127.0, 127.0), k0, rows, live, codes, M, KP, BM, BK)
        else:
            amax = tl.maximum(amax, tl.max(tl.abs(t), 1))
    if ACT == "int8_row" and act_scale is None:
        scale = int8_scale(amax)
        steps = inverse(scale)[:, None]
        for k0 in range(0, KP, BK):
            cols = k0 + tl.arange(0, BK)
            keep = live[:, None] & (cols < K)[None, :]
            tile = _patches(
                x, pixel, cols, keep, H, W, H_OUT, W_OUT, stride_b, stride_c, stride_h, stride_w, KH, KW, SY, SX, PY,
                PX, DY, DX,
            )  # fmt: skip
            t = transform(tile, cols, keep, K, smooth, shift, SHIFT_ROW, BM, BK, HAD)
            store_int8(t * steps, k0, rows, live, codes, M, KP, BM, BK)
    if ACT == "int8_row":
        tl.store(scales + rows, scale, mask=live)
    if RP > 0:
        r = tl.arange(0, RP)
        tl.store(h + rows[:, None] * RP + r[None, :], low_rank.to(h.dtype.element_ty), mask=live[:, None])


def quantize_patches(
    x: Tensor,
    geometry: Geometry,
    act: str,
    kp: int,
    smooth: Tensor | None = None,
    shift: Tensor | None = None,
    down: Tensor | None = None,
    hadamard: int = 0,
    act_scale: Tensor | None = None,
) -> Activations:
    """Quantizes the patches of images x (B, C, H, W), any strides, in rows M = B · H' · W'; one launch.

    The other arguments and what is returned are as in `triton_act.quantize_act`, for integer formats; smooth, shift and
    down have K = C · kernel height · kernel width columns.
    """
    check_static(act, kp, act_scale)
    b, c, height, width = x.shape
    h_out, w_out = geometry.output(height, width)
    m, k = b * h_out * w_out, c * geometry.kernel_size[0] * geometry.kernel_size[1]
    rank = 0 if down is None else down.shape[0]
    out = allocate(x, m, act, kp, rank, down)
    if m == 0:
        return out
    capability = tuning.capability_of(x.device)
    config = tuning.launch("act", capability, m)
    bm, bk = tile_for(config, hadamard)
    names = ("KH", "KW", "SY", "SX", "PY", "PX", "DY", "DX")
    pairs = (*geometry.kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation)
    with torch.cuda.device_of(x):
        _quantize_patches[(triton.cdiv(m, bm),)](
            x, smooth, shift, down, act_scale, out.codes, out.scales, out.zeros, out.h, m, k, kp, rank, height, width,
            h_out, w_out, *x.stride(), ACT=act, BM=bm, BK=bk, RP=padded_rank(rank), SHIFT_ROW=shift is not None and
            shift.ndim > 0, SCALE_ROW=per_group(act_scale), HAD=hadamard, **dict(zip(names, pairs, strict=True)), **config.options,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def rows_of(x: Tensor, geometry: Geometry) -> Tensor:
    """Rows (M, C) of a pointwise convolution, contiguous along C: a view of channels-last images."""
    sy, sx = geometry.stride
    rows = x[:, :, ::sy, ::sx].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def conv2d(x: Tensor, slots: Slots, geometry: Geometry) -> Tensor:
    """`conv_reference` for weights packed as for `linear`: x (B, C, H, W) to y (B, N, H', W'), channels-last; two launches."""
    height, width = geometry.output(*x.shape[2:])
    if geometry.pointwise:
        y = triton_linear.linear(rows_of(x, geometry), slots)
    else:
        kp = layouts.round_up(triton_linear.columns(slots.codes), GROUP)
        a = quantize_patches(
            x, geometry, slots.act, kp, slots.smooth, slots.shift, slots.down, slots.hadamard, slots.act_scale
        )
        y = triton_linear.gemm(
            a, slots.codes, slots.scales, slots.global_scale, slots.up, slots.bias, slots.weight, slots.act, slots.n, x.dtype
        )  # fmt: skip
    return y.view(x.shape[0], height, width, slots.n).permute(0, 3, 1, 2)


def _register() -> None:
    """Kernels of the linear layer's names, needs and layout; behind `triton_conv`'s where that has one of the name."""
    for name in triton_linear.NAMES:
        like = registry.find("linear", name)
        behind = "int8_row" in like.needs.acts and name != "triton_w4a8"
        here, priority = (f"{name}_patches", like.priority - 5) if behind else (name, like.priority)
        register(Kernel("conv2d", here, like.needs, conv2d, priority, like.pack, like.unpack))


_register()


def aot_cases() -> list[AotCase]:
    """3 × 3 convolutions of stride 1 with smoothing and rank 32."""
    targets = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120))
    return [
        _case("int8_row", (("cuda", 80), ("cuda", 90))),
        _case("int4_g64", (("cuda", 80), ("cuda", 89))),
        _case("uint4_g64", (*targets, ("hip", "gfx942"))),
    ]


def _case(act: str, targets: tuple) -> AotCase:
    config = tuning.launch("act", None, 4096)
    bm, bk = tile_for(config, 0)
    signature = {
        "x": "*bf16", "smooth": "*bf16", "down": "*bf16", "codes": "*i8" if act == "int8_row" else "*u8", "scales":
        "*fp32", "h": "*bf16",
    }  # fmt: skip
    numbers = ["M", "K", "KP", "R", "H", "W", "H_OUT", "W_OUT", "stride_b", "stride_c", "stride_h", "stride_w"]
    constexprs = {
        "shift": None, "zeros": None, "act_scale": None, "ACT": act, "BM": bm, "BK": bk, "RP": 32, "SHIFT_ROW": False,
        "SCALE_ROW": False, "HAD": 0, "KH": 3, "KW": 3, "SY": 1, "SX": 1, "PY": 1, "PX": 1, "DY": 1, "DX": 1,
    }  # fmt: skip
    if act == "uint4_g64":
        del constexprs["zeros"]
        signature["zeros"] = "*bf16"
    return AotCase(
        f"patches/{act}",
        _quantize_patches,
        signature=signature | dict.fromkeys(numbers, "i32"),
        constexprs=constexprs,
        divisible=(*signature, "K", "KP", "R", "stride_b", "stride_h", "stride_w"),
        options={**config.options, "enable_fp_fusion": False},
        targets=targets,
    )
