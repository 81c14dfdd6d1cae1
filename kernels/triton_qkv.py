r"""Quantizes q, k and v for low-bit attention: the codes of `attention_reference.prepare`, bit for bit, in Triton.

Four launches and two small reductions:
    _sums     partial sums of k and largest |v| over 1024 tokens: (chunks, B, Hkv, D) float32
    _queries  128 tokens of q to codes, scales, mean and scale · q·k̄
    _keys     64 tokens of k to codes and one scale; the same 64 of v to codes, transposed where the product wants it
    _delta    scale · log2 e · q̄·k' by 16-bit dots, for e2m1 over the scales of q and k, only with smooth_q
Traffic is one read of q, two of k and v, and one write of the codes. The mean of q is rounded to q's dtype before it is subtracted: any
vector may be subtracted, and this one makes q̄·k a product of 16-bit numbers, exact in float32.

With `heads` q and k are normed and rotated first (RMSNorm, rotary positions: `fusion.Heads`), and rounded to their dtype as the model's own
modules would have stored them; no launch is added, and they are never written. A rotation reads each row twice, once with partners in
place: no shuffles, and heads of any even size. k is normed by all three kernels that read it.

With `hadamard` the tiles of q and k are multiplied by a block Hadamard matrix in registers, before they are rounded; no launch is added,
and codes equal the reference's up to ties, since sums have another order.

On a GPU `x · inverse + magic` is one fused instruction and may round a near tie the other way than the reference does: then one code
differs by 1. Layouts of all outputs: `attention_reference.Codes`.
"""

