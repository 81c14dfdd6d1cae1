r"""Low-bit attention in pure torch: the meaning of `qgen::attention`, number for number, and the oracle of its kernels.

Codes (`prepare`), with k' = k - k̄ if smooth_k, q' = q - q̄ if smooth_q, both times a block Hadamard matrix if hadamard (then q̄·k'
still is the product before it), and 0 / 0 = 0 throughout:
    q'  int8: one scale per token, amax / 127.  e2m1: one per 128 tokens, amax / 2688, times an e4m3 scale per 16 of D.
    k'  one scale per 64 keys, otherwise the same.  Scales of e2m1 are at least 2^-40: q̄·k' is stored over the product of both.
    v   one scale per channel.  fp16: the power of two at or below amax, so that nothing is lost and nothing overflows.
        e4m3: amax / v_max.  e2m1: amax / 2688, times an e4m3 scale per 16 keys.
Logits in units of log 2, so that exp is exp2:  X = (q'·k') + q̄·k' (+ mask), the first product in low bits, the second in float32;
for e2m1 the second is where the sum of the first starts, before it is scaled.
Softmax in blocks of 64 keys with a running maximum m (`attend`), as every kernel must walk, since P is rounded relative to m:
    P = round(2^(X - m + off))    off = 0 for fp16, log2 448 for e4m3, log2 2688 for e2m1 (then an e4m3 scale per 16 keys)
    out = Σ P v / Σ 2^(X - m + off),  lse = ln 2 · (m + log2 Σ 2^(X - m)) + scale · q·k̄

Smoothing, the static scale of P and integer logits: SageAttention 1 to 3, https://arxiv.org/abs/2410.02367,
https://arxiv.org/abs/2411.10958, https://arxiv.org/abs/2505.11594. Online softmax: https://arxiv.org/abs/2205.14135.
"""

