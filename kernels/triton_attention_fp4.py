r"""Attention with e2m1 q kᵀ on block-scaled tensor cores (Blackwell), and e4m3 or e2m1 P v: `attention_reference.attend`, in Triton.

Layouts of codes and scales: `attention_reference.Codes`. A program serves 128 queries of one head and walks the keys 64 at a time:

    X = (δ + Σ (cq · bq) (ck · bk)) · step,   P = exp2(X - m + off),   out = out · 2^(m_old - m) + P v

cq, ck are e2m1 codes and bq, bk their e4m3 scales per 16 of D, both operands of one `tl.dot_scaled`; step = query scale · key scale, one
number per program and block; δ · step is the exact product of the mean query of these 128 with each key, if queries were smoothed: four
bits are too few for a common offset. The sum starts at δ, so that it costs nothing.
For e2m1 P v, P is packed here, with an e4m3 scale for every 16 keys, after `off` = log2(448 · 6) has filled the range of both
(SageAttention 3, https://arxiv.org/abs/2505.11594). That product is the least accurate part, so that e4m3 is the one to start from.
Masks are not served, causal calls are: a masked call belongs to int8 attention.
Below compute capability 10.0 `dot_scaled` would fall back to 16-bit products and spill: never offered there.
"""

__all__ = ["Config", "aot_cases", "attend", "attention", "configure"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import attention_ops
from qgen.kernels.aot_case import AotCase
from qgen.kernels.attention_ops import HEAD_DIMS, SPECS, AttentionNeeds
from qgen.kernels.attention_reference import BLOCK_K, BLOCK_Q, Codes
from qgen.kernels.registry import Kernel, register
from qgen.kernels.triton_attention import LN2, LOG2_448, Config, add_values, limits, refuse
from qgen.kernels.triton_qkv import e2m1_blocks, prepare

# Where sums live in tensor memory (10.x, 11.0), Triton 3.8 fails to compile this loop if the sum starts at 0 ("uninitialized alloc must
# have a mutable memdesc type"). Products other than 0 are above 1e-7, so that the sum does not see this.
NOT_ZERO = tl.constexpr(1e-30)
LOG2_2688 = tl.constexpr(11.392317422778762)


@triton.jit
def _byte(word, INDEX: tl.constexpr):
    return (word >> (8 * INDEX)).to(tl.uint8)


@triton.jit
def scales(P, row, STRIDE, WIDTH: tl.constexpr, TMEM: tl.constexpr):
    """(rows, WIDTH) e4m3 scales at P + row · STRIDE; WIDTH and STRIDE: both 4 or 8 bytes, or 4 and a multiple of it.

    A row is loaded as one integer. Loads of it are then wide enough to be copied in the background, and what a thread hands to the tensor
    cores is what it read: of single bytes Triton 3.8 makes a round trip through shared memory and five instructions per word.
    Tensor memory is filled from bytes in any case.
    """
    if TMEM:
        return tl.load(P + row[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :])
    word = tl.load(P.to(tl.pointer_type(tl.int32 if WIDTH == 4 else tl.int64)) + row * (STRIDE // WIDTH))
    if WIDTH == 4:
        even, odd = tl.join(_byte(word, 0), _byte(word, 2)), tl.join(_byte(word, 1), _byte(word, 3))
    else:
        even = tl.join(tl.join(_byte(word, 0), _byte(word, 4)), tl.join(_byte(word, 2), _byte(word, 6)))
        odd = tl.join(tl.join(_byte(word, 1), _byte(word, 5)), tl.join(_byte(word, 3), _byte(word, 7)))
    return tl.reshape(tl.join(even, odd), (row.shape[0], WIDTH)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _tile(
    acc, rest, total, top, q, qb, KP, KB, VP, VB, KS, qs, DELTA_ROW, n0, seen, LP,
    D1: tl.constexpr, D2: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FP4: tl.constexpr, ACC16: tl.constexpr, EDGE: tl.constexpr, ASM: tl.constexpr, TMEM: tl.constexpr,
):  # fmt: skip
    """One block of keys. KP, KB, VP, VB point at its first codes and block scales; FP4: P v in e2m1."""
    rn, r1, r2 = tl.arange(0, BN), tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 else 16)
    OFF: tl.constexpr = LOG2_2688 if FP4 else LOG2_448
    k = tl.load(KP + rn[None, :] * (DP // 2) + tl.arange(0, DP // 2)[:, None])
    kb = scales(KB, rn, DP // 16, DP // 16, TMEM)
    if DELTA_ROW is not None:
        start = tl.broadcast_to(tl.load(DELTA_ROW + n0 + rn)[None, :], (BM, BN))
        s = tl.dot_scaled(q, qb, "e2m1", k, kb, "e2m1", start)
    elif TMEM:
        s = tl.dot_scaled(q, qb, "e2m1", k, kb, "e2m1", tl.full((BM, BN), NOT_ZERO, tl.float32))
    else:
        s = tl.dot_scaled(q, qb, "e2m1", k, kb, "e2m1")
    step = qs * tl.load(KS)  # above 0
    if EDGE:
        s = tl.where((n0 + rn)[None, :] < seen[:, None], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * step)
    shift = OFF - new
    p = tl.exp2(tl.fma(s, tl.full((BM, BN), 0.0, tl.float32) + step, tl.broadcast_to(shift[:, None], (BM, BN))))
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    if FP4:
        w, wb = e2m1_blocks(p, BM, BN, ASM, False)
        rb = tl.arange(0, BN // 2)
        v = tl.load(VP + r1[None, :] * (LP // 2) + rb[:, None])
        vb = scales(VB, r1, LP // 16, BN // 16, TMEM)
        acc = tl.dot_scaled(w, wb, "e2m1", v, vb, "e2m1", acc * fade[:, None])
        if D2:
            v = tl.load(VP + r2[None, :] * (LP // 2) + rb[:, None])
            vb = scales(VB, r2, LP // 16, BN // 16, TMEM)
            rest = tl.dot_scaled(w, wb, "e2m1", v, vb, "e2m1", rest * fade[:, None])
    else:
        w = p.to(tl.float8e4nv)
        acc = add_values(acc, fade, w, tl.load(VP + r1[None, :] * LP + rn[:, None]), ACC16)
        if D2:
            rest = add_values(rest, fade, w, tl.load(VP + r2[None, :] * LP + rn[:, None]), ACC16)
    return acc, rest, total, new


@triton.jit
def _attend(
    Q, QB, K, KB, V, VB, QS, KS, VS, DELTA, SHIFT, OUT, LSE, sob, soh, som, H, GROUPS, LQ, LK, LP,
    D1: tl.constexpr, D2: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
    FP4: tl.constexpr, ACC16: tl.constexpr, CAUSAL: tl.constexpr, ASM: tl.constexpr, TMEM: tl.constexpr,
):  # fmt: skip
    """Grid (queries / BM, H, B). The head dimension is D1 + D2, padded to DP in q and k. VB, DELTA, SHIFT: or None."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, row_k = batch * H + head, batch * (H // GROUPS) + head // GROUPS
    D: tl.constexpr = D1 + D2
    rm, r1, r2 = part * BM + tl.arange(0, BM), tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 else 16)
    inside = rm < LQ
    rows = row * LQ + rm
    q = tl.load(Q + rows[:, None] * (DP // 2) + tl.arange(0, DP // 2)[None, :], mask=inside[:, None], other=0)
    qb = tl.load(QB + rows[:, None] * (DP // 16) + tl.arange(0, DP // 16)[None, :], mask=inside[:, None], other=0.0)
    qs = tl.load(QS + row * LQ + part * BM)
    kp, kb, ks = K + row_k * LP * (DP // 2), KB + row_k * LP * (DP // 16), KS + row_k * (LP // BN)
    STEP: tl.constexpr = BN // 2 if FP4 else BN  # bytes of v, transposed
    vp = V + row_k * D * (LP // 2 if FP4 else LP)
    vb = VB + row_k * D * (LP // 16) if FP4 else kb
    delta = None if DELTA is None else DELTA + (row * tl.cdiv(LQ, BLOCK_Q) + part * BM // BLOCK_Q) * LP
    seen = tl.minimum(rm + 1 + LK - LQ, LK) if CAUSAL else tl.zeros((BM,), tl.int32) + LK
    whole, end = limits(part * BM, LQ, LK, BM, BN, CAUSAL)
    top, total = tl.full((BM,), -1.0e30, tl.float32), tl.zeros((BM,), tl.float32)
    acc, rest = tl.zeros((BM, D1), tl.float32), tl.zeros((BM, D2 if D2 else 1), tl.float32)
    for n0 in range(0, whole, BN):
        acc, rest, total, top = _tile(
            acc, rest, total, top, q, qb, kp, kb, vp, vb, ks, qs, delta, n0, seen, LP,
            D1, D2, DP, BM, BN, FP4, ACC16, False, ASM, TMEM,
        )  # fmt: skip
        kp += BN * (DP // 2)
        kb += BN * (DP // 16)
        vp += STEP
        ks += 1
        if FP4:
            vb += BN // 16
    for n0 in tl.range(whole, end, BN, num_stages=1):
        acc, rest, total, top = _tile(
            acc, rest, total, top, q, qb, kp, kb, vp, vb, ks, qs, delta, n0, seen, LP,
            D1, D2, DP, BM, BN, FP4, ACC16, True, ASM, TMEM,
        )  # fmt: skip
        kp += BN * (DP // 2)
        kb += BN * (DP // 16)
        vp += STEP
        ks += 1
        if FP4:
            vb += BN // 16
    safe = tl.where(total > 0, total, 1.0)
    lse = (top + tl.log2(safe) - (LOG2_2688 if FP4 else LOG2_448)) * LN2
    if SHIFT is not None:
        lse += tl.load(SHIFT + rows, mask=inside, other=0.0)
    tl.store(LSE + rows, tl.where(total > 0, lse, float("-inf")), mask=inside)
    op = OUT + batch * sob + head.to(tl.int64) * soh + rm.to(tl.int64)[:, None] * som
    acc = acc * (1.0 / safe)[:, None] * tl.load(VS + row_k * D + r1)[None, :]
    tl.store(op + r1[None, :], acc.to(OUT.dtype.element_ty), mask=inside[:, None])
    if D2:
        rest = rest * (1.0 / safe)[:, None] * tl.load(VS + row_k * D + r2)[None, :]
        tl.store(op + r2[None, :], rest.to(OUT.dtype.element_ty), mask=inside[:, None])


def configure(capability: tuple[int, int] | str | None, spec: str) -> Config:
    """The launch for a compute capability (None: plain operations) and a spec."""
    geforce = capability in ((12, 0), (12, 1))  # float32 sums of e4m3 products at half rate; sums in registers
    tmem = capability is not None and not geforce
    return Config(acc16=geforce and SPECS[spec][1] == "e4m3", asm=capability is not None, tmem=tmem)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    spec: str,
    smooth_k: bool,
    smooth_q: bool,
    hadamard: int = 0,
) -> tuple[Tensor, Tensor]:
    """The op: (out, lse). NoKernel, before anything is launched, for what the kernel does not serve."""
    wanted = attention_ops.ask(q, spec, mask, causal, smooth_q, hadamard)
    refuse(NEEDS.get(spec, NEEDS["fp4"]), wanted)
    config = configure(wanted.capability, spec)
    with torch.cuda.device_of(q):
        codes = prepare(q, k, v, scale, spec, smooth_k, smooth_q, config.v_max, config.asm, hadamard)
        return attend(codes, q.dtype, causal, config)


def attend(
    codes: Codes, dtype: torch.dtype, causal: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over e2m1 codes: out (B, H, Lq, D) in `dtype`, lse (B, H, Lq) float32. Codes of V must respect `config.v_max`."""
    config = config or Config()
    b, h, lq, packed = codes.q.shape
    hk, lp, d = codes.k.shape[1], codes.k.shape[2], codes.v_scale.shape[2]
    d1 = 64 if d == 96 else d
    out = torch.empty((b, lq, h, d), dtype=dtype, device=codes.q.device).transpose(1, 2)
    lse = torch.empty((b, h, lq), dtype=torch.float32, device=codes.q.device)
    _attend[(triton.cdiv(lq, config.bm), h, b)](
        codes.q, codes.q_blocks, codes.k, codes.k_blocks, codes.v, codes.v_blocks, codes.q_scale, codes.k_scale, codes.v_scale,
        codes.delta, codes.shift, out, lse, *out.stride()[:3], h, h // hk, lq, codes.lk, lp,
        D1=d1, D2=d - d1, DP=2 * packed, BM=config.bm, BN=BLOCK_K, BLOCK_Q=BLOCK_Q,
        FP4=SPECS[codes.spec][1] == "e2m1", ACC16=config.acc16, CAUSAL=causal, ASM=config.asm, TMEM=config.tmem,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


NEEDS = {
    spec: AttentionNeeds(
        devices=("cuda",),
        capability=((10, 0), (12, 1)),
        weights=("e2m1",),
        acts=(SPECS[spec][1],),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=HEAD_DIMS,
        refuses=frozenset({"mask"}),
    )
    for spec in ("fp4_fp8", "fp4")
}
for _spec, _needs in NEEDS.items():
    register(Kernel("attention", f"triton_{_spec}", _needs, attention, priority=10))


def aot_cases() -> list[AotCase]:
    """What is compiled without a GPU: both products, both families of Blackwell, three head dimensions, the diagonal."""
    blackwell = {
        ("cuda", 100): (r"UTCOMMA",),
        ("cuda", 120): (r"OMMA\.SF\.16864\S*UE4M3\.4X",),
    }
    e4m3 = {
        ("cuda", 100): (r"UTCOMMA", r"UTCQMMA"),
        ("cuda", 120): (*blackwell["cuda", 120], r"QMMA\.16832\.F16\.E4M3"),
    }
    # Instructions per block of keys: of the prototypes for D = 128, else as first measured; the promise allows 8 % more.
    loops = {
        ("fp4_fp8", 128): {100: 356, 120: 496},
        ("fp4_fp8", 96): {100: 398, 120: 447},
        ("fp4_fp8", 64): {100: 339, 120: 387},
        ("fp4", 128): {100: 485, 120: 843},
    }
    cases = []
    for (spec, d), measured in loops.items():
        for cc, loop in measured.items():
            config, target = configure((cc // 10, cc % 10), spec), ("cuda", cc)
            require = (blackwell if spec == "fp4" else e4m3)[target]
            promises = {
                "require": {target: require},
                "forbid": {None: (r"\bHMMA",)},
                "budget": {target: int(1.08 * loop)},
            }
            cases.append(_case(f"{spec}_d{d}_{cc}", spec, d, config, (cc,), **promises))
    causal, below = configure((12, 0), "fp4_fp8"), configure((10, 0), "fp4_fp8")
    cases.append(
        _case("fp4_fp8_causal", "fp4_fp8", 128, causal, (120,), causal=True, smooth_q=False, budget={None: 535})
    )
    cases.append(_case("fp4_fp8_refused", "fp4_fp8", 128, below, (80,), raises="fp8e4nv"))
    return cases


def _case(name: str, spec: str, d: int, config: Config, targets, causal=False, smooth_q=True, **promises) -> AotCase:
    fp4 = SPECS[spec][1] == "e2m1"
    d1, dp, bm = 64 if d == 96 else d, 64 * -(-d // 64), config.bm
    absent = {n: None for n, there in (("DELTA", smooth_q), ("VB", fp4)) if not there}
    pointers = {
        "Q": "*u8", "QB": "*fp8e4nv", "K": "*u8", "KB": "*fp8e4nv", "V": "*u8" if fp4 else "*fp8e4nv", "VB": "*fp8e4nv",
        **dict.fromkeys(("QS", "KS", "VS", "DELTA", "SHIFT"), "*fp32"), "OUT": "*bf16", "LSE": "*fp32",
    }  # fmt: skip
    pointers = {n: t for n, t in pointers.items() if n not in absent}
    values = bm * BLOCK_K * d
    return AotCase(
        f"attention/{name}",
        _attend,
        signature={**pointers, **dict.fromkeys(("sob", "soh", "som", "H", "GROUPS", "LQ", "LK", "LP"), "i32")},
        constexprs={
            **absent, "D1": d1, "D2": d - d1, "DP": dp, "BM": bm, "BN": BLOCK_K, "BLOCK_Q": BLOCK_Q,
            "FP4": fp4, "ACC16": config.acc16, "CAUSAL": causal, "ASM": config.asm, "TMEM": config.tmem,
        },
        divisible=(*pointers, "sob", "soh", "som", "LP"),
        options={"num_warps": config.warps, "num_stages": config.stages},
        targets=tuple(("cuda", t) for t in targets),
        macs={"fp4": bm * BLOCK_K * dp + values} if fp4 else {"fp4": bm * BLOCK_K * dp, "fp8": values},
        **promises,
    )  # fmt: skip