__all__ = ["E2M1X2", "aot_cases", "e2m1_blocks", "e2m1_pairs", "prepare"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels.aot_case import AotCase
from qgen.kernels.attention_ops import AMD, SPECS
from qgen.kernels.attention_reference import BLOCK_K, BLOCK_Q, E4M3_MAX, LOG2E, SMALLEST_E2M1, Codes
from qgen.kernels.fusion import Heads
from qgen.kernels.triton_hadamard import rotate

CHUNK = 1024  # tokens per program of _sums
GROUP = 16  # query blocks per program of _delta

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves the integer nearest to x, ties to even, in the low bits
SMALLEST = tl.constexpr(2.0**-100)
E4M3_TOP, E4M3_SMALLEST = tl.constexpr(448.0), tl.constexpr(2.0**-9)
E2M1_TOP = tl.constexpr(2688.0)  # 6 · 448: the largest e2m1 value under the largest e4m3 scale
E2M1_SMALLEST = tl.constexpr(SMALLEST_E2M1)
SIXTH = tl.constexpr(1.0 / 6.0)
# Four times two float32 to e2m1 pairs; the first operand of the instruction goes to the high nibble.
E2M1X2 = tl.constexpr(
    "{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b, $6, $2; "
    "cvt.rn.satfinite.e2m1x2.f32 c, $7, $3; cvt.rn.satfinite.e2m1x2.f32 d, $8, $4; mov.b32 $0, {a, b, c, d}; }"
)


@triton.jit
def e2m1_pairs(low, high, ASM: tl.constexpr):
    """Two float32 tensors to e2m1 codes, packed low nibble first, uint8. Ties go to the even code, beyond 6 saturates.

    ASM: the conversion instruction of compute capability 10 and above; otherwise the same by adding 1.5 · 2^22, 2^23 and 2^24, whose
    units in the last place are the steps 0.5, 1 and 2 of the three ranges of e2m1.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            E2M1X2, "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    return _e2m1(low) | (_e2m1(high) << 4)


@triton.jit
def _e2m1(x):
    a = tl.minimum(tl.abs(x), 6.0)
    halves = (a + 6291456.0).to(tl.int32, bitcast=True) - 0x4AC00000
    ones = (a + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    twos = (a + 25165824.0).to(tl.int32, bitcast=True) - 0x4BC00000
    code = tl.where(a < 2.0, halves, tl.where(a < 4.0, ones + 2, twos + 4))
    return (code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def e2m1_blocks(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr, EXACT: tl.constexpr = True):
    """x (ROWS, COLUMNS) float32, at most 2688, to pairs (ROWS, COLUMNS / 2) uint8 and scales (ROWS, COLUMNS / 16) e4m3.

    EXACT: codes of blocks whose scale is 0 are 0, and reciprocals are rounded to nearest, by a subroutine. Otherwise what a scale of 0
    multiplies is left open, and reciprocals may miss by 1 in the last place.
    """
    x = tl.reshape(x, (ROWS, COLUMNS // 16, 16))
    ideal = tl.max(tl.abs(x), 2) * SIXTH
    if EXACT:
        blocks = tl.minimum(ideal, E4M3_TOP).to(tl.float8e4nv)
        step = blocks.to(tl.float32)
        safe = tl.where(step > 0, step, 1.0)
        inverse = tl.where(step > 0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), safe), 0.0)
    else:
        blocks = ideal.to(tl.float8e4nv)  # saturates
        inverse = 1.0 / tl.maximum(blocks.to(tl.float32), E4M3_SMALLEST)
    low, high = tl.split(tl.reshape(x * inverse[:, :, None], (ROWS, COLUMNS // 2, 2)))
    return e2m1_pairs(low, high, ASM), blocks


@triton.jit
def _head_tile(
    X, at, rd, places, inside, GAMMA, COS, SIN, eps, D: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Rows of X (offsets `at`) of one head, columns rd, RMSNorm and rotation applied, in X's dtype; 0 where not inside.

    GAMMA: the head's D weights, or None. COS, SIN: (L, D / 2) float32 for positions `places`, or None.
    """
    x = tl.load(X + at[:, None] + rd[None, :], mask=inside, other=0.0)
    if GAMMA is not None or COS is not None:
        wide, rstd = x.to(tl.float32), 1.0
        if GAMMA is not None:
            rstd = (1.0 / tl.sqrt(tl.sum(wide * wide, 1) / D + eps))[:, None]
            wide = wide * rstd * tl.load(GAMMA + rd, mask=rd < D, other=0.0).to(tl.float32)[None, :]
        if COS is not None:
            HALF: tl.constexpr = D // 2
            other = tl.where(rd < HALF, rd + HALF, rd - HALF) if HALVES else rd ^ 1
            pair = tl.where(rd < HALF, rd, rd - HALF) if HALVES else rd // 2
            sign = tl.where(rd < HALF if HALVES else rd % 2 == 0, -1.0, 1.0)
            partner = tl.load(X + at[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
            if GAMMA is not None:
                partner = partner * rstd * tl.load(GAMMA + other, mask=rd < D, other=0.0).to(tl.float32)[None, :]
            turn = places[:, None] * HALF + pair[None, :]
            cos, sin = tl.load(COS + turn, mask=inside, other=1.0), tl.load(SIN + turn, mask=inside, other=0.0)
            wide = wide * cos + partner * sin * sign[None, :]
        x = tl.where(inside, wide, 0.0).to(x.dtype)
    return x


@triton.jit
def _inverse(amax, top):
    """top / amax, 0 where amax counts as zero."""
    tops = tl.full(amax.shape, 0.0, tl.float32) + top
    return tl.where(amax >= SMALLEST, tl.div_rn(tops, tl.maximum(amax, SMALLEST)), 0.0)


@triton.jit
def _integer(x):
    return ((x + ROUND).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _sums(
    K, V, KSUM, VMAX, GAMMA, COS, SIN, skb, skh, skl, svb, svh, svl, HK, L, places, eps,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, BL: tl.constexpr, SMOOTH: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Over CHUNK tokens: the sum of k and the largest |v|, per channel."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rd = tl.arange(0, DP)
    total, top = tl.zeros((DP,), tl.float32), tl.zeros((DP,), tl.float32)
    for start in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), BL):
        rl = (start + tl.arange(0, BL)).to(tl.int64)
        inside = (rl < L)[:, None] & (rd < D)[None, :]
        v = tl.load(V + batch * svb + head * svh + rl[:, None] * svl + rd[None, :], mask=inside, other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(v.to(tl.float32)), 0))
        if SMOOTH:
            k = _head_tile(
                K + batch * skb + head * skh, rl * skl, rd, rl % places, inside, None if GAMMA is None else GAMMA + head * D,
                COS, SIN, eps, D, HALVES,
            )  # fmt: skip
            total += tl.sum(k.to(tl.float32), 0)
    row = ((chunk.to(tl.int64) * tl.num_programs(2) + batch) * HK + head) * D + rd
    tl.store(VMAX + row, top, mask=rd < D)
    if SMOOTH:
        tl.store(KSUM + row, total, mask=rd < D)


@triton.jit
def _queries(
    Q, KMEAN, CODES, BLOCKS, SCALE, MEAN, SHIFT, GAMMA, COS, SIN, sqb, sqh, sql, H, GROUPS, L, places, eps, scale, unit,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, FP4: tl.constexpr, SMOOTH_K: tl.constexpr, SMOOTH_Q: tl.constexpr,
    HAD: tl.constexpr, HALVES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """BM tokens of q. Codes have D columns for int8, DP / 2 bytes for e2m1."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * H + head
    rm, rd = part * BM + tl.arange(0, BM), tl.arange(0, DP)
    inside = (rm < L)[:, None] & (rd < D)[None, :]
    x = _head_tile(
        Q + batch * sqb + head.to(tl.int64) * sqh, rm.to(tl.int64) * sql, rd, rm % places, inside,
        None if GAMMA is None else GAMMA + head * D, COS, SIN, eps, D, HALVES,
    ).to(tl.float32)  # fmt: skip
    if SMOOTH_K:
        kmean = tl.load(KMEAN + (batch * (H // GROUPS) + head // GROUPS) * D + rd, mask=rd < D, other=0.0)
        tl.store(SHIFT + row * L + rm, tl.sum(x * kmean[None, :], 1) * scale, mask=rm < L)
    if SMOOTH_Q:
        here = tl.minimum(L - part * BM, BM).to(tl.float32)
        mean = (tl.sum(x, 0) * (1.0 / here)).to(MEAN.dtype.element_ty)
        tl.store(MEAN + (row * tl.num_programs(0) + part) * D + rd, mean, mask=rd < D)
        x = tl.where(inside, x - mean.to(tl.float32)[None, :], 0.0)
    if HAD > 0:
        x = rotate(x, BM, DP, HAD)
    amax = tl.max(tl.abs(x), 1)
    if FP4:
        amax = tl.zeros((BM,), tl.float32) + tl.maximum(tl.max(amax, 0), E2M1_SMALLEST)
    TOP: tl.constexpr = E2M1_TOP if FP4 else 127.0
    step = tl.div_rn(amax, tl.full((BM,), TOP, tl.float32))
    tl.store(SCALE + row * L + rm, step * unit, mask=rm < L)
    x *= _inverse(amax, TOP)[:, None]
    rows = row * L + rm[:, None]
    if FP4:
        codes, blocks = e2m1_blocks(x, BM, DP, ASM)
        tl.store(CODES + rows * (DP // 2) + tl.arange(0, DP // 2)[None, :], codes, mask=(rm < L)[:, None])
        tl.store(BLOCKS + rows * (DP // 16) + tl.arange(0, DP // 16)[None, :], blocks, mask=(rm < L)[:, None])
    else:
        tl.store(CODES + rows * D + rd[None, :], _integer(x), mask=inside)


@triton.jit
def _keys(
    K, V, KMEAN, VAMAX, KCODES, KBLOCKS, KSCALE, VCODES, VBLOCKS, VSCALE, GAMMA, COS, SIN,
    skb, skh, skl, svb, svh, svl, HK, L, LP, places, eps, v_max,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, FP4: tl.constexpr, PV: tl.constexpr, SMOOTH_K: tl.constexpr,
    HAD: tl.constexpr, HALVES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """BN tokens of k and v; those beyond L become zero codes. The first program of a head stores the scales of v."""
    part, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = batch * HK + head
    rn, rd = part * BN + tl.arange(0, BN), tl.arange(0, DP)
    wide = rn.to(tl.int64)
    inside = (rn < L)[:, None] & (rd < D)[None, :]
    x = _head_tile(
        K + batch * skb + head * skh, wide * skl, rd, rn % places, inside, None if GAMMA is None else GAMMA + head * D,
        COS, SIN, eps, D, HALVES,
    ).to(tl.float32)  # fmt: skip
    if SMOOTH_K:
        kmean = tl.load(KMEAN + row * D + rd, mask=rd < D, other=0.0)
        x = tl.where(inside, x - kmean[None, :], 0.0)
    if HAD > 0:
        x = rotate(x, BN, DP, HAD)
    amax = tl.max(tl.max(tl.abs(x), 1), 0)
    amax = tl.zeros((1,), tl.float32) + (tl.maximum(amax, E2M1_SMALLEST) if FP4 else amax)
    TOP: tl.constexpr = E2M1_TOP if FP4 else 127.0
    step = tl.div_rn(amax, tl.full((1,), TOP, tl.float32))
    tl.store(KSCALE + row * tl.num_programs(0) + part + tl.arange(0, 1), step)
    x *= _inverse(amax, TOP)[:, None]
    rows = row * LP + wide[:, None]
    if FP4:
        codes, blocks = e2m1_blocks(x, BN, DP, ASM)
        tl.store(KCODES + rows * (DP // 2) + tl.arange(0, DP // 2)[None, :], codes)
        tl.store(KBLOCKS + rows * (DP // 16) + tl.arange(0, DP // 16)[None, :], blocks)
    else:
        tl.store(KCODES + rows * D + rd[None, :], _integer(x), mask=(rd < D)[None, :])
    v = tl.load(V + batch * svb + head * svh + wide[:, None] * svl + rd[None, :], mask=inside, other=0.0).to(tl.float32)
    vmax = tl.load(VAMAX + row * D + rd, mask=rd < D, other=0.0)
    if PV == "fp16":
        bits = vmax.to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        vstep = bits.to(tl.float32, bitcast=True)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        tl.store(VCODES + rows * D + rd[None, :], (v * inverse[None, :]).to(tl.float16), mask=(rd < D)[None, :])
    else:
        top = E2M1_TOP if PV == "e2m1" else v_max
        vstep = tl.div_rn(vmax, tl.zeros((DP,), tl.float32) + top)
        y = tl.trans(v * _inverse(vmax, top)[None, :])
        columns = (row * D + rd)[:, None]
        if PV == "e2m1":
            codes, blocks = e2m1_blocks(y, DP, BN, ASM)
            rb, rs = part * (BN // 2) + tl.arange(0, BN // 2), part * (BN // 16) + tl.arange(0, BN // 16)
            tl.store(VCODES + columns * (LP // 2) + rb[None, :], codes, mask=(rd < D)[:, None])
            tl.store(VBLOCKS + columns * (LP // 16) + rs[None, :], blocks, mask=(rd < D)[:, None])
        else:
            y = tl.minimum(tl.maximum(y, -E4M3_TOP), E4M3_TOP).to(tl.float8e4nv)
            tl.store(VCODES + columns * LP + wide[None, :], y, mask=(rd < D)[:, None])
    if part == 0:
        tl.store(VSCALE + row * D + rd, vstep, mask=rd < D)


@triton.jit
def _delta(
    MEAN, K, KMEAN, QSCALE, KSCALE, DELTA, GAMMA, COS, SIN, skb, skh, skl, H, GROUPS, NQ, LQ, L, LP, places, eps, unit,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr, SMOOTH_K: tl.constexpr,
    FP4: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """BQ query means times BN keys: unit · (q̄·k - q̄·k̄), for FP4 over their scales; 0 for keys beyond L."""
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // H, row % H
    rq, rn = tl.program_id(1) * BQ + tl.arange(0, BQ), tl.program_id(0) * BN + tl.arange(0, BN)
    rd = tl.arange(0, DP)
    mean = tl.load(
        MEAN + (row * NQ + rq[:, None]) * D + rd[None, :], mask=(rq < NQ)[:, None] & (rd < D)[None, :], other=0.0
    )
    k = _head_tile(
        K + batch * skb + head // GROUPS * skh, rn.to(tl.int64) * skl, rd, rn % places, (rn < L)[:, None] & (rd < D)[None, :],
        None if GAMMA is None else GAMMA + head // GROUPS * D, COS, SIN, eps, D, HALVES,
    )  # fmt: skip
    x = tl.dot(mean, tl.trans(k))
    if SMOOTH_K:
        kmean = tl.load(KMEAN + (batch * (H // GROUPS) + head // GROUPS) * D + rd, mask=rd < D, other=0.0)
        x -= tl.sum(mean.to(tl.float32) * kmean[None, :], 1)[:, None]
    x *= unit
    if FP4:
        qs = tl.load(QSCALE + row * LQ + rq * BLOCK_Q, mask=rq < NQ, other=1.0)
        ks = tl.load(KSCALE + (batch * (H // GROUPS) + head // GROUPS) * (LP // BN) + tl.program_id(0))
        x = x / (qs * ks)[:, None]
    x = tl.where((rn < L)[None, :], x, 0.0)
    tl.store(DELTA + (row * NQ + rq[:, None]) * LP + rn[None, :], x, mask=(rq < NQ)[:, None])


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    spec: str,
    smooth_k: bool = True,
    smooth_q: bool = False,
    v_max: float = E4M3_MAX,
    asm: bool = False,
    hadamard: int = 0,
    heads: tuple[Heads, Heads] | None = None,
) -> Codes:
    """Quantizes q (B, H, Lq, D), k and v (B, Hkv, Lk, D), of any strides whose last is 1; see `attention_reference.prepare`.

    heads: norm and rotation of q and of k, which then are what the projections gave; row l is at position l modulo the length of cos.
    Raises ValueError if they are for other heads.
    asm: use the e2m1 conversion instruction of compute capability 10 and above; its result is the same.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    qk, pv = SPECS[spec]
    (b, h, lq, d), (hk, lk) = q.shape, k.shape[1:3]
    of_q, of_k = (_arguments(part, d, n) for part, n in zip(heads or (None, None), (h, hk), strict=True))
    warps = 8 if heads else 4  # a row and its partners take twice the registers
    fp4, dp = qk == "e2m1", triton.next_power_of_2(d)
    nq, nk, chunks = triton.cdiv(lq, BLOCK_Q), triton.cdiv(lk, BLOCK_K), triton.cdiv(lk, CHUNK)
    lp, unit = nk * BLOCK_K, scale * LOG2E

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    totals, tops = new(chunks, b, hk, d), new(chunks, b, hk, d)
    _sums[(chunks, hk, b)](
        k, v, totals, tops, **_strides(k, "k"), **_strides(v, "v"), HK=hk, L=lk,
        D=d, DP=dp, CHUNK=CHUNK, BL=64, SMOOTH=smooth_k, **of_k, num_warps=warps,
    )  # fmt: skip
    k_mean, v_amax = totals.sum(0) * (1.0 / lk) if smooth_k else None, tops.amax(0)

    q_codes = new(b, h, lq, dp // 2, dtype=torch.uint8) if fp4 else new(b, h, lq, d, dtype=torch.int8)
    q_blocks = new(b, h, lq, dp // 16, dtype=torch.float8_e4m3fn) if fp4 else None
    q_scale, shift = new(b, h, lq), new(b, h, lq) if smooth_k else None
    mean = new(b, h, nq, d, dtype=q.dtype) if smooth_q else None
    _queries[(nq, h, b)](
        q, k_mean, q_codes, q_blocks, q_scale, mean, shift, **_strides(q, "q"), H=h, GROUPS=h // hk, L=lq, scale=scale, unit=unit,
        D=d, DP=dp, BM=BLOCK_Q, FP4=fp4, SMOOTH_K=smooth_k, SMOOTH_Q=smooth_q, HAD=hadamard, ASM=asm, **of_q, num_warps=8,
    )  # fmt: skip

    k_codes = new(b, hk, lp, dp // 2, dtype=torch.uint8) if fp4 else new(b, hk, lp, d, dtype=torch.int8)
    k_blocks = new(b, hk, lp, dp // 16, dtype=torch.float8_e4m3fn) if fp4 else None
    k_scale, v_scale, v_blocks = new(b, hk, nk), new(b, hk, d), None
    if pv == "fp16":
        v_codes = new(b, hk, lp, d, dtype=torch.float16)
    elif pv == "e4m3":
        v_codes = new(b, hk, d, lp, dtype=torch.float8_e4m3fn)
    else:
        v_codes = new(b, hk, d, lp // 2, dtype=torch.uint8)
        v_blocks = new(b, hk, d, lp // 16, dtype=torch.float8_e4m3fn)
    _keys[(nk, hk, b)](
        k, v, k_mean, v_amax, k_codes, k_blocks, k_scale, v_codes, v_blocks, v_scale,
        **_strides(k, "k"), **_strides(v, "v"), HK=hk, L=lk, LP=lp, v_max=float(v_max),
        D=d, DP=dp, BN=BLOCK_K, FP4=fp4, PV=pv, SMOOTH_K=smooth_k, HAD=hadamard, ASM=asm, **of_k, num_warps=warps,
    )  # fmt: skip

    delta = new(b, h, nq, lp) if smooth_q else None
    if smooth_q:
        _delta[(nk, triton.cdiv(nq, GROUP), b * h)](
            mean, k, k_mean, q_scale, k_scale, delta, **_strides(k, "k"), H=h, GROUPS=h // hk, NQ=nq, LQ=lq, L=lk, LP=lp, unit=unit,
            D=d, DP=dp, BQ=GROUP, BN=BLOCK_K, BLOCK_Q=BLOCK_Q, SMOOTH_K=smooth_k, FP4=fp4, **of_k, num_warps=4,
        )  # fmt: skip
    return Codes(
        q_codes, q_blocks, q_scale, k_codes, k_blocks, k_scale, v_codes, v_blocks, v_scale, delta, shift, lk, spec
    )


def _strides(t: Tensor, name: str) -> dict[str, int]:
    return dict(zip((f"s{name}b", f"s{name}h", f"s{name}l"), t.stride()[:3], strict=True))


def _arguments(heads: Heads | None, d: int, count: int) -> dict:
    """What `_head_tile` reads, for `count` heads of d. ValueError if `heads` describes others."""
    if heads is None:
        return dict.fromkeys(("GAMMA", "COS", "SIN")) | {"places": 1, "eps": 0.0, "HALVES": False}
    if (heads.dim, heads.columns) != (d, count * d):
        raise ValueError(
            f"expected norm and rotation of {count} heads of {d}, found {heads.columns} columns in heads of {heads.dim}"
        )
    return {
        "GAMMA": heads.gamma, "COS": heads.cos, "SIN": heads.sin, "places": 1 if heads.cos is None else heads.cos.shape[0],
        "eps": float(heads.eps), "HALVES": heads.halves,
    }  # fmt: skip


def aot_cases() -> list[AotCase]:
    """What is compiled without a GPU: each kernel for a card of each kind, head dimension 128, queries smoothed or not, rotated or not."""
    cases = [
        _case("sums", _sums, {"CHUNK": CHUNK, "BL": 64, "SMOOTH": True}, (80, 120, ("hip", "gfx942")), 4),
        _case("sums_heads", _sums, {"CHUNK": CHUNK, "BL": 64, "SMOOTH": True}, (80, 120), 8, heads=True),
    ]
    for name, fp4, targets in (("delta", False, (80, ("hip", "gfx942"))), ("delta_fp4", True, (100, 120))):
        constants = {"BQ": GROUP, "BN": BLOCK_K, "BLOCK_Q": BLOCK_Q, "SMOOTH_K": True, "FP4": fp4}
        cases.append(_case(name, _delta, constants, targets, 4))
        if fp4:
            cases.append(_case(f"{name}_heads", _delta, constants, targets, 4, heads=True))
    amd = tuple(("hip", arch) for arch in AMD)
    for name, fp4, pv, targets, had in (
        ("int8", False, "fp16", (80, 90, *amd), 0),
        ("int8_fp8", False, "e4m3", (89, 120), 0),
        ("fp4", True, "e2m1", (100, 120), 0),
        ("int8_h128", False, "fp16", (80, 90), 128),
        ("fp4_h128", True, "e2m1", (100, 120), 128),
        ("int8_heads", False, "fp16", (80, 90), 0),
        ("fp4_heads", True, "e2m1", (100, 120), 0),
    ):
        heads = name.endswith("heads")
        smooth = {"SMOOTH_K": True, "HAD": had, "ASM": fp4}
        if name != "int8_fp8":
            queries = {"BM": BLOCK_Q, "FP4": fp4, "SMOOTH_Q": fp4, **smooth}
            cases.append(_case(f"queries_{name}", _queries, queries, targets, 8, heads))
        cases.append(
            _case(
                f"keys_{name}",
                _keys,
                {"BN": BLOCK_K, "FP4": fp4, "PV": pv, **smooth},
                targets,
                8 if heads else 4,
                heads,
            )
        )
    return cases


def _case(name: str, fn, constants: dict, targets: tuple, warps: int, heads: bool = False) -> AotCase:
    fp4, pv = constants.get("FP4", False), constants.get("PV", "")
    constants = {"D": 128, "DP": 128, "HALVES": heads, **constants}
    types = {
        **dict.fromkeys(("Q", "K", "V", "MEAN", "GAMMA"), "*bf16"),
        **dict.fromkeys(
            ("KSUM", "VMAX", "KMEAN", "VAMAX", "SCALE", "SHIFT", "QSCALE", "KSCALE", "VSCALE", "DELTA", "COS", "SIN"),
            "*fp32",
        ),
        **dict.fromkeys(("CODES", "KCODES"), "*u8" if fp4 else "*i8"),
        **dict.fromkeys(("BLOCKS", "KBLOCKS", "VBLOCKS"), "*fp8e4nv"),
        "VCODES": {"e4m3": "*fp8e4nv", "e2m1": "*u8"}.get(pv, "*fp16"),
        **dict.fromkeys(("scale", "unit", "v_max", "eps"), "fp32"),
    }
    absent = {"BLOCKS", "KBLOCKS"} if not fp4 else set()
    absent |= {"VBLOCKS"} if pv != "e2m1" else set()
    absent |= set() if heads else {"GAMMA", "COS", "SIN"}
    absent |= {"MEAN"} if constants.get("SMOOTH_Q") is False else set()
    names = [n for n in fn.arg_names if n not in constants]
    strides = tuple(n for n in names if n.startswith("s") and len(n) == 3)
    return AotCase(
        f"qkv/{name}",
        fn,
        signature={n: types.get(n, "i32") for n in names if n not in absent},
        constexprs={**constants, **dict.fromkeys(absent & set(names))},
        divisible=tuple(n for n in names if types.get(n, "").startswith("*") and n not in absent) + strides,
        options={"num_warps": warps},
        targets=tuple(t if isinstance(t, tuple) else ("cuda", t) for t in targets),
    )
