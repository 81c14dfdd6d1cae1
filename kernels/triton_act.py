r"""Activations to codes, and the low-rank branch's first product, in one pass over x.

    x̂ = ((x + shift) · (1 / smooth)) H         h = x downᵀ         (codes, scales, zeros) = quantize(x̂)

The meaning is `reference.transform_act` and `reference.quantize_act`; codes are equal bit for bit (with a Hadamard
transform: up to ties, since sums have another order). Multiplications and additions are not contracted to FMAs for that
reason. Rounding to nearest even is an addition of 1.5 · 2²³: the low bits of the sum are the two's complement code.

| act | codes | scales | zeros |
|---|---|---|---|
| int8_row | (K/64, M, 64) int8 | (M,) float32 | |
| int4_g64, uint4p_g64 | (K/64, M, 32) uint8, half-split | (K/64, M) float32 holding bf16 | |
| uint4_g64 | the same | the same | (M, K/64) bf16 |
| nvfp4_dynamic | (M', K/2) uint8, even column low | e4m3, swizzled over M' rows | |
| mxfp4 | the same | e8m0 in uint8, swizzled | |

K is padded to `kp` and, for FP4, M to M' = a multiple of 128; what is padded has code 0 and scale 0. Zeros are
columns to be appended to h: x̂ ≈ u · scale + zero, and zero · (group sum of the weight) is one more low-rank product.
Layouts: `qgen.kernels.layouts`. Idea of the fused pass: Li et al., SVDQuant, 2024, https://arxiv.org/abs/2411.05007
"""

__all__ = ["ACTS", "MAX_RANK", "Activations", "aot_cases", "check_static", "per_group", "quantize_act", "reciprocal"]

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import tuning
from qgen.kernels.aot_case import AotCase
from qgen.kernels.layouts import GROUP, HADAMARDS, round_up
from qgen.kernels.triton_hadamard import rotate
from qgen.kernels.triton_producers import Producer, produce, row_statistics

ACTS = ("int8_row", "int4_g64", "uint4p_g64", "uint4_g64", "nvfp4_dynamic", "mxfp4")
MAX_RANK = 256
_BLOCK = {"nvfp4_dynamic": 16, "mxfp4": 32}

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³
_MAGIC_HALF = tl.constexpr(6291456.0)  # the same for steps of 1/2 …
_MAGIC_DOUBLE = tl.constexpr(25165824.0)  # … and of 2
_BF16_TINY = tl.constexpr(1.1754943508222875e-38)
_BF16_MAX = tl.constexpr(3.3895313892515355e38)

# Four pairs of float32 to four bytes of two e2m1 codes; nearest even, saturating. Compute capability 10.0 and above.
E2M1_ASM = tl.constexpr("""{ .reg .b8 b0, b1, b2, b3;
    cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
    mov.b32 $0, {b0, b1, b2, b3}; }""")


@dataclass(frozen=True)
class Activations:
    """What a matrix kernel reads of its left operand; see the table above. h: (M, R') float32 or bf16, or None.

    counters: (programs,) int32 zeros, one per program of the activation kernel, or None.
    """

    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    h: Tensor | None
    m: int
    counters: Tensor | None = None


@triton.jit
def _source(
    x, stride, rows, cols, keep, mean, rstd, gamma, beta, mod_scale, mod_shift, rows_per_image, gate, gate_stride, K,
    KIND: tl.constexpr,
):  # fmt: skip
    """Tile of the layer's input in its dtype, as the low-rank branch sees it; 0 outside."""
    tile = tl.load(x + rows[:, None] * stride + cols[None, :], mask=keep, other=0.0)
    if KIND != "none":
        tile = produce(
            tile, rows, cols, keep, mean, rstd, gamma, beta, mod_scale, mod_shift, rows_per_image, gate, gate_stride,
            K, KIND,
        )  # fmt: skip
    return tile


@triton.jit
def transform(
    tile, cols, keep, K, smooth, shift, SHIFT_ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, HAD: tl.constexpr,
):  # fmt: skip
    """((tile + shift) · (1 / smooth)) H in float32, 0 where padded."""
    t = tile.to(tl.float32)
    inside = cols < K
    if shift is not None:
        if SHIFT_ROW:
            t += tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        else:
            t += tl.load(shift).to(tl.float32)
    if smooth is not None:
        t *= reciprocal(tl.load(smooth + cols, mask=inside, other=1.0))[None, :]
    if shift is not None:
        t = tl.where(keep, t, 0.0)
    if HAD > 0:
        t = rotate(t, BM, BK, HAD)
    return t


