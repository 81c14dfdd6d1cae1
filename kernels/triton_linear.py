r"""Linear layers on 8-bit integer tensor cores, for 4- and 8-bit integer weights; two launches per layer.

    y = act( Σ_g s_a · s_w · (a_g · w_g) + h upᵀ + zeros · sumsᵀ + bias ),        h = x downᵀ

The activation kernel (`triton_act`) makes the codes a, their scales, h and zeros; the kernel here does the rest. K
runs in groups of 64. Low and high nibbles (`layouts`: half-split) are joined along K, which moves nothing: packed
bytes go from shared memory straight into the registers that the matrix instruction reads, and are unpacked there. 8-bit
weights need no unpacking, and take two products of 32 columns instead: with one of 64, Triton carries 8-bit operands
across iterations on sm_8x, at four times the instructions. From compute capability 9.0 on the tile of y leaves by the
tensor memory accelerator.

| weight | activation | scales | in the loop |
|---|---|---|---|
| int4_s8 | int8_row | per row of x, per row of w | integers alone: a nibble becomes (u − 8) · subscale, one multiply
per four | | int4 | int8_row | per row of x, per group of w | one FMA per output and group | | int4 | int4, uint4p,
uint4 per group | per group of both | one multiply and one FMA per output and group | | int8_row | int8_row | per row
of both | integers alone |

Nibbles keep their place in the byte: 16 q (signed: low = b << 4, high = b & 0xF0) or 8 u (unsigned). The weight's 16 is
folded into its stored scale, the activation's 16 or 8 is divided out at the end. Sums of one group start at 1.5 · 2²³
as an integer, so that their bits read as a float are that number plus the sum: no conversion. |sum| ≤ 64 · 128 · 128
= 2²⁰ < 2²². The low-rank product joins after dequantization, in the float32 accumulator. uint4 activations have
zeros, u · scale + zero, and their sums S of the dequantized weight per group are two bf16 parts in one more low-rank
product.

Sub-scales: Lin et al., QServe, 2024, https://arxiv.org/abs/2405.04532. Fused low rank: https://arxiv.org/abs/2411.05007
"""

__all__ = ["ACTIVATIONS", "NAMES", "aot_cases", "gemm", "linear", "pack", "unpack"]

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qgen import formats
from qgen.kernels import layouts, tuning
from qgen.kernels.aot_case import AotCase, Target
from qgen.kernels.fusion import ACTIVATIONS, Heads
from qgen.kernels.layouts import GROUP, HADAMARDS
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import MAX_RANK, Activations, quantize_act
from qgen.kernels.triton_producers import gelu_tanh, silu

CARRIED_BY_WEIGHT = 16  # the kernel's integers of an int4 weight with group scales are 16 q
ROWS_OF_TILES = 8  # tiles of this many rows run side by side, so that the weight's tiles stay in the L2 cache

ARCHS = ("gfx942", "gfx1100", "gfx1201")  # AMD: the plain operations compile to integer MFMA and WMMA
_KIND_A = {"int8_row": "int8", "int4_g64": "int4", "uint4p_g64": "uint4", "uint4_g64": "uint4"}
_MAGIC_BITS = tl.constexpr(0x4B400000)  # float32 1.5 · 2²³
_MAGIC = tl.constexpr(12582912.0)

# Four bytes of two nibbles each: 16 q from two's complement …
SIGNED_ASM = tl.constexpr("""{ .reg .b32 t;
    shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }""")
# … 8 u from unsigned …
UNSIGNED_ASM = tl.constexpr("""{ .reg .b32 t;
    shl.b32 t, $2, 3; and.b32 $0, t, 0x78787878; shr.u32 t, $2, 1; and.b32 $1, t, 0x78787878; }""")
# … and (u − 8) s from offset binary and a sub-scale s of 1 to 16: u s + (128 − 8 s) fits a byte, so that four bytes
# share one multiplication without carries; flipping the top bit then subtracts the 128.
SUBSCALE_ASM = tl.constexpr("""{ .reg .b32 l, h, c;
    and.b32 l, $2, 0x0F0F0F0F; shr.u32 h, $2, 4; and.b32 h, h, 0x0F0F0F0F;
    mad.lo.u32 c, $3, 0xF7F7F7F8, 0x80808080;
    mad.lo.u32 l, l, $3, c; mad.lo.u32 h, h, $3, c;
    xor.b32 $0, l, 0x80808080; xor.b32 $1, h, 0x80808080; }""")


