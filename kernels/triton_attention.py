r"""Attention with int8 q kᵀ and float16 or e4m3 P v, on tensor cores: what `attention_reference.attend` means, in Triton.

Layouts of codes and scales: `attention_reference.Codes`. A program serves 128 queries of one head and walks the keys 64 at a time:

    X = (bits - magic) · step,   P = exp2(X - m + off) = exp2(bits · step - (magic · step + m - off)),   out = out · 2^(m_old - m) + P v

Integer logits are summed into an accumulator that starts at 0x4B400000. Read as a float32 that is magic = 1.5 · 2^23 plus the sum, exact
while it stays below 2^22, so 127² · D for D ≤ 256. No conversion is needed, step = (query scale · key scale) and the running maximum are
one fused multiply-add per logit, and `off` puts P into [0, 448] for e4m3 at no cost. magic · step rounds by at most 0.75 steps, the same
for all keys of a block: little beside the rounding of codes, but an e4m3 P near a tie may go the other way than the reference's.
Keys that all queries of a program see without a mask take this short way; the end of the keys, the diagonal, masks and the bias of
smoothed queries take the long one, which subtracts magic first. Head dimension 96 is 64 + 32.

P v in e4m3 is added to the float32 sum block by block, since tensor cores carry fewer bits inside (SageAttention 2,
https://arxiv.org/abs/2411.10958). `acc16` lets them carry float16, twice as fast on GeForce: 64 keys · 448 · 2.25 (values of V) < 65504
(https://arxiv.org/abs/2505.21136), and float16 values of V are at most 4 in magnitude with P ≤ 1.
"""

__all__ = [
    "TO_E4M3", "Config", "add_values", "aot_cases", "attend", "attention", "configure", "limits", "mask_of", "refuse", "to_e4m3",
]  # fmt: skip

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.errors import NoKernel
from qgen.kernels import attention_ops
from qgen.kernels.aot_case import AotCase, Waiver
from qgen.kernels.attention_ops import AMD, HEAD_DIMS, SPECS, AttentionNeeds
from qgen.kernels.attention_reference import BLOCK_K, BLOCK_Q, E4M3_MAX, Codes
from qgen.kernels.registry import Kernel, register
from qgen.kernels.triton_qkv import prepare

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
LOG2_448 = tl.constexpr(8.807354922057604)
LOG2E_ = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BOOL, ADDED = tl.constexpr(1), tl.constexpr(2)  # kinds of masks; 0 = none
# Four float32 to e4m3 with one rounding. What Triton 3.8 makes of a plain cast on 8.9 rounds twice, by way of float16.
TO_E4M3 = tl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }"
)


@triton.jit
def to_e4m3(p, ASM: tl.constexpr):
    """float32 to e4m3, ties to even, beyond 448 saturated. ASM: by one instruction, from compute capability 8.9."""
    if ASM:
        return tl.inline_asm_elementwise(TO_E4M3, "=r,f,f,f,f", [p], dtype=tl.float8e4nv, is_pure=True, pack=4)
    return p.to(tl.float8e4nv)


@triton.jit
def limits(first, LQ, LK, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """For the BM queries from `first`: (keys that all may see, in whole blocks; keys that any may see)."""
    if CAUSAL:
        every, any_ = tl.minimum(first + 1 + LK - LQ, LK), tl.minimum(first + BM + LK - LQ, LK)
    else:
        every, any_ = LK, LK
    return tl.maximum(every, 0) // BN * BN, tl.maximum(any_, 0)


@triton.jit
def masked(x, MP, offsets, inside, keys, seen, EDGE: tl.constexpr, MASKED: tl.constexpr, ROW: tl.constexpr):
    """Logits x in units of log 2 with the mask at MP applied, and at an EDGE -inf where a query may not see a key."""
    if MASKED:
        m = tl.load(MP + offsets)[None, :] if ROW else tl.load(MP + offsets, mask=inside[:, None], other=0)
        x = tl.where(m != 0, x, float("-inf")) if MASKED == BOOL else x + m.to(tl.float32) * LOG2E_
    if EDGE:
        x = tl.where(keys[None, :] < seen[:, None], x, float("-inf"))
    return x


@triton.jit
def add_values(acc, fade, p, v, ACC16: tl.constexpr):
    """acc · fade + p v; the product of one block of keys has a sum of its own where its bits are few."""
    if ACC16:
        part = tl.dot(p, v, out_dtype=tl.float16).to(tl.float32)
        return tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), part)
    if p.dtype == tl.float8e4nv:
        return tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), tl.dot(p, v))
    return tl.dot(p, v, acc * fade[:, None])


