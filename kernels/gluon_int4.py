r"""INT4 linear on the INT4 tensor cores of Ampere and Ada (sm_80, 86, 89): twice the rate of int8, by
`mma.m16n8k64.s4`.

    y[m, n] = Σ_g sx[g, m] · sw[g, n] · (Σ_{k in g} cx[m, k] · cw[n, k]) + Σ_r h[m, r] · up[n, r] + bias[n]

with groups g of 64 columns. Triton has no INT4 dot, and Hopper and later emulate the instruction in software, so that
the kernel is refused there. It is offered only to those who ask for it by name: its PTX is executed in the tests, on the
CPU, but no GPU has run it.

Every lane of a warp feeds the instruction whole 32-bit words of eight codes, in the order of PTX's fragment tables. A
word is four bytes of the group-major layout of `layouts.py` (column j low, column j + 32 high); which eight columns
share a word does not matter, as long as both operands agree. Of the weight a lane finds its four words side by side
("L1"):

    word w (0 … 7) of row r, group g  →  [g][r // 16][lane = 4 (r mod 8) + w mod 4][2 (r // 8 mod 2) + w // 4]

The low-rank product uses `mma.m16n8k16`, whose fragments have the same shape with words of two bfloat16, so that `up`
is stored by the same rule. Integer results start at 0x4B400000 and are read as floats: 2²³ + 2²² + n, exact for |n| <
2²², which spares the slow conversion.

PTX ISA, matrix fragments for mma.m16n8k64 and m16n8k16, https://docs.nvidia.com/cuda/parallel-thread-execution/
Nunchaku, whose kernel showed that W4A4 pays when fragments lie in memory as registers want them,
https://github.com/nunchaku-tech/nunchaku
"""

__all__ = ["aot_cases", "from_fragments", "int4_gemm", "linear", "to_fragments"]

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qgen.kernels.aot_case import AotCase
from qgen.kernels.layouts import GROUP, HADAMARDS, codes_from_groups, codes_to_groups, pad_rows, round_up
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import Activations, quantize_act

MAGIC = gl.constexpr(0x4B400000)
MAGIC_FLOAT = gl.constexpr(12582912.0)  # the same bits
TILE = 16  # rows of one operand of the instruction, or two tiles of 8
# 128 x 128 outputs of a program, 32 x 64 of a warp: 168 registers; 64 x 64 would spend 7 % fewer instructions on an
# mma but need more registers than there are.
TILES_M, TILES_N, WARPS_M, WARPS_N = 8, 8, 4, 2
ACTS = {"int4_g64": "s4", "uint4p_g64": "u4"}


