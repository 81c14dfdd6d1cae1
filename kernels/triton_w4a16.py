r"""Linear layers with 4-bit weights and 16-bit activations: text encoders, modulation, whatever has few rows.

    y = Σ_g (x̂_g · q_gᵀ) · scale_g + (Σ_k x̂_gk) · (zero_g + 8 scale_g) + h upᵀ + bias,      x̂ = (x + shift) / smooth

With few rows the weight's bytes are all that matters, so that one tile has as few rows as the tensor cores take and K
is split over programs until every processor has work; the parts are summed in a second kernel in a fixed order (no
atomics: the same input gives the same bits). With many rows it saves memory, not time.

A nibble u = q + 8 becomes a 16-bit float without a conversion: its bits under the exponent of 128 (bf16) or 1024 (fp16)
are the number 128 + u or 1024 + u, and one subtraction leaves q. Codes are group-major and half-split (`layouts`): low
nibbles meet columns 0 … 31 of their group, high ones 32 … 63. The second term exists for formats with zero points.
The exponent trick: Kim et al., Who says elephants can't run, 2022, https://arxiv.org/abs/2211.10017
"""

__all__ = ["aot_cases", "linear", "splits_for"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen import formats
from qgen.kernels import layouts, tuning
from qgen.kernels.aot_case import AotCase
from qgen.kernels.layouts import GROUP
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import MAX_RANK, quantize_act, reciprocal
from qgen.kernels.triton_linear import ARCHS, low_rank, tile_of

WEIGHTS = ("int4_g64", "int4_g128", "uint4_g64", "uint4_g128")

# Four bytes of two nibbles to two times four bf16 …
BF16_ASM = tl.constexpr("""{ .reg .b32 t, h, one, c;
    mov.b32 one, 0x3F803F80; mov.b32 c, 0xC308C308;
    and.b32 t, $4, 0x0F0F0F0F; shr.u32 h, $4, 4; and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;
    prmt.b32 $2, h, 0x43434343, 0x4140; prmt.b32 $3, h, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, c; fma.rn.bf16x2 $1, $1, one, c;
    fma.rn.bf16x2 $2, $2, one, c; fma.rn.bf16x2 $3, $3, one, c; }""")
# … or fp16 numbers u − 8.
FP16_ASM = tl.constexpr("""{ .reg .b32 t, h, c;
    mov.b32 c, 0x64086408;
    and.b32 t, $4, 0x0F0F0F0F; shr.u32 h, $4, 4; and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
    prmt.b32 $2, h, 0x64646464, 0x4140; prmt.b32 $3, h, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; sub.rn.f16x2 $2, $2, c; sub.rn.f16x2 $3, $3, c; }""")


@triton.jit
def _nibbles(b, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes of two offset binary nibbles to tensors low − 8 and high − 8 of a float type."""
    if ASM and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            BF16_ASM, "=&r,=&r,=&r,=&r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ASM and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            FP16_ASM, "=&r,=&r,=&r,=&r,r", [b], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low, high = ((b & 15).to(tl.int8) - 8).to(dtype), ((b >> 4).to(tl.int8) - 8).to(dtype)
    return low, high


@triton.jit
def _half(x, stride, rows, cols, K, smooth, shift, SHIFT_ROW: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns `cols` of x̂ for `rows`, rounded to the dtype of x; zero beyond K."""
    inside = cols < K
    at = x + rows[:, None] * stride + cols[None, :]
    tile = tl.load(at) if EVEN_K else tl.load(at, mask=inside[None, :], other=0.0)
    if shift is not None or smooth is not None:
        t = tile.to(tl.float32)
        if shift is not None:
            if SHIFT_ROW:
                t += tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            else:
                t += tl.load(shift).to(tl.float32)
        if smooth is not None:
            t = t * reciprocal(tl.load(smooth + cols, mask=inside, other=1.0))[None, :]
        if shift is not None and not EVEN_K:
            t = tl.where(inside[None, :], t, 0.0)
        tile = t.to(tile.dtype)
    return tile


@triton.jit
def _finish(out, h, up, bias, y, rows, cols, rm, rn, M, N, R, RP: tl.constexpr):
    """Low rank and bias into a float32 tile, and the tile into y."""
    if RP > 0:
        out = low_rank(out, h, up, rows, cols, R, RP)
    if bias is not None:
        out += tl.load(bias + cols).to(tl.float32)[None, :]
    at = y + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def _gemm16(
    x, smooth, shift, w, w_scale, w_zero, h, up, bias, y, M, N, K, G, R, stride_x,
    SPLITS: tl.constexpr, SHIFT_ROW: tl.constexpr, EVEN_K: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, HEIGHT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of y (M, N), or of one of SPLITS float32 parts y (SPLITS, M, N) without low rank and bias. G groups of 64."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, HEIGHT)
    part = tl.program_id(1)
    rm, rn = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    rows, cols = (rm % M).to(tl.int64), (rn % N).to(tl.int64)
    first, last = part * G // SPLITS, (part + 1) * G // SPLITS
    k = tl.arange(0, 32)
    w_at = w + (first.to(tl.int64) * N + cols)[None, :] * 32 + k[:, None]
    vector = first.to(tl.int64) * N + cols
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for g in range(first, last):
        low = _half(x, stride_x, rows, g * 64 + k, K, smooth, shift, SHIFT_ROW, EVEN_K)
        high = _half(x, stride_x, rows, g * 64 + 32 + k, K, smooth, shift, SHIFT_ROW, EVEN_K)
        w_low, w_high = _nibbles(tl.load(w_at), low.dtype, ASM)
        scale = tl.load(w_scale + vector).to(tl.float32)
        total += tl.dot(high, w_high, tl.dot(low, w_low)) * scale[None, :]
        if w_zero is not None:
            sums = tl.sum(low.to(tl.float32) + high.to(tl.float32), 1)
            zero = tl.load(w_zero + vector).to(tl.float32) + 8.0 * scale
            total += sums[:, None] * zero[None, :]
        w_at += N * 32
        vector += N
    if SPLITS == 1:
        _finish(total, h, up, bias, y, rows, cols, rm, rn, M, N, R, RP)
    else:
        at = y + part.to(tl.int64) * M * N + rm.to(tl.int64)[:, None] * N + rn[None, :]
        tl.store(at, total, mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def _sum_parts(
    parts, h, up, bias, y, M, N, R, SPLITS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HEIGHT: tl.constexpr,
):  # fmt: skip
    """Adds the parts (SPLITS, M, N) in order, then low rank and bias, into y (M, N)."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, HEIGHT)
    rm, rn = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    rows, cols = (rm % M).to(tl.int64), (rn % N).to(tl.int64)
    at = parts + rows[:, None] * N + cols[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(SPLITS):
        total += tl.load(at)
        at += M.to(tl.int64) * N
    _finish(total, h, up, bias, y, rows, cols, rm, rn, M, N, R, RP)


def splits_for(tiles: int, groups: int, processors: int) -> int:
    """Parts of K: two programs per processor, each with at least four groups of 64; one part where the tiles suffice."""
    return max(1, min(2 * processors // tiles, groups // 4, 32))


def linear(
    x: Tensor,
    slots: Slots,
    splits: int | None = None,
    asm: bool | None = None,
) -> Tensor:
    """`reference.linear` for packed tensors and float activations: x (…, K) to y (…, N).

    One launch, one more where K is split, one more before them for a low-rank branch. splits: parts of K; None = by the
    device. asm: whether nibbles are converted by inline PTX; None = on NVIDIA.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    m, k = rows.shape
    n, groups, down, up = slots.n, slots.codes.shape[0], slots.down, slots.up
    y = x.new_empty(m, n)
    if m == 0:
        return y.view(*x.shape[:-1], n)
    capability = tuning.capability_of(x.device)
    config = tuning.launch("w4a16", capability, m)
    tiles = triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn)
    if splits is None:
        splits = splits_for(tiles, groups, _processors(x.device))
    h = None if down is None else quantize_act(rows, None, groups * GROUP, down=down).h
    rank = {"R": 0 if up is None else up.shape[1], "RP": 0 if h is None else h.shape[1]}
    shape = {"M": m, "N": n, "SPLITS": splits, "BM": config.bm, "BN": config.bn, "HEIGHT": 8}
    last = {"h": h, "up": up, "bias": slots.bias}
    first = dict.fromkeys(last) if splits > 1 else last
    with torch.cuda.device_of(x):
        target = y if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
        _gemm16[tiles, splits](
            rows, slots.smooth, slots.shift, slots.codes, slots.scales, slots.zero, **first, y=target, K=k, G=groups,
            stride_x=rows.stride(0), SHIFT_ROW=slots.shift is not None and slots.shift.ndim > 0,
            EVEN_K=k == groups * GROUP,
            ASM=isinstance(capability, tuple) if asm is None else asm, **shape,
            **(rank if splits == 1 else {"R": 0, "RP": 0}), **config.options,
        )  # fmt: skip
        if splits > 1:
            _sum_parts[(tiles,)](target, **last, y=y, **shape, **rank, num_warps=config.warps)
    return y.view(*x.shape[:-1], n)


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels run interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical tensors to what `linear` reads: offset binary codes (K / 64, N, 32), scales and zeros (K / 64, N)."""
    if ask.rank > MAX_RANK:
        raise ValueError(
            f"this kernel serves a low-rank branch up to rank {MAX_RANK}, found {ask.rank}; use 'reference'"
        )
    fmt = formats.get(ask.weight)
    groups = layouts.codes_to_groups(slots["codes"], 4)
    out = {**slots, "codes": layouts.offset_binary(groups) if fmt.element.signed else groups}
    return out | {s: layouts.grouped_scales(slots[s], fmt.block) for s in ("scales", "zero") if s in slots}


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    fmt = formats.get(ask.weight)
    codes = layouts.offset_binary(slots["codes"]) if fmt.element.signed else slots["codes"]
    out = {**slots, "codes": layouts.codes_from_groups(codes, 4)}
    return out | {s: layouts.scales_from_groups(slots[s], fmt.block) for s in ("scales", "zero") if s in slots}


def _register() -> None:
    interpreted = triton.knobs.runtime.interpret
    needs = Needs(
        devices=("cuda", "hip", "cpu") if interpreted else ("cuda", "hip"),
        capability=((8, 0), (12, 1)),
        archs=ARCHS,
        weights=WEIGHTS,
        acts=("",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        package="triton",
        refuses=frozenset({"hadamard", "static_act"}),
    )
    register(Kernel("linear", "triton_w4a16", needs, linear, -200 if interpreted else 20, pack, unpack))


_register()


def aot_cases() -> list[AotCase]:
    """Few rows in parts and whole, with and without zero points and smoothing, many rows, fp16, AMD; the sum of the parts."""
    nvidia = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120))
    some = (("cuda", 80), ("cuda", 89), ("cuda", 90))
    return [
        _case("m16_split", 16, nvidia, splits=4),
        _case("m16", 16, (*some, ("cuda", 120)), rank=32),
        _case("m16_zero_smooth", 16, some, splits=4, zero=True, smooth=True),
        _case("m16_fp16", 16, some, splits=4, dtype="fp16"),
        _case("m128", 4096, nvidia, rank=32),
        _case("m128_smooth", 4096, some, rank=32, smooth=True),
        _case("m16_amd", 16, (("hip", "gfx942"),), splits=4),
        _case("m128_amd", 4096, (("hip", "gfx942"),)),
        _case("m16_rdna", 16, (("hip", "gfx1100"), ("hip", "gfx1201")), splits=4),
        _case("m64_rdna", 4096, (("hip", "gfx1100"), ("hip", "gfx1201"))),
        _sum_case(nvidia),
    ]


def _case(
    name: str, m: int, targets: tuple, splits: int = 1, zero: bool = False, smooth: bool = False, dtype: str = "bf16",
    rank: int = 0,
) -> AotCase:  # fmt: skip
    backend, arch = targets[0]
    config = tuning.launch("w4a16", None if backend == "cuda" else arch, m)
    p = f"*{dtype}"
    tensors = {
        "x": p, "w": "*u8", "w_scale": "*bf16", "y": p if splits == 1 else "*fp32", "w_zero": "*bf16" if zero else None,
        "smooth": p if smooth else None, "shift": None, "bias": p if splits == 1 else None,
        "h": "*bf16" if rank else None, "up": p if rank else None,
    }  # fmt: skip
    signature = {n: t for n, t in tensors.items() if t} | dict.fromkeys(("M", "N", "K", "G", "R", "stride_x"), "i32")
    constexprs = {n: None for n, t in tensors.items() if not t} | {
        "SPLITS": splits, "SHIFT_ROW": False, "EVEN_K": True, "RP": rank, "BM": config.bm, "BN": config.bn, "HEIGHT": 8,
        "ASM": backend == "cuda",
    }  # fmt: skip
    return AotCase(
        f"w4a16/{name}",
        _gemm16,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, t in signature.items() if t.startswith("*") or n in ("N", "K", "R", "stride_x")),
        options=config.options,
        targets=targets,
        tile=(config.bm, config.bn),
        budget={("cuda", cc): 180 for cc in (80, 86, 89, 90, 120)} if name == "m16_split" else {},  # 8 % over 167
    )


def _sum_case(targets: tuple) -> AotCase:
    config = tuning.launch("w4a16", None, 16)
    signature = {"parts": "*fp32", "h": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "R"), "i32")
    return AotCase(
        "w4a16/sum_parts",
        _sum_parts,
        signature=signature,
        constexprs={"SPLITS": 4, "RP": 32, "BM": config.bm, "BN": config.bn, "HEIGHT": 8},
        divisible=tuple(n for n in signature if n != "M"),
        options={"num_warps": config.warps},
        targets=targets,
    )