@triton.jit
def add_down(h, tile, cols, down, K, R, RP: tl.constexpr):
    """h + tile · downᵀ for down (R, K); ranks from R to RP are zeros."""
    r = tl.arange(0, RP)
    d = tl.load(down + r[:, None] * K + cols[None, :], mask=(r < R)[:, None] & (cols < K)[None, :], other=0.0)
    return tl.dot(tile.to(d.dtype), tl.trans(d), h)


@triton.jit
def reciprocal(s):
    """1 / s for s > 0, correctly rounded.

    The square of an approximate 1 / √s (one instruction, where a division guards its range with six) and a Newton step.
    For s of at most 11 significant bits the relative error, under 2⁻⁴⁰, cannot cross a midpoint between float32
    numbers, which is at least 2⁻³⁶ away. For float32 a second step rounds correctly too, except where all 24 bits of
    the significand are set (Markstein 1990): there the result may be one unit too small.
    """
    t = s.to(tl.float32)
    r = tl.rsqrt(t)
    r = r * r
    r = tl.fma(r, tl.fma(-t, r, 1.0), r)
    if s.dtype == tl.float32:
        r = tl.fma(r, tl.fma(-t, r, 1.0), r)
    return r


@triton.jit
def inverse(scale):
    """1 / scale, correctly rounded; 0 for 0."""
    safe = tl.where(scale > 0, scale.to(tl.float32), 1.0).to(scale.dtype)
    return tl.where(scale > 0, reciprocal(safe), 0.0)


@triton.jit
def _divide(x, C: tl.constexpr):
    """x / C, correctly rounded (Markstein 1990): the rest of the first guess is exact, and corrects it."""
    r: tl.constexpr = 1.0 / C
    q = x * r
    return tl.fma(tl.fma(q, -C, x), r, q)


@triton.jit
def _bf16_scale(scale):
    """A float32 scale as bf16: positive stays positive, finite stays finite."""
    return tl.where(scale > 0, tl.minimum(tl.maximum(scale, _BF16_TINY), _BF16_MAX), 0.0).to(tl.bfloat16)


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x within [LOW, HIGH]: under a scale that was not measured on it, it may be anywhere."""
    return tl.minimum(tl.maximum(x, LOW), HIGH)


@triton.jit
def _integers(x):
    """Nearest even integers of |x| < 2²², in the low bits of an int32."""
    return (x + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _e2m1_pair(low, high, ASM: tl.constexpr):
    """Two tensors of float32 to bytes of two e2m1 codes, `low` in the low nibble."""
    if ASM:
        return tl.inline_asm_elementwise(
            E2M1_ASM, "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    return _e2m1(low) | (_e2m1(high) << 4)


@triton.jit
def _e2m1(x):
    """Code of x: steps of 1/2 below 2, of 1 below 4, of 2 above; ties to even, at most 6, the sign kept."""
    a = tl.minimum(tl.abs(x), 6.0)
    halves = (a + _MAGIC_HALF).to(tl.int32, bitcast=True) - 0x4AC00000
    ones = (a + _MAGIC).to(tl.int32, bitcast=True) - 0x4B400000
    twos = (a + _MAGIC_DOUBLE).to(tl.int32, bitcast=True) - 0x4BC00000
    code = tl.where(a < 2.0, halves, tl.where(a < 4.0, ones + 2, twos + 4))
    return (code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def _quantize_rows(
    x, smooth, shift, down, act_scale, codes, scales, h, gamma, beta, mod_scale, mod_shift, gate, clear, M, K, KP, R, stride_x,
    rows_per_image, gate_stride, eps,
    BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr, HAD: tl.constexpr, KIND:
    tl.constexpr,
):  # fmt: skip
    """int8_row, BM rows per program. clear: (programs,) int32 that become 0, or None."""
    if clear is not None:
        tl.store(clear + tl.program_id(0), 0)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rows_to_int8(
        x, smooth, shift, down, act_scale, codes, scales, h, gamma, beta, mod_scale, mod_shift, gate, rows, M, K, KP, R, stride_x,
        rows_per_image, gate_stride, eps, BM, BK, RP, SHIFT_ROW, HAD, KIND,
    )  # fmt: skip


@triton.jit
def _quantize_blocks(
    x, smooth, shift, down, act_scale, codes, scales, zeros, h, gamma, beta, mod_scale, mod_shift, gate, clear, M, K, KP, R,
    stride_x, rows_per_image, gate_stride, eps,
    ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr, HAD: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Formats with a scale per block of K; ACT "none" computes h alone. clear: (programs,) int32 that become 0, or None."""
    if clear is not None:
        tl.store(clear + tl.program_id(0), 0)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rows_to_blocks(
        x, smooth, shift, down, act_scale, codes, scales, zeros, h, gamma, beta, mod_scale, mod_shift, gate, rows, M, K, KP,
        R, stride_x, rows_per_image, gate_stride, eps, ACT, BM, BK, RP, SHIFT_ROW, SCALE_ROW, HAD, KIND, ASM,
    )  # fmt: skip