@gluon.jit
def _mma_int4(a, b, c0, c1, KIND: gl.constexpr):
    """Two m16n8k64 products: `a` with the first and the last two words of `b`, added to c0 and c1."""
    return gl.inline_asm_elementwise(
        "{ mma.sync.aligned."
        + KIND
        + " {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$16,$17,$18,$19}; mma.sync.aligned."
        + KIND
        + " {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$14,$15}, {$20,$21,$22,$23}; }",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [a, b, c0, c1],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _mma_bf16(a, b, c0, c1):
    """The same for m16n8k16 products of bfloat16 in float32."""
    return gl.inline_asm_elementwise(
        "{ mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, "
        "{$16,$17,$18,$19}; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$4,$5,$6,$7}, {$8,$9,$10,$11}, "
        "{$14,$15}, {$20,$21,$22,$23}; }",
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f",
        [a, b, c0, c1],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _lanes(words, NT: gl.constexpr, layout: gl.constexpr):
    """(NT, 128) words as (NT, 32, 2, 2) in `layout`, which names the same registers."""
    return gl.convert_layout(gl.reshape(words, (NT, 32, 2, 2)), layout, assert_trivial=True)


@gluon.jit
def _int4_gemm(
    X, SX, W, SW, H, UP, BIAS, Y, M, N, K, tiles, row_words,
    KIND: gl.constexpr, STEPS: gl.constexpr, GROUP_M: gl.constexpr,
    MT: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
):  # fmt: skip
    """X (K/64, M, 8) words; SX (K/64, M) float32; W (K/64, tiles, 128) words; SW (K/64, 16 tiles) bf16; H (M, row_words)
    and UP (STEPS, tiles, 128) words of two bf16, or None. A program computes MT by NT tiles of 16 x 16. M must be at least
    16 MT, tiles a multiple of NT."""
    # Axes of an accumulator: tile row, tile column, lane, upper or lower 8 rows, left or right of 2 columns. The last
    # two are the four registers of a fragment, for operands as for results.
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2, 2], [1, 1, 32, 1, 1], [WM, WN, 1, 1, 1], [4, 3, 2, 1, 0])
    LA: gl.constexpr = gl.SliceLayout(1, L)
    LB: gl.constexpr = gl.SliceLayout(0, L)

    pid = gl.program_id(0)
    across = gl.cdiv(tiles, NT)
    down = gl.cdiv(M, MT * 16)
    first = pid // (GROUP_M * across) * GROUP_M
    height = min(down - first, GROUP_M)
    pm = first + pid % (GROUP_M * across) % height
    pn = pid % (GROUP_M * across) // height

    mt = gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LA))))
    lane_a = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LA))))
    i_a = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LA))))
    j_a = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LA))))
    nt_c = gl.arange(0, NT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(2, LB))))
    lane_c = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(2, LB))))
    j_c = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LB))))

    # The last program starts where it still finds all its rows, so that addresses need no test: what two programs
    # share is computed twice, to the same bits. Everything but one base per operand is then a constant of the load
    # instruction.
    top = gl.minimum(pm * MT * 16, M - MT * 16)
    left = pn * NT
    # Operand A: register 2 i + j of a lane is word (lane mod 4) + 4 i of row lane // 4 + 8 j.
    a_lane = (lane_a // 4 * 8 + lane_a % 4)[None, :, None, None]
    a_rest = mt[:, None, None, None] * 128 + 64 * j_a[None, None, None, :] + 4 * i_a[None, None, :, None]
    # Operand B: the four words of a lane as they stand in memory, read at one stroke.
    flat: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WM, WN, 1], [2, 1, 0]))
    b_tile = gl.arange(0, NT, layout=gl.SliceLayout(1, flat))
    b_word = gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    b_rest = b_tile[:, None] * 128 + b_word[None, :]
    # Results: register 2 i + j of a lane is row lane // 4 + 8 i, column 2 (lane mod 4) + j.
    row_lane = (lane_a // 4)[None, :, None]
    row_rest = mt[:, None, None] * 16 + 8 * i_a[None, None, :]
    col_lane = 2 * (lane_c % 4)[None, :, None]
    col_rest = nt_c[:, None, None] * 16 + j_c[None, None, :]
    out_row = row_lane + row_rest
    out_col = col_lane + col_rest

    acc0 = gl.zeros((MT, NT, 32, 2, 2), gl.float32, L)
    acc1 = gl.zeros((MT, NT, 32, 2, 2), gl.float32, L)
    zero = gl.full((MT, NT, 32, 2, 2), MAGIC, gl.int32, L)
    groups = K // 64
    x, w = X + top * 8, W + left * 128
    sx, sw = SX + top, SW + left * 16
    a = gl.load(x + a_lane + a_rest)
    b = _lanes(gl.load(w + b_rest), NT, LB)
    sa = gl.load(sx + row_lane + row_rest)
    sb0 = gl.load(sw + col_lane + col_rest)
    sb1 = gl.load(sw + col_lane + (col_rest + 8))
    for g in range(groups):
        more = gl.where(g + 1 < groups, 1, 0)  # the last trip reads its own group again and drops it
        x += more * M * 8
        w += more * tiles * 128
        sx += more * M
        sw += more * tiles * 16
        next_a = gl.load(x + a_lane + a_rest)
        next_b = _lanes(gl.load(w + b_rest), NT, LB)
        next_sa = gl.load(sx + row_lane + row_rest)
        next_sb0 = gl.load(sw + col_lane + col_rest)
        next_sb1 = gl.load(sw + col_lane + (col_rest + 8))
        d0, d1 = _mma_int4(gl.expand_dims(a, 1), gl.expand_dims(b, 0), zero, zero, KIND)
        scale_a = gl.expand_dims(gl.expand_dims(sa, 3), 1)
        scale_b0 = gl.expand_dims(gl.expand_dims(sb0.to(gl.float32), 2), 0)
        scale_b1 = gl.expand_dims(gl.expand_dims(sb1.to(gl.float32), 2), 0)
        acc0 += (d0.to(gl.float32, bitcast=True) - MAGIC_FLOAT) * (scale_a * scale_b0)
        acc1 += (d1.to(gl.float32, bitcast=True) - MAGIC_FLOAT) * (scale_a * scale_b1)
        a = next_a
        b = next_b
        sa = next_sa
        sb0 = next_sb0
        sb1 = next_sb1
    if H is not None:
        for step in gl.static_range(STEPS):
            h_lane = (lane_a // 4)[None, :, None, None] * row_words + (lane_a % 4)[None, :, None, None]
            h_rows = (mt[:, None, None, None] * 16 + 8 * j_a[None, None, None, :]) * row_words
            h = gl.load(
                H + top.to(gl.int64) * row_words + h_lane + (h_rows + (4 * i_a[None, None, :, None] + step * 8))
            )
            u = _lanes(gl.load(UP + (step * tiles + left) * 128 + b_rest), NT, LB)
            acc0, acc1 = _mma_bf16(gl.expand_dims(h, 1), gl.expand_dims(u, 0), acc0, acc1)
    out_col += left * 16
    if BIAS is not None:
        bias0 = gl.load(BIAS + out_col, mask=out_col < N, other=0.0).to(gl.float32)
        bias1 = gl.load(BIAS + out_col + 8, mask=out_col + 8 < N, other=0.0).to(gl.float32)
        acc0 += gl.expand_dims(gl.expand_dims(bias0, 2), 0)
        acc1 += gl.expand_dims(gl.expand_dims(bias1, 2), 0)
    column = gl.expand_dims(gl.expand_dims(out_col, 2), 0)
    yp = Y + top.to(gl.int64) * N + (gl.expand_dims(gl.expand_dims(out_row, 3), 1) * N + column)
    gl.store(yp, acc0.to(Y.dtype.element_ty), mask=column < N)
    gl.store(yp + 8, acc1.to(Y.dtype.element_ty), mask=column + 8 < N)


def to_fragments(words: Tensor) -> Tensor:
    """Words (G, N, 8) of any dtype, N a multiple of 16, to (G, N / 16, 32, 4), in the order described above."""
    g, n, _ = words.shape
    tiles = words.view(g, n // TILE, 2, 8, 2, 4)  # group, tile, upper or lower rows, row, half of the words, word
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(g, n // TILE, 32, 4)


def from_fragments(fragments: Tensor) -> Tensor:
    """The exact inverse of `to_fragments`: (G, T, 32, 4) to words (G, 16 T, 8)."""
    g, t = fragments.shape[:2]
    return fragments.view(g, t, 8, 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(g, t * TILE, 8)


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical slots to: codes (K/64, T, 32, 16) uint8, scales (K/64, 16 T) bf16, up (R'/16, T, 32, 8) bf16.

    T is the number of tiles of 16 rows, N padded to 128.
    """
    packed = dict(slots)
    rows = round_up(slots["codes"].shape[0], TILE * TILES_N)
    groups = codes_to_groups(pad_rows(slots["codes"], rows), 4)  # (K / 64, N', 32)
    packed["codes"] = to_fragments(groups.view(torch.int32)).contiguous().view(torch.uint8)
    packed["scales"] = pad_rows(slots["scales"], rows).T.contiguous()
    if "up" in slots:
        up = pad_rows(slots["up"], rows)
        up = torch.nn.functional.pad(up, (0, -up.shape[1] % TILE))
        words = up.view(rows, -1, TILE).transpose(0, 1).contiguous().view(torch.int32)  # (R' / 16, N', 8)
        packed["up"] = to_fragments(words).contiguous().view(slots["up"].dtype)
    return packed


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    canonical = dict(slots)
    words = from_fragments(slots["codes"].view(torch.int32)).contiguous()
    canonical["codes"] = codes_from_groups(words.view(torch.uint8), 4)[: ask.n].contiguous()
    canonical["scales"] = slots["scales"].T[: ask.n].contiguous()
    if "up" in slots:
        words = from_fragments(slots["up"].view(torch.int32)).transpose(0, 1).contiguous()
        up = words.view(slots["up"].dtype).flatten(1)
        canonical["up"] = up[: ask.n, : slots["down"].shape[0]].contiguous()
    return canonical


def int4_gemm(
    act: Activations, act_format: str, codes: Tensor, scales: Tensor, up: Tensor | None, bias: Tensor | None, n: int
) -> Tensor:
    """The product described at the top of this file, (M, N) bf16, for packed codes, scales and up.

    act: of `quantize_act` for "int4_g64" or "uint4p_g64", of at least 128 rows, with `h` in bf16 if there is `up`.
    """
    m, (groups, tiles) = act.m, codes.shape[:2]
    if m < TILES_M * TILE or tiles % TILES_N:
        raise ValueError(
            f"needs at least {TILES_M * TILE} rows and codes as `pack` lays them out, found {m} and {tiles}"
        )
    y = torch.empty(m, n, dtype=torch.bfloat16, device=codes.device)
    grid = (-(-m // (TILES_M * TILE)) * -(-tiles // TILES_N),)
    with torch.cuda.device_of(codes):
        _int4_gemm[grid](
            act.codes.view(torch.int32), act.scales, codes.view(torch.int32), scales,
            None if up is None else act.h.view(torch.int32), None if up is None else up.view(torch.int32), bias, y,
            m, n, groups * GROUP, tiles, 0 if up is None else act.h.shape[1] // 2,
            KIND=_kind(act_format), STEPS=0 if up is None else up.shape[0], GROUP_M=8,
            MT=TILES_M, NT=TILES_N, WM=WARPS_M, WN=WARPS_N, num_warps=WARPS_M * WARPS_N,
        )  # fmt: skip
    return y


def _kind(act_format: str) -> str:
    return f"m16n8k64.row.col.s32.{ACTS[act_format]}.s4.s32"


def linear(x: Tensor, slots: Slots) -> Tensor:
    """The op `qgen::linear` for packed slots: two launches, activations and product. See `reference.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    rows = pad_rows(rows, max(m, TILES_M * TILE))  # few rows: a program wants a whole tile
    kp = slots.codes.shape[0] * GROUP
    a = quantize_act(rows, slots.act, kp, slots.smooth, slots.shift, slots.down, slots.hadamard)
    y = int4_gemm(a, slots.act, slots.codes, slots.scales, slots.up, slots.bias, slots.n)
    return y[:m].view(*x.shape[:-1], slots.n)


register(
    Kernel(
        "linear",
        "gluon_int4",
        Needs(
            devices=("cuda",),
            capability=((8, 0), (8, 9)),
            weights=("int4_g64",),
            acts=tuple(ACTS),
            dtypes=(torch.bfloat16,),
            package="triton",
            refuses=frozenset({"static_act"}),
            hadamards=HADAMARDS,
        ),
        linear,
        priority=-200,  # below the reference: only by name, until somebody has run it
        pack=pack,
        unpack=unpack,
    )
)


def aot_cases() -> list[AotCase]:
    """Signed and unsigned activations where INT4 tensor cores exist, and where they are emulated: that must show."""
    return [_case("linear/w4a4_s4", "int4_g64"), _case("linear/w4a4_u4", "uint4p_g64")]


def _case(name: str, act: str) -> AotCase:
    kind = {"int4_g64": "S4", "uint4p_g64": "U4"}[act]
    return AotCase(
        name,
        _int4_gemm,
        signature={
            **dict.fromkeys(("X", "W", "H", "UP"), "*i32"),
            "SX": "*fp32",
            **dict.fromkeys(("SW", "BIAS", "Y"), "*bf16"),
            **dict.fromkeys(("M", "N", "K", "tiles", "row_words"), "i32"),
        },
        constexprs={
            "KIND": _kind(act), "STEPS": 2, "GROUP_M": 8, "MT": TILES_M, "NT": TILES_N, "WM": WARPS_M, "WN": WARPS_N,
        },
        divisible=("X", "SX", "W", "SW", "H", "UP", "BIAS", "Y", "M", "N", "K", "tiles", "row_words"),
        options={"num_warps": WARPS_M * WARPS_N},
        targets=(("cuda", 80), ("cuda", 86), ("cuda", 89)),
        require={None: (rf"IMMA\.16864\.{kind}\.S4", r"HMMA\.16816\.F32\.BF16", r"ld\.global\S*\.v4")},
        forbid={None: (r"\bld\.shared", r"\bst\.shared")},
        macs={"s4": TILES_M * TILES_N * TILE * TILE * GROUP},
        tile=(TILES_M * TILE, TILES_N * TILE),
    )  # fmt: skip