__all__ = ["BLOCK_K", "BLOCK_Q", "Codes", "attend", "attention", "attention_float", "attention_grad", "prepare"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.formats import packing
from qgen.formats.fp4 import E2M1
from qgen.kernels.attention_ops import SPECS, AttentionNeeds
from qgen.kernels.reference import hadamard_blocks
from qgen.kernels.registry import Kernel, register

BLOCK_K = 64  # keys that share a scale, and a step of the softmax
BLOCK_Q = 128  # queries that share a mean
LOG2E = math.log2(math.e)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
OFFSET = {"fp16": 0.0, "e4m3": math.log2(E4M3_MAX), "e2m1": math.log2(E4M3_MAX * E2M1_MAX)}
SMALLEST = 2.0**-100  # a largest magnitude below this counts as zero
SMALLEST_E2M1 = E4M3_MAX * E2M1_MAX * 2.0**-40  # … and one below this as this, so that no scale of e2m1 is zero


@dataclass(frozen=True)
class Codes:
    """q, k, v in low bits. Lp = Lk rounded up to 64, Dp = D rounded up to 64 for e2m1; what was added is zero. All contiguous.

    q: int8 (B, H, Lq, D), or e2m1 pairs uint8 (B, H, Lq, Dp / 2) with q_blocks e4m3 (B, H, Lq, Dp / 16).
    k: the same with Hkv and Lp. q_scale: float32 (B, H, Lq), times scale · log2 e. k_scale: float32 (B, Hkv, Lp / 64).
    v: float16 (B, Hkv, Lp, D); or e4m3 (B, Hkv, D, Lp); or e2m1 pairs (B, Hkv, D, Lp / 2) with v_blocks e4m3 (B, Hkv, D, Lp / 16).
    v_scale: float32 (B, Hkv, D). delta: float32 (B, H, ceil(Lq / 128), Lp), scale · log2 e · q̄·k', for e2m1 divided by
    the scales of q and k, or None without smooth_q.
    shift: float32 (B, H, Lq), scale · q·k̄, or None without smooth_k. lk: Lk.
    """

    q: Tensor
    q_blocks: Tensor | None
    q_scale: Tensor
    k: Tensor
    k_blocks: Tensor | None
    k_scale: Tensor
    v: Tensor
    v_blocks: Tensor | None
    v_scale: Tensor
    delta: Tensor | None
    shift: Tensor | None
    lk: int
    spec: str


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
    """The op: (out, lse). See `attention_ops` for the arguments."""
    codes = prepare(q, k, v, scale, spec, smooth_k, smooth_q, hadamard=hadamard)
    out, lse = attend(codes, mask, causal)
    return as_op_output(out, q), lse


def as_op_output(out: Tensor, q: Tensor) -> Tensor:
    """out (B, H, Lq, D) in q's dtype and the op's memory layout, (B, Lq, H, D)."""
    return out.transpose(1, 2).to(q.dtype, copy=True, memory_format=torch.contiguous_format).transpose(1, 2)


# -- codes ----------------------------------------------------------------------------------------------------------------
def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    spec: str,
    smooth_k: bool = True,
    smooth_q: bool = False,
    v_max: float = E4M3_MAX,
    k_mean: Tensor | None = None,
    hadamard: int = 0,
) -> Codes:
    """Quantizes q (B, H, Lq, D), k and v (B, Hkv, Lk, D); they are not written to.

    v_max: largest e4m3 code of V; kernels that add P v in float16 want 2.25, since 448 · 2.25 · 64 < 65504.
    k_mean: float32 (B, Hkv, D) to subtract in place of the mean over Lk; any vector gives the same attention.
    """
    qk, pv = SPECS[spec]
    lk, groups = k.shape[2], q.shape[1] // k.shape[1]
    unit = float(torch.tensor(scale * LOG2E, dtype=torch.float32))
    qf, kf, vf = (t.float().contiguous() for t in (q, k, v))
    shift, delta = None, None
    if smooth_k:
        k_mean = kf.mean(2) if k_mean is None else k_mean
        kf = kf - k_mean[:, :, None]
        shift = scale * (qf * k_mean.repeat_interleave(groups, 1)[:, :, None]).sum(-1)
    if smooth_q:
        mean = block_means(q)
        delta = torch.einsum("bhmd,bhnd->bhmn", mean.float(), kf.repeat_interleave(groups, 1)) * unit
        delta = _pad(delta, -1, BLOCK_K)
        qf = qf - mean.float().repeat_interleave(BLOCK_Q, 2)[:, :, : q.shape[2]]
    if hadamard:
        qf, kf = hadamard_blocks(qf, hadamard), hadamard_blocks(kf, hadamard)
    kf = _pad(kf, 2, BLOCK_K)
    k_amax = kf.abs().unflatten(2, (-1, BLOCK_K)).amax((-1, -2))
    q_amax = qf.abs().amax(-1)
    if qk == "e2m1":
        tiles = _pad(q_amax, -1, BLOCK_Q).unflatten(-1, (-1, BLOCK_Q)).amax(-1).clamp(min=SMALLEST_E2M1)
        q_amax = tiles.repeat_interleave(BLOCK_Q, -1)[..., : q.shape[2]]
        k_amax = k_amax.clamp(min=SMALLEST_E2M1)
    q_codes, q_blocks, q_scale = _encode(qf, q_amax, qk)
    k_codes, k_blocks, k_scale = _encode(kf, k_amax, qk)
    v_codes, v_blocks, v_scale = _encode_v(_pad(vf, 2, BLOCK_K), pv, v_max)
    q_scale = q_scale * unit
    if smooth_q and qk == "e2m1":
        steps = q_scale[:, :, ::BLOCK_Q, None] * k_scale.repeat_interleave(groups, 1)[:, :, None]
        delta = delta / steps.repeat_interleave(BLOCK_K, -1)
    return Codes(
        q_codes, q_blocks, q_scale, k_codes, k_blocks, k_scale, v_codes, v_blocks, v_scale, delta, shift, lk, spec
    )


def block_means(q: Tensor) -> Tensor:
    """Means of every 128 tokens of q (B, H, L, D), the last over those that exist, rounded to q's dtype: (B, H, ceil(L / 128), D)."""
    parts = q.float().split(BLOCK_Q, 2)
    return torch.stack([part.sum(2) * (1.0 / part.shape[2]) for part in parts], 2).to(q.dtype)