@triton.jit
def _tile(
    acc, rest, total, top, q, q_rest, KP, VP, KS, qs, DELTA_ROW, MP, offsets, inside, n0, seen, LP,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FP8: tl.constexpr, ACC16: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, ROW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block of keys. KP and VP point at its first elements; rest and q_rest are the last D2 of the head dimension, if any."""
    rn, r1, r2 = tl.arange(0, BN), tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 else 16)
    D: tl.constexpr = D1 + D2
    OFF: tl.constexpr = LOG2_448 if FP8 else 0.0
    s = tl.dot(q, tl.load(KP + rn[None, :] * D + r1[:, None]), tl.full((BM, BN), MAGIC_BITS, tl.int32))
    if D2:
        s = tl.dot(q_rest, tl.load(KP + rn[None, :] * D + r2[:, None]), s)
    bits, step = s.to(tl.float32, bitcast=True), qs * tl.load(KS)
    if EDGE or MASKED or DELTA_ROW is not None:
        x = (bits - MAGIC) * step[:, None]
        if DELTA_ROW is not None:
            x += tl.load(DELTA_ROW + n0 + rn)[None, :]
        x = masked(x, MP, offsets, inside, n0 + rn, seen, EDGE, MASKED, ROW)
        new = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - (new - OFF)[:, None])
    else:
        new = tl.maximum(top, (tl.max(bits, 1) - MAGIC) * step)
        shift = -(MAGIC * step + (new - OFF))
        p = tl.exp2(tl.fma(bits, tl.broadcast_to(step[:, None], (BM, BN)), tl.broadcast_to(shift[:, None], (BM, BN))))
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    w = to_e4m3(p, ASM) if FP8 else p.to(tl.float16)
    if FP8:
        acc = add_values(acc, fade, w, tl.load(VP + r1[None, :] * LP + rn[:, None]), ACC16)
        if D2:
            rest = add_values(rest, fade, w, tl.load(VP + r2[None, :] * LP + rn[:, None]), ACC16)
    else:
        acc = add_values(acc, fade, w, tl.load(VP + rn[:, None] * D + r1[None, :]), ACC16)
        if D2:
            rest = add_values(rest, fade, w, tl.load(VP + rn[:, None] * D + r2[None, :]), ACC16)
    return acc, rest, total, new


@triton.jit
def _attend(
    Q, K, V, QS, KS, VS, DELTA, SHIFT, MASK, OUT, LSE, smb, smh, smm, sob, soh, som, H, GROUPS, LQ, LK, LP,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
    FP8: tl.constexpr, ACC16: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (queries / BM, H, B). MASKED: 0, BOOL or ADDED. D1: a power of two; D2: another, or 0. DELTA, SHIFT, MASK: or None."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, row_k = batch * H + head, batch * (H // GROUPS) + head // GROUPS
    D: tl.constexpr = D1 + D2
    rm, r1, r2 = part * BM + tl.arange(0, BM), tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 else 16)
    inside = rm < LQ
    qp = Q + (row * LQ + rm[:, None]) * D
    q = tl.load(qp + r1[None, :], mask=inside[:, None], other=0)
    q_rest = tl.load(qp + r2[None, :], mask=inside[:, None], other=0) if D2 else q
    qs = tl.load(QS + row * LQ + rm, mask=inside, other=0.0)
    kp, vp, ks = K + row_k * LP * D, V + row_k * LP * D, KS + row_k * (LP // BN)
    delta = None if DELTA is None else DELTA + (row * tl.cdiv(LQ, BLOCK_Q) + part * BM // BLOCK_Q) * LP
    # One 64-bit address of the tile and 32-bit offsets in it: 64-bit addresses of every element would take all registers.
    mp = None if MASK is None else MASK + batch * smb + head.to(tl.int64) * smh + (part * BM).to(tl.int64) * smm
    rn = tl.arange(0, BN)
    offsets = rn if ROW else tl.arange(0, BM)[:, None] * smm + rn[None, :]
    seen = tl.minimum(rm + 1 + LK - LQ, LK) if CAUSAL else tl.zeros((BM,), tl.int32) + LK
    whole, end = limits(part * BM, LQ, LK, BM, BN, CAUSAL)
    top, total = tl.full((BM,), -1.0e30, tl.float32), tl.zeros((BM,), tl.float32)
    acc, rest = tl.zeros((BM, D1), tl.float32), tl.zeros((BM, D2 if D2 else 1), tl.float32)
    STEP: tl.constexpr = BN if FP8 else BN * D  # of v: transposed or not
    for n0 in range(0, whole, BN):
        acc, rest, total, top = _tile(
            acc, rest, total, top, q, q_rest, kp, vp, ks, qs, delta, mp, offsets, inside, n0, seen, LP,
            D1, D2, BM, BN, FP8, ACC16, False, MASKED, ROW, ASM,
        )  # fmt: skip
        kp += BN * D
        vp += STEP
        ks += 1
        if MASKED:
            mp += BN
    for n0 in tl.range(whole, end, BN, num_stages=1):
        acc, rest, total, top = _tile(
            acc, rest, total, top, q, q_rest, kp, vp, ks, qs, delta, mp, offsets, inside, n0, seen, LP,
            D1, D2, BM, BN, FP8, ACC16, True, MASKED, ROW, ASM,
        )  # fmt: skip
        kp += BN * D
        vp += STEP
        ks += 1
        if MASKED:
            mp += BN
    safe = tl.where(total > 0, total, 1.0)
    lse = (top + tl.log2(safe) - (LOG2_448 if FP8 else 0.0)) * LN2
    if SHIFT is not None:
        lse += tl.load(SHIFT + row * LQ + rm, mask=inside, other=0.0)
    tl.store(LSE + row * LQ + rm, tl.where(total > 0, lse, float("-inf")), mask=inside)
    op = OUT + batch * sob + head.to(tl.int64) * soh + rm.to(tl.int64)[:, None] * som
    acc = acc * (1.0 / safe)[:, None] * tl.load(VS + row_k * D + r1)[None, :]
    tl.store(op + r1[None, :], acc.to(OUT.dtype.element_ty), mask=inside[:, None])
    if D2:
        rest = rest * (1.0 / safe)[:, None] * tl.load(VS + row_k * D + r2)[None, :]
        tl.store(op + r2[None, :], rest.to(OUT.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True)
class Config:
    """How to launch. bm: queries per program. acc16: sums of P v in float16 per block of keys. asm: one-instruction casts.

    tmem: the device keeps sums of block-scaled products in tensor memory.
    """

    bm: int = 128
    warps: int = 8
    stages: int = 3
    acc16: bool = False
    asm: bool = False
    tmem: bool = False

    @property
    def v_max(self) -> float:
        """Largest e4m3 value of V that the sum of 64 keys can hold."""
        return 2.25 if self.acc16 else E4M3_MAX


def configure(capability: tuple[int, int] | str | None, spec: str) -> Config:
    """The launch for a compute capability (None: plain operations) and a spec; one tile serves all head dimensions without a spill."""
    if isinstance(capability, str):  # AMD: 64 KiB of shared memory, waves of 64 lanes on Instinct
        return Config(warps=4 if capability.startswith("gfx9") else 8, stages=1)
    geforce = capability in ((8, 6), (8, 9), (12, 0), (12, 1))  # float32 sums at half rate
    return Config(acc16=geforce, asm=capability == (8, 9) and SPECS[spec][1] == "e4m3")


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
    refuse(NEEDS.get(spec, NEEDS["int8"]), wanted)
    config = configure(wanted.capability, spec)
    with torch.cuda.device_of(q):
        codes = prepare(q, k, v, scale, spec, smooth_k, smooth_q, config.v_max, hadamard=hadamard)
        return attend(codes, q.dtype, mask, causal, config)


def refuse(needs: AttentionNeeds, wanted: attention_ops.Ask) -> None:
    """Raises NoKernel with every reason why `wanted` is not served. In Triton's interpreter any device is right."""
    if not isinstance(_attend, triton.JITFunction):
        needs = dataclasses.replace(needs, devices=())
    if why := needs.refusals(wanted):
        raise NoKernel(f"{wanted}: {'; '.join(why)}; use torch's scaled_dot_product_attention for this call")


def attend(
    codes: Codes, dtype: torch.dtype, mask: Tensor | None = None, causal: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over int8 codes: out (B, H, Lq, D) in `dtype`, lse (B, H, Lq) float32. Codes of V must respect `config.v_max`."""
    config = config or Config()
    b, h, lq, d = codes.q.shape
    hk, lp = codes.k.shape[1:3]
    d1 = 64 if d == 96 else d
    out = torch.empty((b, lq, h, d), dtype=dtype, device=codes.q.device).transpose(1, 2)
    lse = torch.empty((b, h, lq), dtype=torch.float32, device=codes.q.device)
    mask, kind, row, strides = mask_of(mask, (b, h, lq, codes.lk))
    # Tiles of a float32 mask in flight take twice the shared memory.
    stages = 2 if kind and mask.element_size() > 2 else config.stages
    _attend[(triton.cdiv(lq, config.bm), h, b)](
        codes.q, codes.k, codes.v, codes.q_scale, codes.k_scale, codes.v_scale, codes.delta, codes.shift, mask,
        out, lse, *strides, *out.stride()[:3], h, h // hk, lq, codes.lk, lp,
        D1=d1, D2=d - d1, BM=config.bm, BN=BLOCK_K, BLOCK_Q=BLOCK_Q,
        FP8=SPECS[codes.spec][1] == "e4m3", ACC16=config.acc16, CAUSAL=causal, MASKED=kind, ROW=row, ASM=config.asm,
        num_warps=config.warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def mask_of(mask: Tensor | None, full: tuple[int, int, int, int]) -> tuple[Tensor | None, int, bool, tuple[int, ...]]:
    """(tensor, 0 or BOOL or ADDED, whether all queries share one row, strides of B, H and Lq; 0 where broadcast) for a kernel.

    Rows of the result hold a whole number of blocks of keys, one after the other. A copy is made only where they do not already.
    """
    if mask is None:
        return None, 0, False, (0, 0, 0)
    kind = BOOL if mask.dtype == torch.bool else ADDED
    missing = -full[-1] % BLOCK_K
    mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, full[-1])
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing))
    elif mask.stride(-1) != 1:
        mask = mask.contiguous()
    mask = mask.view(torch.uint8) if kind is BOOL else mask.float() if mask.dtype == torch.float64 else mask
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return mask, kind.value, strides[2] == 0, strides


_SLOW_INT8 = ((10, 3), "int8 products leave the fast path of the tensor cores on 10.3")
NEEDS = {
    "int8": AttentionNeeds(
        devices=("cuda", "hip"),
        capability=((8, 0), (12, 1)),
        archs=AMD,
        weights=("int8",),
        acts=("fp16",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=HEAD_DIMS,
        absent=(_SLOW_INT8,),
    ),
    "int8_fp8": AttentionNeeds(
        devices=("cuda",),
        capability=((8, 9), (12, 1)),
        weights=("int8",),
        acts=("e4m3",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=HEAD_DIMS,
        absent=(_SLOW_INT8,),
    ),
}
for _spec, _needs in NEEDS.items():
    register(Kernel("attention", f"triton_{_spec}", _needs, attention, priority=10))


def aot_cases() -> list[AotCase]:
    """What is compiled without a GPU: both products, each way to sum, three head dimensions, the diagonal, masks, smoothed queries."""
    plain, asm, acc16 = Config(), Config(acc16=True, asm=True), Config(acc16=True)
    int8, fp16 = r"IMMA\.16832\.S8\.S8", r"HMMA\.16816\.F16"
    f32 = {("cuda", 80): (int8, r"HMMA\.16816\.F32"), ("cuda", 90): (r"IGMMA\.64x64x32\.S8", r"HGMMA\.\S*\.F32")}
    f8 = {("cuda", 90): (r"IGMMA\.64x64x32\.S8", r"QGMMA\.\S*\.E4M3"), ("cuda", 100): (r"UTCIMMA", r"UTCQMMA")}
    f16 = {None: (int8, r"QMMA\.16832\.F16\.E4M3")}

    def budget(
        **loops,
    ):  # instructions per block of keys: of the prototypes for D = 128 without masks, else as first measured; and 8 %
        return {("cuda", int(target[3:])): int(1.08 * loop) for target, loop in loops.items()}

    cases = [
        _case("int8_d128", "int8", 128, plain, (80, 90), require=f32, budget=budget(sm_80=460, sm_90=392)),
        _case(
            "int8_d128_acc16", "int8", 128, acc16, (86,), require={None: (int8, fp16)}, budget=budget(sm_86=460),
            waivers={("cuda", 86): Waiver(0, "sums in float16: half the clocks of the tensor cores, 64 conversions more", loop=566)},
        ),
        _case("int8_d64", "int8", 64, plain, (80,), require=f32, budget=budget(sm_80=345)),
        _case("int8_d96", "int8", 96, plain, (80,), require=f32, budget=budget(sm_80=424)),
        _case("int8_fp8_d128", "int8_fp8", 128, plain, (90, 100), require=f8, budget=budget(sm_90=403, sm_100=348)),
        _case("int8_fp8_d128_acc16_asm", "int8_fp8", 128, asm, (89,), require=f16, budget=budget(sm_89=502)),
        _case("int8_fp8_d128_acc16", "int8_fp8", 128, acc16, (120,), require=f16, budget=budget(sm_120=479)),
        _case("int8_fp8_d64_acc16", "int8_fp8", 64, acc16, (120,), require=f16, budget=budget(sm_120=362)),
        _case("int8_fp8_d96_acc16", "int8_fp8", 96, acc16, (120,), require=f16, budget=budget(sm_120=427)),
        _case("int8_fp8_causal", "int8_fp8", 128, asm, (89,), causal=True, require=f16, budget=budget(sm_89=502)),
        _case("int8_bool", "int8", 128, plain, (80,), masked=BOOL.value, budget=budget(sm_80=816)),
        _case("int8_fp8_bool_row", "int8_fp8", 128, asm, (89,), masked=BOOL.value, row=True, budget=budget(sm_89=636)),
        _case("int8_fp8_added", "int8_fp8", 128, plain, (90,), masked=ADDED.value, budget=budget(sm_90=576)),
        _case("int8_fp8_smooth_q", "int8_fp8", 128, acc16, (120,), smooth_q=True, budget=budget(sm_120=560)),
        _case(
            "int8_fp8_added32", "int8_fp8", 128, Config(acc16=True, stages=2), (120,), masked=ADDED.value, mask_type="*fp32",
            budget=budget(sm_120=638), waivers={("cuda", 120): Waiver(40, "the tile of the mask does not fit besides", 24)},
        ),
        _case(
            "int8_fp8_bool_smooth_q", "int8_fp8", 128, acc16, (120,), masked=BOOL.value, smooth_q=True,
            budget=budget(sm_120=709), waivers={("cuda", 120): Waiver(88, "mask and bias do not fit besides", 40)},
        ),
        _case("int8_fp8_refused", "int8_fp8", 128, plain, (80,), raises="fp8e4nv"),
    ]  # fmt: skip
    return cases + _amd_cases()


def _amd_cases() -> list[AotCase]:
    """Plain operations alone. A wave of 32 lanes has 256 vector registers for its 16 queries, and with fewer queries to a program its
    waves would share rows and repeat q kᵀ: on RDNA some words are spilled."""
    scalars = "27 scalar registers lie in lanes of vector registers, not in memory"
    full = "sums, q and the tiles in flight fill the 256 vector registers of a wave"
    waivers = {
        ("bool", "gfx942"): Waiver(108, scalars),
        ("d96", "gfx1100"): Waiver(440, full, 280),
        ("d128", "gfx1100"): Waiver(116, full, 120),
        ("causal", "gfx1100"): Waiver(116, full, 120),
        ("bool", "gfx1100"): Waiver(316, full, 236),
        ("d96", "gfx1201"): Waiver(20, full, 24),
    }
    cases = []
    for arch in AMD:
        kinds = (
            ("v_mfma_i32_\\w+_i8", "v_mfma_f32_\\w+_f16")
            if arch == "gfx942"
            else ("v_wmma_i32_\\w+_iu8", "v_wmma_f32_\\w+_f16")
        )
        config = configure(arch, "int8")
        for name, d, masked in (
            ("d64", 64, 0),
            ("d96", 96, 0),
            ("d128", 128, 0),
            ("causal", 128, 0),
            ("bool", 128, BOOL.value),
        ):
            found = waivers.get((name, arch))
            cases.append(
                _case(
                    f"int8_{name}_{arch}", "int8", d, config, (arch,), causal=name == "causal", masked=masked,
                    require={None: kinds}, waivers={("hip", arch): found} if found else {},
                )
            )  # fmt: skip
    return cases


def _case(
    name: str,
    spec: str,
    d: int,
    config: Config,
    targets,
    causal=False,
    masked=0,
    row=False,
    smooth_q=False,
    mask_type="*bf16",
    **promises,
) -> AotCase:
    fp8 = SPECS[spec][1] == "e4m3"
    d1 = 64 if d == 96 else d
    work = config.bm * BLOCK_K * d
    absent = {n: None for n, there in (("DELTA", smooth_q), ("MASK", bool(masked))) if not there}
    pointers = {
        **dict.fromkeys(("Q", "K"), "*i8"), "V": "*fp8e4nv" if fp8 else "*fp16", **dict.fromkeys(("QS", "KS", "VS"), "*fp32"),
        "DELTA": "*fp32", "SHIFT": "*fp32", "MASK": "*u8" if masked == BOOL.value else mask_type, "OUT": "*bf16", "LSE": "*fp32",
    }  # fmt: skip
    pointers = {n: t for n, t in pointers.items() if n not in absent}
    integers = ("smb", "smh", "smm", "sob", "soh", "som", "H", "GROUPS", "LQ", "LK", "LP")
    return AotCase(
        f"attention/{name}",
        _attend,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={
            **absent, "D1": d1, "D2": d - d1, "BM": config.bm, "BN": BLOCK_K, "BLOCK_Q": BLOCK_Q, "FP8": fp8,
            "ACC16": config.acc16, "CAUSAL": causal, "MASKED": masked, "ROW": row, "ASM": config.asm,
        },
        divisible=(*pointers, "smb", "smh", "smm", "sob", "soh", "som", "LP"),
        options={"num_warps": config.warps, "num_stages": config.stages},
        targets=tuple(("hip" if isinstance(t, str) else "cuda", t) for t in targets),
        macs={"s8": work, "fp8" if fp8 else "f16": work},
        **promises,
    )  # fmt: skip