@triton.jit
def rows_to_int8(
    x, smooth, shift, down, act_scale, codes, scales, h, gamma, beta, mod_scale, mod_shift, gate, rows, M, K, KP, R, stride_x,
    rows_per_image, gate_stride, eps,
    BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr, HAD: tl.constexpr, KIND:
    tl.constexpr,
):  # fmt: skip
    """Rows (BM,) of x (M, K) to codes (KP/64, M, 64), scales (M,), h (M, RP). The second reading comes from the L2 cache.

    act_scale: () float32, the scale of all rows, or None = each row's is measured. With it there is one reading.
    """
    live = rows < M
    mean, rstd = tl.zeros((BM,), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    if KIND == "layernorm" or KIND == "rmsnorm":
        mean, rstd = row_statistics(x, stride_x, rows, live, K, eps, KIND, BM, BK)
    low_rank = tl.zeros((BM, RP if RP > 0 else 1), dtype=tl.float32)
    if act_scale is None:
        amax = tl.zeros((BM,), dtype=tl.float32)
        for k0 in range(0, KP, BK):
            cols = k0 + tl.arange(0, BK)
            keep = live[:, None] & (cols < K)[None, :]
            tile = _source(
                x, stride_x, rows, cols, keep, mean, rstd, gamma, beta, mod_scale, mod_shift, rows_per_image, gate,
                gate_stride, K, KIND,
            )  # fmt: skip
            if RP > 0:
                low_rank = add_down(low_rank, tile, cols, down, K, R, RP)
            t = transform(tile, cols, keep, K, smooth, shift, SHIFT_ROW, BM, BK, HAD)
            amax = tl.maximum(amax, tl.max(tl.abs(t), 1))
        scale = int8_scale(amax)
    else:
        scale = tl.zeros((BM,), dtype=tl.float32) + tl.load(act_scale)
    steps = inverse(scale)[:, None]
    for k0 in range(0, KP, BK):
        cols = k0 + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        tile = _source(
            x, stride_x, rows, cols, keep, mean, rstd, gamma, beta, mod_scale, mod_shift, rows_per_image, gate,
            gate_stride, K, KIND,
        )  # fmt: skip
        if RP > 0 and act_scale is not None:
            low_rank = add_down(low_rank, tile, cols, down, K, R, RP)
        t = transform(tile, cols, keep, K, smooth, shift, SHIFT_ROW, BM, BK, HAD) * steps
        if act_scale is not None:
            t = clamp(t, -127.0, 127.0)
        store_int8(t, k0, rows, live, codes, M, KP, BM, BK)
    tl.store(scales + rows, scale, mask=live)
    if RP > 0:
        r = tl.arange(0, RP)
        tl.store(h + rows[:, None] * RP + r[None, :], low_rank.to(h.dtype.element_ty), mask=live[:, None])


@triton.jit
def rows_to_blocks(
    x, smooth, shift, down, act_scale, codes, scales, zeros, h, gamma, beta, mod_scale, mod_shift, gate, rows, M, K, KP, R,
    stride_x, rows_per_image, gate_stride, eps,
    ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SHIFT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr, HAD: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows (BM,) of x to codes, scales, zeros and h of a format with a scale per block of K, in one reading.

    act_scale: () float32 or, with SCALE_ROW, (KP / 64,), scales of integer formats; None = they are measured.
    """
    live = rows < M
    mean, rstd = tl.zeros((BM,), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    if KIND == "layernorm" or KIND == "rmsnorm":
        mean, rstd = row_statistics(x, stride_x, rows, live, K, eps, KIND, BM, BK)
    low_rank = tl.zeros((BM, RP if RP > 0 else 1), dtype=tl.float32)
    for k0 in range(0, KP, BK):
        cols = k0 + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        tile = _source(
            x, stride_x, rows, cols, keep, mean, rstd, gamma, beta, mod_scale, mod_shift, rows_per_image, gate,
            gate_stride, K, KIND,
        )  # fmt: skip
        if RP > 0:
            low_rank = add_down(low_rank, tile, cols, down, K, R, RP)
        if ACT != "none":
            t = transform(tile, cols, keep, K, smooth, shift, SHIFT_ROW, BM, BK, HAD)
            if ACT == "nvfp4_dynamic" or ACT == "mxfp4":
                _store_fp4(t, k0, rows, codes, scales, KP, ACT, BM, BK, ASM)
            else:
                store_int4(t, k0, rows, live, act_scale, codes, scales, zeros, M, KP, ACT, BM, BK, SCALE_ROW)
    if RP > 0:
        r = tl.arange(0, RP)
        tl.store(h + rows[:, None] * RP + r[None, :], low_rank.to(h.dtype.element_ty), mask=live[:, None])


@triton.jit
def int8_scale(amax):
    """amax / 127 as the format stores it: correctly rounded, positive stays positive."""
    scale = _divide(amax, 127.0)
    least = tl.full(scale.shape, 1e-38, dtype=tl.float32)  # as a bare number it would be a float64: it is subnormal
    return tl.where(scale > 0, tl.maximum(scale, least), 0.0)


@triton.jit
def store_int8(steps, k0, rows, live, codes, M, KP, BM: tl.constexpr, BK: tl.constexpr):
    """Rounds a tile (BM, BK) in units of its rows' scales and stores it group-major."""
    G: tl.constexpr = BK // 64
    q = tl.reshape(_integers(steps).to(tl.int8), (BM, G, 64))
    group = k0 // 64 + tl.arange(0, G)
    at = rows[:, None] + (group.to(tl.int64) * M)[None, :]
    fits = live[:, None] & (group * 64 < KP)[None, :]
    tl.store(codes + at[:, :, None] * 64 + tl.arange(0, 64)[None, None, :], q, mask=fits[:, :, None])


@triton.jit
def store_int4(
    t, k0, rows, live, act_scale, codes, scales, zeros, M, KP, ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SCALE_ROW: tl.constexpr,
):  # fmt: skip
    """Quantizes a tile (BM, BK) by groups of 64 and stores half-split codes, scales and, for uint4_g64, zeros.

    act_scale: as in `rows_to_blocks`; with it zeros are 0.
    """
    G: tl.constexpr = BK // 64
    group = k0 // 64 + tl.arange(0, G)
    groups = tl.reshape(t, (BM, G, 64))
    if act_scale is not None:
        zero = tl.zeros((BM, G), dtype=tl.bfloat16)
        given = tl.load(act_scale + group, mask=group * 64 < KP, other=0.0) if SCALE_ROW else tl.load(act_scale)
        scale = tl.zeros((BM, G), dtype=tl.float32) + (given[None, :] if SCALE_ROW else given)
    elif ACT == "uint4_g64":
        low, high = tl.min(groups, 2), tl.max(groups, 2)
        centre, half = (high + low) * 0.5, (high - low) * 0.5
        scale = _bf16_scale(_divide(2.0 * half, 15.0))
        zero = (centre - half).to(tl.bfloat16)
        groups = groups - zero.to(tl.float32)[:, :, None]
    else:
        levels: tl.constexpr = 7.0 if ACT == "int4_g64" else 15.0
        scale = _bf16_scale(_divide(tl.max(tl.abs(groups), 2), levels))
    steps = groups * inverse(scale)[:, :, None]
    if ACT != "int4_g64":
        steps = clamp(steps, 0.0, 15.0)
    elif act_scale is not None:
        steps = clamp(steps, -7.0, 7.0)
    low, high = tl.split(tl.permute(tl.reshape(_integers(steps), (BM, G, 2, 32)), (0, 1, 3, 2)))
    packed = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)  # (BM, G, 32)
    fits = live[:, None] & (group * 64 < KP)[None, :]
    at = rows[:, None] + (group.to(tl.int64) * M)[None, :]
    tl.store(codes + at[:, :, None] * 32 + tl.arange(0, 32)[None, None, :], packed, mask=fits[:, :, None])
    tl.store(scales + at, scale.to(tl.float32), mask=fits)
    if ACT == "uint4_g64":
        tl.store(zeros + rows[:, None] * (KP // 64) + group[None, :], zero, mask=fits)


@triton.jit
def _store_fp4(
    t, k0, rows, codes, scales, KP, ACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):
    """Quantizes a tile (BM, BK) to e2m1 and stores even/odd codes and swizzled scales; all rows are written."""
    B: tl.constexpr = 16 if ACT == "nvfp4_dynamic" else 32
    G: tl.constexpr = BK // B
    blocks = tl.reshape(t, (BM, G, B))
    amax = tl.max(tl.abs(blocks), 2)
    if ACT == "nvfp4_dynamic":
        stored = tl.minimum(_divide(amax, 6.0), 448.0).to(tl.float8e4nv)
        per_step = inverse(stored.to(tl.bfloat16))  # exact, and short enough for the quick reciprocal
    else:
        exponent = (amax.to(tl.int32, bitcast=True) >> 23) - 2  # floor(log2 amax) − 2 + 127
        exponent = tl.where(amax > 0, tl.maximum(exponent, 0), 0)
        stored = exponent.to(tl.uint8)
        per_step = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = tl.reshape(blocks * per_step[:, :, None], (BM, BK // 2, 2))
    low, high = tl.split(steps)
    packed = _e2m1_pair(low, high, ASM)
    byte = k0 // 2 + tl.arange(0, BK // 2)
    tl.store(codes + rows[:, None] * (KP // 2) + byte[None, :], packed, mask=(byte < KP // 2)[None, :])
    block = k0 // B + tl.arange(0, G)
    tiles = KP // (4 * B)
    row_part = (rows // 128) * tiles * 512 + (rows % 32) * 16 + (rows % 128 // 32) * 4
    at = row_part[:, None] + ((block // 4) * 512 + block % 4)[None, :]
    tl.store(scales + at, stored, mask=(block < KP // B)[None, :])


def quantize_act(
    x: Tensor,
    act: str | None,
    kp: int,
    smooth: Tensor | None = None,
    shift: Tensor | None = None,
    down: Tensor | None = None,
    hadamard: int = 0,
    producer: Producer | None = None,
    asm: bool | None = None,
    clear: bool = False,
    act_scale: Tensor | None = None,
) -> Activations:
    """Quantizes rows x (M, K) to the format `act` and multiplies them with `down`; one launch.

    Arguments:
        x: bf16, fp16 or float32; its last axis must be contiguous.
        act: one of ACTS, or None for h alone.
        kp: K padded, a multiple of 64 (FP4: of four blocks).
        smooth (K,), shift () or (K,), down (R, K): as in `qgen.kernels.ops.SLOTS`.
        hadamard: size of the block transform, a power of two from 16 to 256 that divides kp, or 0.
        producer: what to apply to x first; `down` sees its result.
        asm: whether e2m1 codes come from the hardware's conversion; None = where there is one.
        clear: whether to return zeroed counters as well, for a kernel that follows.
        act_scale: one float32, or (kp / 64,) for formats with groups of 64: stored scales in place of measured ones. Integer
            formats only; x may exceed what they cover.

    Raises ValueError for a format, a rank above 256, a padding, a transform or stored scales that it cannot do.
    """
    _check(x, act, kp, down, hadamard)
    check_static(act, kp, act_scale)
    m, k = x.shape
    producer = producer or Producer()
    capability = tuning.capability_of(x.device)
    config = tuning.launch("act", capability, m)
    rank = 0 if down is None else down.shape[0]
    out = allocate(x, m, act, kp, rank, down)
    fp4 = act in _BLOCK
    bm, bk = tile_for(config, hadamard)
    grid = (triton.cdiv(round_up(m, 128) if fp4 else m, bm),)
    if clear:
        out = replace(out, counters=x.new_empty(grid, dtype=torch.int32))
    if m == 0:
        return out
    tensors = {"x": x, "smooth": smooth, "shift": shift, "down": down, "act_scale": act_scale}
    tensors |= {"codes": out.codes, "scales": out.scales}
    images = next((t.shape[0] for t in (producer.scale, producer.shift) if t is not None), 1)
    rest = {
        "clear": out.counters, "h": out.h, "gamma": producer.gamma, "beta": producer.beta, "mod_scale": producer.scale,
        "mod_shift": producer.shift, "gate": producer.gate, "M": m, "K": k, "KP": kp, "R": rank,
        "stride_x": x.stride(0), "rows_per_image": max(m // images, 1),
        "gate_stride": 0 if producer.gate is None else producer.gate.stride(0), "eps": float(producer.eps),
        "BM": bm, "BK": bk, "RP": padded_rank(rank), "SHIFT_ROW": shift is not None and shift.ndim > 0,
        "HAD": hadamard, "KIND": producer.kind,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if act == "int8_row":
            _quantize_rows[grid](**tensors, **rest, **config.options, enable_fp_fusion=False)
        else:
            if asm is None:
                asm = isinstance(capability, tuple) and capability >= (10, 0)
            _quantize_blocks[grid](
                **tensors, zeros=out.zeros, **rest, ACT=act or "none", SCALE_ROW=per_group(act_scale),
                ASM=bool(asm and fp4), **config.options, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _check(x: Tensor, act: str | None, kp: int, down: Tensor | None, hadamard: int) -> None:
    if act is not None and act not in ACTS:
        raise ValueError(f"activations can be quantized to {', '.join(ACTS)}; found {act!r}")
    if x.ndim != 2 or x.stride(-1) != 1:
        raise ValueError(
            f"expected rows (M, K) with a contiguous last axis, found {tuple(x.shape)}, strides {x.stride()}"
        )
    unit = max(4 * _BLOCK.get(act or "", 0), GROUP)
    if kp % unit or kp < x.shape[1]:
        raise ValueError(f"{act or 'none'} needs K padded to a multiple of {unit}, at least {x.shape[1]}; found {kp}")
    if hadamard and (hadamard not in HADAMARDS or kp % hadamard):
        raise ValueError(f"a fused Hadamard needs a power of two, 16 to 256, that divides {kp}; found {hadamard}")
    if down is not None and down.shape[0] > MAX_RANK:
        raise ValueError(f"the fused low-rank branch goes up to rank {MAX_RANK}, found {down.shape[0]}")


def check_static(act: str | None, kp: int, act_scale: Tensor | None) -> None:
    """ValueError if activations of format `act`, padded to kp columns, cannot have these stored scales."""
    if act_scale is None:
        return
    if act is None or act in _BLOCK:
        raise ValueError(f"stored scales of activations go with integers, found the format {act or 'none'!r}")
    groups = kp // GROUP
    if act_scale.numel() != 1 and (act == "int8_row" or act_scale.numel() != groups):
        wanted = "one scale" if act == "int8_row" else f"one scale or {groups}"
        raise ValueError(f"{act} with {kp} columns takes {wanted}, found {tuple(act_scale.shape)}")


def per_group(act_scale: Tensor | None) -> bool:
    """Whether there are several stored scales, one per group of 64."""
    return act_scale is not None and act_scale.numel() > 1


def tile_for(config: tuning.Launch, hadamard: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole transforms, and fewer rows where that makes it wide."""
    bk = max(config.bk, hadamard)
    return (config.bm if bk <= 128 else 16), bk


def padded_rank(rank: int) -> int:
    return 0 if rank == 0 else max(16, triton.next_power_of_2(rank))


def allocate(x: Tensor, m: int, act: str | None, kp: int, rank: int, down: Tensor | None) -> Activations:
    """Empty outputs for m rows, on the device of x."""
    new = x.new_empty
    h = None
    if rank:  # bf16 goes to tensor cores as it is; fp16 could overflow where float32 does not
        h = new(m, padded_rank(rank), dtype=torch.bfloat16 if down.dtype == torch.bfloat16 else torch.float32)
    codes = scales = zeros = None
    if act == "int8_row":
        codes, scales = new(kp // GROUP, m, GROUP, dtype=torch.int8), new(m, dtype=torch.float32)
    elif act in _BLOCK:
        rows, block = round_up(m, 128), _BLOCK[act]
        kind = torch.float8_e4m3fn if act == "nvfp4_dynamic" else torch.uint8
        codes = new(rows, kp // 2, dtype=torch.uint8)
        scales = new(rows // 128, kp // (4 * block), 32, 4, 4, dtype=kind)
    elif act is not None:
        codes = new(kp // GROUP, m, GROUP // 2, dtype=torch.uint8)
        scales = new(kp // GROUP, m, dtype=torch.float32)
        if act == "uint4_g64":
            zeros = new(m, kp // GROUP, dtype=torch.bfloat16)
    return Activations(codes, scales, zeros, h, m)


def aot_cases() -> list[AotCase]:
    """Default configurations, with smoothing and rank 32, for bf16; one with a fused adaLN, one in fp16."""
    nvidia = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120))
    amd = tuple(("hip", arch) for arch in ("gfx942", "gfx1100", "gfx1201"))
    cases = [_case("int8_row", (*nvidia, *amd))]
    cases += [_case(act, (*nvidia, *amd)) for act in ("int4_g64", "uint4p_g64", "uint4_g64")]
    cases += [_case(act, tuple(t for t in nvidia if t[1] >= 100)) for act in ("nvfp4_dynamic", "mxfp4")]
    cases.append(_case("int8_row", nvidia, kind="layernorm"))
    cases += [_case(act, (("cuda", 80), ("cuda", 90), ("cuda", 120)), static=True) for act in ("int8_row", "int4_g64")]
    cases += [_case("int8_row", (("cuda", 80), ("cuda", 90)), dtype=dtype) for dtype in ("fp16", "fp32")]
    cases += [_case("int8_row", (("cuda", 80), ("cuda", 90)), hadamard=size) for size in (128, 256)]
    return cases


def _case(
    act: str, targets: tuple, kind: str = "none", dtype: str = "bf16", hadamard: int = 0, static: bool = False
) -> AotCase:
    config = tuning.launch("act", None, 4096)
    bm, bk = tile_for(config, hadamard)
    pointer = f"*{dtype}"
    norm = kind == "layernorm"
    code = "*i8" if act == "int8_row" else "*u8"
    scale = {"nvfp4_dynamic": "*fp8e4nv", "mxfp4": "*u8"}.get(act, "*fp32")
    signature = {
        "x": pointer, "smooth": pointer, "down": pointer, "codes": code, "scales": scale,
        "h": "*bf16" if dtype == "bf16" else "*fp32", "M": "i32", "K": "i32", "KP": "i32", "R": "i32",
        "stride_x": "i32", "rows_per_image": "i32", "gate_stride": "i32", "eps": "fp32",
    }  # fmt: skip
    constexprs = {
        "shift": None, "gamma": None, "beta": None, "mod_scale": None, "mod_shift": None, "gate": None,
        "clear": None, "act_scale": None, "BM": bm, "BK": bk, "RP": 32, "SHIFT_ROW": False,
        "HAD": hadamard, "KIND": kind,
    }  # fmt: skip
    if norm:
        for name in ("mod_scale", "mod_shift"):
            del constexprs[name]
            signature[name] = pointer
    if static:
        del constexprs["act_scale"]
        signature["act_scale"] = "*fp32"
    if act != "int8_row":
        constexprs |= {"ACT": act, "ASM": act in _BLOCK, "zeros": None, "SCALE_ROW": static}
        if act == "uint4_g64":
            del constexprs["zeros"]
            signature["zeros"] = "*bf16"
    parts = (act, "static" if static else "", kind if norm else "", f"h{hadamard}" if hadamard else "", dtype)
    name = "act/" + "_".join(part for part in parts if part)
    return AotCase(
        name,
        _quantize_rows if act == "int8_row" else _quantize_blocks,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, t in signature.items() if t.startswith("*") or n in ("K", "KP", "R", "stride_x")),
        options={**config.options, "enable_fp_fusion": False},
        targets=targets,
    )