@triton.jit
def _signed(b, ASM: tl.constexpr):
    """Bytes of two two's complement nibbles to int8 tensors 16 · low and 16 · high."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            SIGNED_ASM, "=&r,=&r,r", [b], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low, high = (b << 4).to(tl.int8, bitcast=True), (b & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _unsigned(b, ASM: tl.constexpr):
    """Bytes of two unsigned nibbles to int8 tensors 8 · low and 8 · high."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            UNSIGNED_ASM, "=&r,=&r,r", [b], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low, high = ((b << 3) & 0x78).to(tl.int8, bitcast=True), ((b >> 1) & 0x78).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _subscaled(b, s, ASM: tl.constexpr):
    """Bytes of two offset binary nibbles and int32 sub-scales to int8 tensors (low − 8) · s and (high − 8) · s."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            SUBSCALE_ASM, "=&r,=&r,r,r,r,r,r", [b, s], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = (((b & 15).to(tl.int32) - 8) * s).to(tl.int8)
        high = (((b >> 4).to(tl.int32) - 8) * s).to(tl.int8)
    return low, high


@triton.jit
def _along_k(low, high, AXIS: tl.constexpr):
    """Low and high nibbles, 32 columns of K along AXIS, to one operand of 64 columns, low first."""
    both = tl.join(low, high)
    if AXIS == 0:
        both = tl.reshape(tl.permute(both, (2, 0, 1)), (64, low.shape[1]))
    else:
        both = tl.reshape(tl.permute(both, (0, 2, 1)), (low.shape[0], 64))
    return both


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, HEIGHT: tl.constexpr):
    """Row and column of the tile of program pid: HEIGHT rows of tiles are done together, column by column."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tl.assume(pid >= 0)  # unsigned divisions are half as long
    tl.assume(tiles_n > 0)
    first = pid // (HEIGHT * tiles_n) * HEIGHT
    height = min(tiles_m - first, HEIGHT)
    tl.assume(height > 0)
    inside = pid % (HEIGHT * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def low_rank(out, h, up, rows, cols, R, RP: tl.constexpr):
    """out + h upᵀ for h (…, RP) and up (…, R), of which `rows` and `cols` are taken; in bfloat16 if both are, else TF32."""
    RB: tl.constexpr = 64 if RP > 64 else RP
    for r0 in tl.static_range(0, RP, RB):
        r = r0 + tl.arange(0, RB)
        left = tl.load(h + rows[:, None] * RP + r[None, :])
        right = tl.load(up + cols[None, :] * R + r[:, None], mask=(r < R)[:, None], other=0.0)
        out = tl.dot(left, right.to(left.dtype), out)
    return out


@triton.jit
def zero_points(out, zeros, sums, rows, cols, G, N):
    """out + zeros · sums for zeros (…, G) bf16 and sums (G, N) float32, split in two bf16 parts."""
    for g0 in tl.range(0, G, 16, num_stages=1):  # pipelined, it spills on sm_80
        g = g0 + tl.arange(0, 16)
        z = tl.load(zeros + rows[:, None] * G + g[None, :], mask=(g < G)[None, :], other=0.0)
        s = tl.load(sums + g[:, None] * N + cols[None, :], mask=(g < G)[:, None], other=0.0)
        high = s.to(tl.bfloat16)
        out = tl.dot(z, high, out)
        out = tl.dot(z, (s - high.to(tl.float32)).to(tl.bfloat16), out)
    return out


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """none, gelu_tanh or silu of a float32 tile."""
    if ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    return x


@triton.jit
def integer_tile(
    start, a, a_scale, w, w_scale, sub, bias, rows, cols, M, N, K, A: tl.constexpr, W: tl.constexpr, EVEN_K:
    tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Σ_k of dequantized codes, plus bias, for rows (BM,) and cols (BN,) of what the pointers point at; float32 (BM, BN).

    A: "int8", "int4" (signed groups) or "uint4". W: "sub4", "group4" or "row8". K counts columns of the weight; a has
    ⌈K / 64⌉ whole groups. start: (BM, BN) float32 that joins the sum where A is in groups, else None.
    """
    half, whole = tl.arange(0, 32), tl.arange(0, 64)
    A_BYTES: tl.constexpr = 64 if A == "int8" else 32
    W_BYTES: tl.constexpr = 64 if W == "row8" else 32
    FLOAT: tl.constexpr = W == "group4"
    SPLIT: tl.constexpr = W == "row8"  # two products of 32: see the top of the file
    CARRIED: tl.constexpr = 16.0 if A == "int4" else 8.0
    a_at = a + rows[:, None] * A_BYTES + (half if SPLIT or A_BYTES == 32 else whole)[None, :]
    w_at = w + cols[None, :] * (K if W == "row8" else 32) + half[:, None]
    vector_at = (sub if W == "sub4" else w_scale) + cols
    a_scale_at = a_scale + rows
    if start is not None:  # noqa: SIM108 - Triton compiles one of the branches, whose types differ
        total = start * CARRIED
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32 if FLOAT else tl.int32)
    for g in range(0, tl.maximum(tl.cdiv(K, 64), 1)):  # at least once: no second path around the loop
        if SPLIT:
            if EVEN_K:
                w_low, w_high = tl.load(w_at), tl.load(w_at + 32)
            else:
                left = K - g * 64
                w_low = tl.load(w_at, mask=(half < left)[:, None], other=0)
                w_high = tl.load(w_at + 32, mask=(half + 32 < left)[:, None], other=0)
            total = tl.dot(tl.load(a_at + 32), w_high, tl.dot(tl.load(a_at), w_low, total))
        else:
            if A == "int8":
                left = tl.load(a_at)
            else:
                if A == "int4":
                    low, high = _signed(tl.load(a_at), ASM)
                else:
                    low, high = _unsigned(tl.load(a_at), ASM)
                left = _along_k(low, high, 1)
            vector = tl.load(vector_at)
            if FLOAT:
                w_low, w_high = _signed(tl.load(w_at), ASM)
                part = tl.full((BM, BN), _MAGIC_BITS, dtype=tl.int32)
                part = tl.dot(left, _along_k(w_low, w_high, 0), part).to(tl.float32, bitcast=True) - _MAGIC
                if A != "int8":
                    part = part * tl.load(a_scale_at)[:, None]
                total = tl.fma(part, tl.broadcast_to(vector[None, :], (BM, BN)), total)
            else:
                w_low, w_high = _subscaled(tl.load(w_at), tl.broadcast_to(vector[None, :], (32, BN)), ASM)
                total = tl.dot(left, _along_k(w_low, w_high, 0), total)
        a_at += M * A_BYTES
        a_scale_at += M
        w_at += W_BYTES if W == "row8" else N * W_BYTES
        vector_at += N
    out = total.to(tl.float32)
    if A == "int8":  # noqa: SIM108
        out = out * tl.load(a_scale + rows)[:, None]
    else:
        out = out * (1.0 / CARRIED)
    if bias is not None:
        offset = tl.broadcast_to(tl.load(bias + cols).to(tl.float32)[None, :], (BM, BN))
        if W == "group4":
            out += offset
        else:  # right here the bias costs nothing
            out = tl.fma(out, tl.broadcast_to(tl.load(w_scale + cols)[None, :], (BM, BN)), offset)
    elif W != "group4":
        out = out * tl.load(w_scale + cols)[None, :]
    return out


@triton.jit
def gemm_tile(
    a, a_scale, zeros, h, w, w_scale, sub, sums, up, bias, pm, pn, M, N, K, R,
    A: tl.constexpr, W: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, RP: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The tile (pm, pn) of activation(a wᵀ + h upᵀ + bias), float32 (BM, BN).

    Pointers move to the tile's corner in 64 bits, what is inside the tile is counted in 32. Rows and columns that do
    not exist are copies of the last one.
    """
    row, col = (pm * BM).to(tl.int64), (pn * BN).to(tl.int64)
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    rows, cols = tl.minimum(rm, M - 1 - pm * BM), rn if EVEN_N else tl.minimum(rn, N - 1 - pn * BN)
    if zeros is not None:  # first, when registers are still free
        start = zero_points(
            tl.zeros((BM, BN), dtype=tl.float32), zeros + row * (K // 64), sums + col, rows, cols, K // 64, N
        )
    else:
        start = None
    out = integer_tile(
        start, a + row * (64 if A == "int8" else 32), a_scale + row, w + col * (K if W == "row8" else 32), w_scale + col,
        None if sub is None else sub + col, None if bias is None else bias + col, rows, cols, M, N, K, A, W, EVEN_K,
        BM, BN, ASM,
    )  # fmt: skip
    if RP > 0:
        out = low_rank(out, h + row * RP, up + col * R, rows, cols, R, RP)
    return activate(out, ACTIVATION)


@triton.jit
def store_tile(y, out, pm, pn, M, N, EVEN_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Writes the tile (pm, pn) of y (M, N), a pointer or (TMA) a descriptor; what does not exist is not written."""
    if TMA:
        y.store([pm * BM, pn * BN], out.to(y.dtype))
    else:
        rm, rn = tl.arange(0, BM), tl.arange(0, BN)
        at = y + (pm * BM).to(tl.int64) * N + pn * BN + (rm[:, None] * N + rn[None, :])
        inside = (rm < M - pm * BM)[:, None]
        if not EVEN_N:
            inside = inside & (rn < N - pn * BN)[None, :]
        tl.store(at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_and_rotate(
    out, gamma, cos, sin, pm, pn, columns, length, eps,
    DIM: tl.constexpr, HALVES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`fusion.Heads` for a tile (BM, BN), BN a multiple of DIM; columns from `columns` on stay as they are."""
    H: tl.constexpr = BN // DIM
    col = pn * BN + tl.arange(0, BN)
    t = out
    if gamma is not None:
        heads = tl.reshape(t, (BM, H, DIM))
        rstd = 1.0 / tl.sqrt(tl.sum(heads * heads, 2) / DIM + eps)
        t = tl.reshape(heads * rstd[:, :, None], (BM, BN))
        t = t * tl.load(gamma + col, mask=col < columns, other=1.0).to(tl.float32)[None, :]
    if cos is not None:
        place = (pm * BM + tl.arange(0, BM)) % length
        pair = tl.arange(0, BN // 2) % (DIM // 2)
        at = place[:, None] * (DIM // 2) + pair[None, :]
        c, s = tl.load(cos + at), tl.load(sin + at)
        if HALVES:
            first, second = tl.split(tl.permute(tl.reshape(t, (BM, H, 2, DIM // 2)), (0, 1, 3, 2)))
            first, second = tl.reshape(first, (BM, BN // 2)), tl.reshape(second, (BM, BN // 2))
            both = tl.join(first * c - second * s, first * s + second * c)
            t = tl.reshape(tl.permute(tl.reshape(both, (BM, H, DIM // 2, 2)), (0, 1, 3, 2)), (BM, BN))
        else:
            first, second = tl.split(tl.reshape(t, (BM, BN // 2, 2)))
            t = tl.reshape(tl.join(first * c - second * s, first * s + second * c), (BM, BN))
    return tl.where((col < columns)[None, :], t, out)


@triton.jit
def _gemm(
    a, a_scale, zeros, h, w, w_scale, sub, sums, up, bias, y, gamma, cos, sin, M, N, K, R, columns, length, eps,
    A: tl.constexpr, W: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, RP: tl.constexpr,
    ACTIVATION: tl.constexpr, DIM: tl.constexpr, HALVES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HEIGHT: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile (BM, BN) of y (M, N). DIM: size of the heads to prepare, 0 for none."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, HEIGHT)
    out = gemm_tile(
        a, a_scale, zeros, h, w, w_scale, sub, sums, up, bias, pm, pn, M, N, K, R, A, W, EVEN_K, EVEN_N, RP, ACTIVATION,
        BM, BN, ASM,
    )  # fmt: skip
    if DIM > 0:
        out = norm_and_rotate(out, gamma, cos, sin, pm, pn, columns, length, eps, DIM, HALVES, BM, BN)
    store_tile(y, out, pm, pn, M, N, EVEN_N, BM, BN, TMA)


def gemm(
    a: Activations,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    act: str,
    n: int,
    dtype: torch.dtype,
    activation: str = "none",
    asm: bool | None = None,
    tma: bool | None = None,
    heads: Heads | None = None,
) -> Tensor:
    """Quantized activations times a packed weight: y (M, N) of `dtype`; one launch.

    codes, scales, global_scale: as `pack` leaves them. up (N, R), bias (N,): canonical. activation: one of ACTIVATIONS.
    asm: whether nibbles are unpacked by inline PTX; None = on NVIDIA. tma: whether y is stored by the tensor memory
    accelerator where N allows; None = where there is one. heads: what to do with q and k; sizes of heads are 16, 32, 64
    and 128.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activations of the epilogue are {', '.join(ACTIVATIONS)}, found {activation!r}")
    y = torch.empty(a.m, n, dtype=dtype, device=codes.device)
    if a.m == 0:
        return y
    capability = tuning.capability_of(codes.device)
    config = tuning.launch(tuned_as(kind_w(weight_format), a.zeros is not None, heads is not None), capability, a.m)
    if heads is not None and config.bn % heads.dim:
        raise ValueError(f"q and k are prepared in heads of a power of two, up to {config.bn}; found {heads.dim}")
    if tma is None:
        tma = isinstance(capability, tuple) and capability >= (9, 0)
    tma = tma and n * y.element_size() % 16 == 0  # rows of a descriptor begin at multiples of 16 bytes
    target = TensorDescriptor.from_tensor(y, [config.bm, config.bn]) if tma else y
    grid = (triton.cdiv(a.m, config.bm) * triton.cdiv(n, config.bn),)
    with torch.cuda.device_of(codes):
        _gemm[grid](
            *operands(a, codes, scales, global_scale, up, bias), target, **heads_arguments(heads), M=a.m, N=n, K=columns(codes),
            R=0 if up is None else up.shape[1], A=kind_a(act), W=kind_w(weight_format),
            EVEN_K=columns(codes) % GROUP == 0, EVEN_N=n % config.bn == 0, RP=0 if a.h is None else a.h.shape[1],
            ACTIVATION=activation, BM=config.bm, BN=config.bn, HEIGHT=ROWS_OF_TILES,
            ASM=isinstance(capability, tuple) if asm is None else asm, TMA=tma, **config.options,
        )  # fmt: skip
    return y


def heads_arguments(heads: Heads | None) -> dict:
    """The arguments of the kernel that `norm_and_rotate` reads."""
    if heads is None:
        return dict.fromkeys(("gamma", "cos", "sin")) | {
            "columns": 0,
            "length": 1,
            "eps": 0.0,
            "DIM": 0,
            "HALVES": False,
        }
    return {
        "gamma": heads.gamma, "cos": heads.cos, "sin": heads.sin, "columns": heads.columns,
        "length": 1 if heads.cos is None else heads.cos.shape[0], "eps": float(heads.eps), "DIM": heads.dim,
        "HALVES": heads.halves,
    }  # fmt: skip


def operands(
    a: Activations, codes: Tensor, scales: Tensor, global_scale: Tensor | None, up: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The first ten arguments of the kernels here, from what `pack` leaves."""
    if codes.ndim == 2:  # int8_row
        codes, w_scale, sub, sums = codes.view(torch.int8), scales, None, None
    elif global_scale is not None:  # int4_s8
        w_scale, sub, sums = global_scale, scales, None
    else:
        w_scale, sub, sums = (scales[0], None, scales[1]) if scales.ndim == 3 else (scales, None, None)
    return (a.codes, a.scales, a.zeros, a.h, codes, w_scale, sub, sums, up, bias)


def columns(codes: Tensor) -> int:
    """Columns Kp of a packed weight."""
    return codes.shape[0] * GROUP if codes.ndim == 3 else codes.shape[1]


def tuned_as(w: str, zeros: bool, heads: bool = False) -> str:
    """The op of `tuning.TABLE`: group scales, zero points and heads want more registers."""
    if zeros or heads:
        return "linear_zeros" if zeros else "linear_heads"
    return "linear_groups" if w == "group4" else "linear"


def kind_a(act: str) -> str:
    """What the kernels call a format of activations."""
    return _KIND_A[act]


def kind_w(weight_format: str) -> str:
    """What the kernels call a format of weights."""
    if weight_format.startswith("int4_s8"):
        return "sub4"
    return "row8" if weight_format == "int8_row" else "group4"


def linear(x: Tensor, slots: Slots) -> Tensor:
    """`reference.linear` for packed tensors: x (…, K) to y (…, N), two launches."""
    return _multiply(x, _quantize(x, slots), slots)


def _quantize(x: Tensor, slots: Slots) -> Activations:
    """The first launch; layers with a common input and `down` may share what it makes."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    kp = layouts.round_up(columns(slots.codes), GROUP)
    return quantize_act(
        rows, slots.act, kp, slots.smooth, slots.shift, slots.down, slots.hadamard, act_scale=slots.act_scale
    )


def _multiply(x: Tensor, a: Activations, slots: Slots) -> Tensor:
    y = gemm(
        a, slots.codes, slots.scales, slots.global_scale, slots.up, slots.bias, slots.weight, slots.act, slots.n, x.dtype
    )  # fmt: skip
    return y.view(*x.shape[:-1], slots.n)


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical tensors to what `linear` reads; see `unpack` for the way back.

    int4 codes become group-major (offset binary where they have sub-scales), their scales (K / 64, N): int32
    sub-scales, or float32 divided by the 16 that the kernel's integers carry. For uint4 activations they are (2, K /
    64, N), the second part the sums over each group of the dequantized weight. int8_row stays as it is. Raises
    ValueError for a rank above 256.
    """
    if ask.rank > MAX_RANK:
        raise ValueError(
            f"this kernel serves a low-rank branch up to rank {MAX_RANK}, found {ask.rank}; use 'reference'"
        )
    if ask.weight == "int8_row":
        return slots
    fmt = formats.get(ask.weight)
    codes, scales = slots["codes"], layouts.grouped_scales(slots["scales"], fmt.block)
    groups = layouts.codes_to_groups(codes, 4)
    if ask.weight.startswith("int4_s8"):
        return {**slots, "codes": layouts.offset_binary(groups), "scales": scales.int()}
    scales = scales.float()
    folded = scales / CARRIED_BY_WEIGHT
    if ask.act == "uint4_g64":
        q = layouts.codes_to_groups(layouts.offset_binary(codes), 4)  # u = q + 8
        sums = ((q & 15).sum(-1) + (q >> 4).sum(-1) - 8 * GROUP).float() * scales
        folded = torch.stack([folded, sums])
    return {**slots, "codes": groups, "scales": folded}


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`: powers of two lose nothing. The format of the activations is not looked at."""
    if ask.weight == "int8_row":
        return slots
    fmt = formats.get(ask.weight)
    codes, scales = slots["codes"], slots["scales"]
    if ask.weight.startswith("int4_s8"):
        codes = layouts.offset_binary(codes)
    else:
        scales = (scales[0] if scales.ndim == 3 else scales) * CARRIED_BY_WEIGHT
    scales = layouts.scales_from_groups(scales.to(fmt.scale_dtype), fmt.block)
    return {**slots, "codes": layouts.codes_from_groups(codes, 4), "scales": scales}


_SERVED = {
    "triton_w4s_a8": (("int4_s8_g64", "int4_s8_g128"), ("int8_row",), 20),
    "triton_w8a8": (("int8_row",), ("int8_row",), 20),
    "triton_w4a8": (("int4_g64", "int4_g128"), ("int8_row",), 10),
    "triton_w4a4": (("int4_g64", "int4_g128"), ("int4_g64", "uint4p_g64", "uint4_g64"), 10),
}
NAMES = tuple(_SERVED)
READS = ("smooth", "shift", "down", "act_scale")  # of the first launch


def _register() -> None:
    """Under Triton's interpreter the kernels also serve the CPU, at a priority below the reference: only by name."""
    interpreted = triton.knobs.runtime.interpret
    common = {
        "devices": ("cuda", "hip", "cpu") if interpreted else ("cuda", "hip"),
        "capability": ((8, 0), (12, 1)),
        "archs": ARCHS,
        "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        "package": "triton",
        "hadamards": HADAMARDS,
    }
    for name, (weights, acts, priority) in _SERVED.items():
        statics = ("tensor",) if acts == ("int8_row",) else ("tensor", "block")
        needs = Needs(weights=weights, acts=acts, statics=statics, **common)
        rank = -200 if interpreted else priority
        register(Kernel("linear", name, needs, linear, rank, pack, unpack, _quantize, _multiply, READS))


_register()


_FAMILIES: dict[str, tuple[Target, ...]] = {
    "sm8x": (("cuda", 80), ("cuda", 86), ("cuda", 89)),
    "sm90": (("cuda", 90),),
    "sm100": (("cuda", 100),),
    "sm120": (("cuda", 120),),
}
_MODES = {
    "w4s_a8": ("int8", "sub4"),
    "w4_a8": ("int8", "group4"),
    "w4_a4": ("int4", "group4"),
    "w4_a4u": ("uint4", "group4"),
    "w8_a8": ("int8", "row8"),
}
_VARIANTS = {
    "m16": {"m": 16},
    "gelu": {"activation": "gelu_tanh"},
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
}


def aot_cases() -> list[AotCase]:
    """Each kind of operands with the launch of each family of cards, rank 32 and bias; variants of the default; AMD."""
    cases = []
    for family, targets in _FAMILIES.items():
        cases += [_case(f"{name}_{family}", *mode, targets) for name, mode in _MODES.items()]
        cases += [_case(f"w4s_a8_{name}_{family}", "int8", "sub4", targets, **v) for name, v in _VARIANTS.items()]
    for family, archs in (("amd", ("gfx942",)), ("rdna", ("gfx1100", "gfx1201"))):
        targets = tuple(("hip", arch) for arch in archs)
        cases += [_case(f"w4s_a8_m{m}_{family}", "int8", "sub4", targets, m=m) for m in (16, 64, 4096)]
        cases += [_case(f"{name}_{family}", *_MODES[name], targets) for name in ("w4_a4", "w8_a8")]
    return cases


def _case(
    name: str, a: str, w: str, targets: tuple[Target, ...], m: int = 4096, activation: str = "none", dtype: str = "bf16",
    heads: int = 0,
) -> AotCase:  # fmt: skip
    backend, arch = targets[0]
    capability = divmod(arch, 10) if backend == "cuda" else arch
    zeros, tma = a == "uint4", backend == "cuda" and capability >= (9, 0)
    config = tuning.launch(tuned_as(w, zeros, heads > 0), capability, m)
    p = f"*{dtype}"
    tensors = {
        "a": "*i8" if a == "int8" else "*u8", "a_scale": "*fp32", "zeros": "*bf16" if zeros else None,
        "h": "*bf16" if dtype == "bf16" else "*fp32", "w": "*i8" if w == "row8" else "*u8", "w_scale": "*fp32",
        "sub": "*i32" if w == "sub4" else None, "sums": "*fp32" if zeros else None, "up": p, "bias": p,
        "y": f"tensordesc<{dtype}[{config.bm},{config.bn}]>" if tma else p,
        "gamma": p if heads else None, "cos": "*fp32" if heads else None, "sin": "*fp32" if heads else None,
    }  # fmt: skip
    numbers = ("M", "N", "K", "R", "columns", "length")
    signature = {n: t for n, t in tensors.items() if t} | dict.fromkeys(numbers, "i32") | {"eps": "fp32"}
    constexprs = {n: None for n, t in tensors.items() if not t} | {
        "A": a, "W": w, "EVEN_K": True, "EVEN_N": True, "RP": 32, "ACTIVATION": activation, "BM": config.bm,
        "DIM": heads, "HALVES": False,
        "BN": config.bn, "HEIGHT": ROWS_OF_TILES, "ASM": backend == "cuda", "TMA": tma,
    }  # fmt: skip
    mode = next(key for key, value in _MODES.items() if value == (a, w))
    default = m > 64 and activation == "none" and dtype == "bf16" and not heads
    return AotCase(
        f"linear/{name}",
        _gemm,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, t in signature.items() if not t.startswith("tensordesc") and n != "eps"),
        options=config.options,
        targets=targets,
        require={None: (r"IMMA\.16832\.S8", r"HMMA\.16816\.F32\.BF16")} if targets[0][1] == 80 and default else {},
        macs={} if zeros or backend == "hip" else {"s8": config.bm * config.bn * 64},  # with zeros there are two loops
        tile=(config.bm, config.bn),
        budget={("cuda", cc): round(1.08 * n * config.warp_work) for cc, n in _LOOPS[mode].items()}
        if default and backend == "cuda"
        else {},
        efficiency={None: 0.9} if backend == "cuda" and mode in ("w4s_a8", "w8_a8") and default and arch != 100 else {},
    )


# Instructions per 128 x 128 x 64 and 8 warps, in the loop of the prototypes these kernels were grown from, Triton 3.8.0:
# a lost optimization costs far more.
_LOOPS = {
    "w4s_a8": {80: 243, 86: 243, 89: 243, 90: 110, 120: 238},
    "w4_a8": {80: 335, 86: 335, 89: 331, 90: 337},
    "w4_a4": {80: 407, 86: 409, 89: 409, 90: 413},
    "w4_a4u": {80: 423, 86: 425, 89: 425, 90: 429},
    "w8_a8": {80: 82, 86: 82, 89: 82, 90: 82},
}