def _encode(x: Tensor, amax: Tensor, numbers: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """x (B, H, L, D) to (codes, block scales, scales), where amax (B, H, L / n) holds the largest magnitude of every n tokens."""
    top = 127.0 if numbers == "int8" else E4M3_MAX * E2M1_MAX
    unit = x * _inverse(amax, top).repeat_interleave(x.shape[2] // amax.shape[2], 2)[..., None]
    if numbers == "int8":
        return torch.round(unit).to(torch.int8), None, amax / torch.full_like(amax, top)
    codes, blocks = _encode_e2m1(_pad(unit, 3, 64))
    return codes, blocks, amax / torch.full_like(amax, top)


def _encode_v(v: Tensor, numbers: str, v_max: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """v (B, H, Lp, D) to (codes, block scales, scales); codes of e4m3 and e2m1 are transposed."""
    amax = v.abs().amax(2)
    if numbers == "fp16":
        scale = power_of_two(amax)
        return (v * (1.0 / scale)[:, :, None]).half(), None, scale
    top = v_max if numbers == "e4m3" else E4M3_MAX * E2M1_MAX
    scale = amax / torch.full_like(amax, top)
    unit = (v * _inverse(amax, top)[:, :, None]).transpose(2, 3).contiguous()
    if numbers == "e4m3":
        return unit.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), None, scale
    codes, blocks = _encode_e2m1(unit)
    return codes, blocks, scale


def power_of_two(amax: Tensor) -> Tensor:
    """The largest power of two at or below amax ≥ 0, from 2^-126 to 2^126: the exponent bits of the float32."""
    return (amax.contiguous().view(torch.int32) & 0x7F800000).clamp(1 << 23, 253 << 23).view(torch.float32)


def _inverse(amax: Tensor, top: float) -> Tensor:
    """top / amax, rounded once (a number divided by a tensor is rounded twice), and 0 where amax counts as zero."""
    return torch.where(amax >= SMALLEST, torch.full_like(amax, top) / amax.clamp(min=SMALLEST), 0.0)


def _encode_e2m1(unit: Tensor) -> tuple[Tensor, Tensor]:
    """unit (…, n), at most 2688 in magnitude, to pairs of e2m1 codes (…, n / 2) and e4m3 scales (…, n / 16)."""
    x = unit.unflatten(-1, (-1, 16))
    blocks = (x.abs().amax(-1) * (1.0 / 6.0)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = blocks.float()
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    return packing.pack(E2M1.encode(x * inverse[..., None]).flatten(-2), 4), blocks


def _decode_e2m1(codes: Tensor, blocks: Tensor) -> Tensor:
    """Pairs of codes (…, n / 2) and scales (…, n / 16) to float32 (…, n)."""
    values = E2M1.decode(packing.unpack(codes, 4)).unflatten(-1, (-1, 16))
    return (values * blocks.float()[..., None]).flatten(-2)


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """x with zeros behind along `dim`, up to a multiple."""
    missing = -x.shape[dim] % multiple
    return torch.cat([x, x.new_zeros([*x.shape[:dim], missing, *x.shape[dim:][1:]])], dim) if missing else x


# -- attention on codes ---------------------------------------------------------------------------------------------------
def attend(codes: Codes, mask: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention over codes: out (B, H, Lq, D) float32, lse (B, H, Lq) float32."""
    qk, pv = SPECS[codes.spec]
    groups, off = codes.q.shape[1] // codes.k.shape[1], OFFSET[pv]
    q = _values(codes.q, codes.q_blocks, qk)
    k = _values(codes.k, codes.k_blocks, qk).repeat_interleave(groups, 1)
    v = _values(codes.v, codes.v_blocks, pv)
    v = (v if pv == "fp16" else v.transpose(2, 3)).repeat_interleave(groups, 1)
    seen = _seen(q.shape[2], codes.lk, causal, q.device)
    top = q.new_full(q.shape[:3], -1e30)
    total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:3], v.shape[-1])
    for n in range(codes.k_scale.shape[-1]):
        keys = slice(n * BLOCK_K, (n + 1) * BLOCK_K)
        step = codes.q_scale * codes.k_scale[:, :, n : n + 1].repeat_interleave(groups, 1)
        x = q @ k[:, :, keys].transpose(2, 3)
        if codes.delta is None:
            x = x * step[..., None]
        else:
            delta = codes.delta[:, :, :, keys].repeat_interleave(BLOCK_Q, 2)[:, :, : x.shape[2]]
            x = (x + delta) * step[..., None] if qk == "e2m1" else x * step[..., None] + delta
        x = _masked(x, mask, seen, keys, codes.lk)
        new = torch.maximum(top, x.amax(-1))
        p = torch.exp2(x - (new - off)[..., None])
        fade = torch.exp2(top - new)
        total = total * fade + p.sum(-1)
        out = out * fade[..., None] + _rounded(p, pv) @ v[:, :, keys]
        top = new
    safe = torch.where(total > 0, total, 1.0)
    out = out / safe[..., None] * codes.v_scale.repeat_interleave(groups, 1)[:, :, None]
    lse = (top + torch.log2(safe) - off) / LOG2E
    lse = lse if codes.shift is None else lse + codes.shift
    return out, torch.where(total > 0, lse, -math.inf)


def _values(codes: Tensor, blocks: Tensor | None, numbers: str) -> Tensor:
    return _decode_e2m1(codes, blocks) if numbers == "e2m1" else codes.float()


def _rounded(p: Tensor, numbers: str) -> Tensor:
    """The probabilities of one block of keys as the second product sees them, float32."""
    if numbers == "fp16":
        return p.half().float()
    if numbers == "e4m3":
        return p.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return _decode_e2m1(*_encode_e2m1(p))


def _seen(lq: int, lk: int, causal: bool, device: torch.device) -> Tensor:
    """How many keys each query may see: (Lq, 1)."""
    if not causal:
        return torch.full((lq, 1), lk, device=device)
    return (torch.arange(lq, device=device) + 1 + lk - lq).clamp(0, lk)[:, None]


def _masked(x: Tensor, mask: Tensor | None, seen: Tensor, keys: slice, lk: int) -> Tensor:
    """x (…, Lq, 64) in units of log 2, with the mask's columns `keys` applied, and -inf where no key is or may be seen."""
    index = torch.arange(keys.start, keys.stop, device=x.device)
    if mask is not None:
        part = mask if not mask.dim() or mask.shape[-1] == 1 else mask[..., index.clamp(max=lk - 1)]
        x = x.masked_fill(~part, -math.inf) if mask.dtype == torch.bool else x + part.float() * LOG2E
    return x.masked_fill(index >= seen, -math.inf)


# -- float ----------------------------------------------------------------------------------------------------------------
def attention_float(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without quantization, in the dtype given but at least float32: (out, lse) with the op's shapes and conventions."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(groups, 1) for t in (k, v))
    x = q.to(dtype) @ k.transpose(2, 3) * scale
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask.to(dtype)
    seen = _seen(q.shape[2], k.shape[2], causal, q.device)
    x = x.masked_fill(torch.arange(k.shape[2], device=q.device) >= seen, -math.inf)
    lse = torch.logsumexp(x, -1)
    p = torch.exp(x - torch.where(lse.isfinite(), lse, 0.0)[..., None])
    return p @ v, lse


def attention_grad(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): the gradient of `attention_float`, straight through the rounding, 128 queries at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lq, groups = q.shape[2], q.shape[1] // k.shape[1]
    kf, vf = (t.float().repeat_interleave(groups, 1) for t in (k, v))
    dk, dv, dq = torch.zeros_like(kf), torch.zeros_like(vf), []
    seen = _seen(lq, k.shape[2], causal, q.device)
    for start in range(0, lq, BLOCK_Q):
        rows = slice(start, start + BLOCK_Q)
        qf, do = q[:, :, rows].float(), dout[:, :, rows].float()
        x = qf @ kf.transpose(2, 3) * scale
        if mask is not None:
            part = mask[..., rows, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
            x = x.masked_fill(~part, -math.inf) if mask.dtype == torch.bool else x + part.float()
        x = x.masked_fill(torch.arange(k.shape[2], device=q.device) >= seen[rows], -math.inf)
        lse = torch.logsumexp(x, -1, keepdim=True)
        p = torch.exp(x - torch.where(lse.isfinite(), lse, 0.0))
        dp = do @ vf.transpose(2, 3)
        dx = p * (dp - (p * dp).sum(-1, keepdim=True) + dlse[:, :, rows, None]) * scale
        dq.append(dx @ kf)
        dk += dx.transpose(2, 3) @ qf
        dv += p.transpose(2, 3) @ do
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


register(Kernel("attention", "reference", AttentionNeeds(), attention, priority=-100))
