r"""Convolutions by the arithmetic of the linear kernels, without ever writing the unfolded 16-bit patches.

    y[b, :, i, j] = linear(patch(b, i, j)),      K = channels · kernel height · kernel width, channels slowest

The first launch reads each patch where it lies in the image, by strides, transforms and quantizes it exactly as the
linear layer's activation kernel would (scales belong to patches, or to their groups of 64, so that codes are those of
the reference), and computes the low-rank branch's h. The second is the linear layer's own product. Against unfolding
first, 16 bits per value of each patch are neither written nor read; the codes, 4 or 8 bits, are.

The image may have any strides; channels-last images give channels-last outputs at no cost, and every output is
channels-last in memory. A 1 × 1 convolution of stride 1 is the linear layer itself. Weights are packed as for `linear`.
"""

__all__ = ["Geometry", "aot_cases", "conv2d", "quantize_patches"]

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import layouts, registry, triton_linear, tuning
from qgen.kernels.aot_case import AotCase
from qgen.kernels.layouts import GROUP
from qgen.kernels.registry import Kernel, register
from qgen.kernels.triton_act import (
    Activations,
    add_down,
    allocate,
    int8_scale,
    inverse,
    padded_rank,
    quantize_act,
    store_int4,
    store_int8,
    tile_for,
    transform,
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Of a convolution with one group and zero padding; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an image of this size."""
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * pad - step * (taps - 1) - 1) // stride + 1 for n, taps, stride, pad, step in sizes)

    @property
    def pointwise(self) -> bool:
        return (self.kernel_size, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))


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
    x, smooth, shift, down, codes, scales, zeros, h, M, K, KP, R, H, W, H_OUT, W_OUT, stride_b, stride_c, stride_h,
    stride_w, ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr, HAD:
    tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX:
    tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """`triton_act`'s kernels for patches: codes, scales, zeros and h as there."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    rows, live = pixel.to(tl.int64), pixel < M
    amax = tl.zeros((BM,), dtype=tl.float32)
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
        if ACT == "int8_row":
            amax = tl.maximum(amax, tl.max(tl.abs(t), 1))
        else:
            store_int4(t, k0, rows, live, codes, scales, zeros, M, KP, ACT, BM, BK)
    if ACT == "int8_row":
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
) -> Activations:
    """Quantizes the patches of images x (B, C, H, W), any strides, in rows M = B · H' · W'; one launch.

    The other arguments and what is returned are as in `triton_act.quantize_act`, for integer formats; smooth, shift and
    down have K = C · kernel height · kernel width columns.
    """
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
            x, smooth, shift, down, out.codes, out.scales, out.zeros, out.h, m, k, kp, rank, height, width, h_out,
            w_out, *x.stride(), ACT=act, BM=bm, BK=bk, RP=padded_rank(rank), SHIFT_ROW=shift is not None and
            shift.ndim > 0, HAD=hadamard, **dict(zip(names, pairs, strict=True)), **config.options,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def conv2d(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    act_scale: Tensor | None,
    weight_format: str,
    act: str,
    n: int,
    hadamard: int,
    geometry: Geometry,
) -> Tensor:
    """Convolution of x (B, C, H, W) with a packed weight: y (B, N, H', W'), channels-last in memory; two launches.

    All tensors as in `triton_linear.linear`; its value is that layer's on `qgen.nn.conv.unfold(x)`.
    """
    b, c, height, width = x.shape
    h_out, w_out = geometry.output(height, width)
    kp = layouts.round_up(triton_linear.columns(codes), GROUP)
    if geometry.pointwise:
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        a = quantize_act(rows if rows.stride(-1) == 1 else rows.contiguous(), act, kp, smooth, shift, down, hadamard)
    else:
        a = quantize_patches(x, geometry, act, kp, smooth, shift, down, hadamard)
    y = triton_linear.gemm(a, codes, scales, global_scale, up, bias, weight_format, act, n, x.dtype)
    return y.view(b, h_out, w_out, n).permute(0, 3, 1, 2)


def _register() -> None:
    """One kernel of op "conv2d" for each integer kernel of op "linear", with the same name, needs and layout."""
    for name in triton_linear.NAMES:
        like = registry.find("linear", name)
        register(Kernel("conv2d", name, like.needs, conv2d, like.priority, like.pack, like.unpack))


_register()


def aot_cases() -> list[AotCase]:
    """3 × 3 convolutions of stride 1 with smoothing and rank 32."""
    targets = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120))
    return [_case("int8_row", (*targets, ("hip", "gfx942"))), _case("int4_g64", (("cuda", 80), ("cuda", 89)))]


def _case(act: str, targets: tuple) -> AotCase:
    config = tuning.launch("act", None, 4096)
    bm, bk = tile_for(config, 0)
    signature = {
        "x": "*bf16", "smooth": "*bf16", "down": "*bf16", "codes": "*i8" if act == "int8_row" else "*u8", "scales":
        "*fp32", "h": "*bf16",
    }  # fmt: skip
    numbers = ["M", "K", "KP", "R", "H", "W", "H_OUT", "W_OUT", "stride_b", "stride_c", "stride_h", "stride_w"]
    constexprs = {
        "shift": None, "zeros": None, "ACT": act, "BM": bm, "BK": bk, "RP": 32, "SHIFT_ROW": False, "HAD": 0, "KH": 3,
        "KW": 3, "SY": 1, "SX": 1, "PY": 1, "PX": 1, "DY": 1, "DX": 1,
    }  # fmt: skip
    return AotCase(
        f"conv/{act}",
        _quantize_patches,
        signature=signature | dict.fromkeys(numbers, "i32"),
        constexprs=constexprs,
        divisible=(*signature, "K", "KP", "R", "stride_b", "stride_h", "stride_w"),
        options={**config.options, "enable_fp_fusion": False},
        targets=targets,
    )
