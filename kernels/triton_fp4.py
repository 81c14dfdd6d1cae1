r"""FP4 linear on block-scaled tensor cores (Blackwell): NVFP4 and MXFP4, weight and activations.

    y = act( g · Σ_k (cx · sx)[m, k] · (cw · sw)[n, k] + Σ_r h[m, r] · up[n, r] + bias[n] ),      h = x · downᵀ

| tensor     | shape, dtype                                         |                                                  |
|------------|------------------------------------------------------|--------------------------------------------------|
| cx, cw     | (M, K/2), (N, K/2) uint8                             | e2m1 pairs, even column in the low nibble        |
| sx, sw     | (⌈M/128⌉, ⌈K/4block⌉, 32, 4, 4) e4m3 or e8m0 uint8   | block 16 or 32, in order of `layouts.py`       |
| g          | () or (N, 1) float32, or None                        | global scale of the weight                       |
| h, up      | (M, R), (N, R) 16-bit, or None                       | low rank, added in the float32 accumulator       |
| bias       | (N,) 16-bit, or None                                 |                                                  |

Operands arrive by the tensor memory accelerator, which fills what lies beyond M, N or K with zeros; the product is
`tl.dot_scaled`: OMMA on sm_120 and 121, tcgen05 with tensor memory on sm_100, 103 and 110. Below compute capability
10.0 the same call would fall back to 16-bit products with thousands of spilled bytes, so that the kernel is never
offered there. The order of scales follows Triton's tutorial on block-scaled products,
https://triton-lang.org/main/getting-started/tutorials/
"""

__all__ = ["aot_cases", "configure", "fp4_gemm", "fp4_tile", "linear", "operands"]

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qgen.kernels import tuning
from qgen.kernels.aot_case import AotCase, Target
from qgen.kernels.fusion import ACTIVATIONS, Heads
from qgen.kernels.layouts import HADAMARDS, round_up, swizzle_scales, unswizzle_scales
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots
from qgen.kernels.triton_act import Activations, quantize_act
from qgen.kernels.triton_linear import READS, activate, heads_arguments, norm_and_rotate, tile_of
from qgen.kernels.tuning import Launch, capability_of

BLOCKS = {"nvfp4": 16, "mxfp4": 32}
GROUP = 8  # rows of tiles that run together, so that the tiles of the weight stay in the L2 cache
ACTS = {"nvfp4": "nvfp4_dynamic", "mxfp4": "mxfp4"}


@triton.jit
def fp4_tile(
    CX, SX, CW, SW, H, UP, BIAS, GLOBAL, pm, pn, M, N, K,
    R: tl.constexpr, RP: tl.constexpr, GLOBAL_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tile (pm, pn) of y, float32 (BM, BN). CX, SX, CW, SW are tensor descriptors, H (M, RP), UP, BIAS, GLOBAL pointers."""
    SM: tl.constexpr = BM // 128
    SN: tl.constexpr = BN // 128
    SK: tl.constexpr = BK // (4 * BLOCK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        x = CX.load([pm * BM, k * (BK // 2)])
        w = CW.load([pn * BN, k * (BK // 2)])
        sx = SX.load([pm * SM, k * SK, 0, 0])
        sw = SW.load([pn * SN, k * SK, 0, 0])
        sx = tl.reshape(tl.trans(tl.reshape(sx, (SM, SK, 32, 4, 4)), (0, 3, 2, 1, 4)), (BM, BK // BLOCK))
        sw = tl.reshape(tl.trans(tl.reshape(sw, (SN, SK, 32, 4, 4)), (0, 3, 2, 1, 4)), (BN, BK // BLOCK))
        acc = tl.dot_scaled(x, sx, "e2m1", w.T, sw, "e2m1", acc)
    rm = (pm * BM + tl.arange(0, BM)).to(tl.int64)
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    if GLOBAL is not None:
        if GLOBAL_ROWS:
            acc *= tl.load(GLOBAL + rn, mask=rn < N, other=0.0)[None, :]
        else:
            acc *= tl.load(GLOBAL)
    if H is not None:
        rr = tl.arange(0, RP)
        h = tl.load(H + rm[:, None] * RP + rr[None, :], mask=(rm < M)[:, None], other=0.0)
        up = tl.load(UP + rn[None, :] * R + rr[:, None], mask=(rn < N)[None, :] & (rr < R)[:, None], other=0.0)
        acc = tl.dot(h, up.to(h.dtype), acc, input_precision="tf32x3")
    if BIAS is not None:
        acc += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    return activate(acc, ACTIVATION)


@triton.jit
def _fp4_gemm(
    CX, SX, CW, SW, H, UP, BIAS, GLOBAL, Y, gamma, cos, sin, M, N, K, columns, length, eps,
    R: tl.constexpr, RP: tl.constexpr, GLOBAL_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    DIM: tl.constexpr, HALVES: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y, a tensor descriptor. DIM: size of the heads to prepare (`triton_linear.norm_and_rotate`), 0 for none."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = fp4_tile(
        CX, SX, CW, SW, H, UP, BIAS, GLOBAL, pm, pn, M, N, K, R, RP, GLOBAL_ROWS, ACTIVATION, BLOCK, BM, BN, BK
    )
    if DIM > 0:
        acc = norm_and_rotate(acc, gamma, cos, sin, pm, pn, columns, length, eps, DIM, HALVES, BM, BN)
    Y.store([pm * BM, pn * BN], acc.to(Y.dtype))


def configure(capability: tuple[int, int] | None, m: int = tuning.LARGE) -> Launch:
    """Tile and pipeline for M = m rows on a card. Scales lie in tiles of 128 rows, so that no tile is lower."""
    return tuning.launch("fp4", capability, m)


def fp4_gemm(
    act: Activations,
    cw: Tensor,
    sw: Tensor,
    global_scale: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    config: Launch | None = None,
    heads: Heads | None = None,
) -> Tensor:
    """The product described at the top of this file, (M, N) in `dtype`. K must be a multiple of 32, N of 8.

    act: what `qgen.kernels.triton_act.quantize_act` returned for the format that belongs to the weight's; with `h` if
    there is `up`. activation: one of `fusion.ACTIVATIONS`. config: instead of `configure`'s. heads: what to do with q and k.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activations of the epilogue are {', '.join(ACTIVATIONS)}, found {activation!r}")
    m, n = act.m, cw.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=cw.device)
    c = config or configure(capability_of(cw.device), m)
    if heads is not None and c.bn % heads.dim:
        raise ValueError(f"q and k are prepared in heads of a power of two, up to {c.bn}; found {heads.dim}")
    grid = (triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn),)
    if m == 0:
        return y
    with torch.cuda.device_of(cw):
        _fp4_gemm[grid](
            **operands(act, cw, sw, global_scale, up, bias, c), Y=TensorDescriptor.from_tensor(y, [c.bm, c.bn]),
            **heads_arguments(heads), M=m, ACTIVATION=activation, GROUP=GROUP, **c.options,
        )  # fmt: skip
    return y


def operands(
    act: Activations,
    cw: Tensor,
    sw: Tensor,
    global_scale: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    c: Launch,
) -> dict:
    """The arguments of `fp4_tile` but M and ACTIVATION, for the tile of launch c."""
    n, half = cw.shape
    block = 16 if sw.dtype == torch.float8_e4m3fn else 32

    def tiles(scales: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(
            scales.flatten(2).unflatten(2, (2, 256)), [rows, c.bk // (4 * block), 2, 256]
        )

    return {
        "CX": TensorDescriptor.from_tensor(act.codes, [c.bm, c.bk // 2]), "SX": tiles(act.scales, c.bm // 128),
        "CW": TensorDescriptor.from_tensor(cw, [c.bn, c.bk // 2]), "SW": tiles(sw, c.bn // 128),
        "H": None if up is None else act.h, "UP": up, "BIAS": bias, "GLOBAL": global_scale, "N": n, "K": 2 * half,
        "R": 0 if up is None else up.shape[1], "RP": 0 if up is None else act.h.shape[1],
        "GLOBAL_ROWS": global_scale is not None and global_scale.numel() > 1, "BLOCK": block, "BM": c.bm, "BN": c.bn,
        "BK": c.bk,
    }  # fmt: skip


def linear(x: Tensor, slots: Slots) -> Tensor:
    """The op `qgen::linear` for packed slots: two launches, activations and product. See `reference.linear`."""
    return _multiply(x, _quantize(x, slots), slots)


def _quantize(x: Tensor, slots: Slots) -> Activations:
    """The first launch; layers with a common input and `down` may share what it makes."""
    unit = 4 * BLOCKS[slots.weight]
    rows = x.reshape(-1, x.shape[-1])
    kp = round_up(2 * slots.codes.shape[1], unit)
    return quantize_act(rows, slots.act, kp, slots.smooth, slots.shift, slots.down, slots.hadamard)


def _multiply(x: Tensor, a: Activations, slots: Slots) -> Tensor:
    y = fp4_gemm(a, slots.codes, slots.scales, slots.global_scale, slots.up, slots.bias, dtype=x.dtype)
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical slots to the layout of this kernel: only the scales change order."""
    return {**slots, "scales": swizzle_scales(slots["scales"])}


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    rows, half = slots["codes"].shape
    return {**slots, "scales": unswizzle_scales(slots["scales"], rows, 2 * half // BLOCKS[ask.weight])}


for _weight, _act in ACTS.items():
    register(
        Kernel(
            "linear",
            f"triton_{_weight}",
            Needs(
                devices=("cuda",),
                capability=((10, 0), (12, 1)),
                weights=(_weight,),
                acts=(_act,),
                dtypes=(torch.bfloat16, torch.float16),
                k_multiple=32,
                n_multiple=8,
                package="triton",
                refuses=frozenset({"static_act"}),
                hadamards=HADAMARDS,
            ),
            linear,
            priority=20,
            pack=pack,
            unpack=unpack,
            quantize=_quantize,
            multiply=_multiply,
            reads=READS,
        )
    )


def aot_cases() -> list[AotCase]:
    """NVFP4 and MXFP4 with every extra for each Blackwell target, and proof that older compilers' targets refuse NVFP4."""
    cases = []
    for name, block in BLOCKS.items():
        for family, ccs in ((100, (100, 103, 110)), (120, (120, 121))):
            targets = tuple(("cuda", cc) for cc in ccs)
            cases.append(_case(f"linear/{name}_sm{family}", block, configure((family // 10, 0)), targets))
    refused = _case("linear/nvfp4_refused", 16, configure((12, 0)), (("cuda", 80), ("cuda", 86)))
    return [*cases, replace(refused, raises="fp8e4nv", require={}, forbid={}, macs={}, tile=None)]


def _case(name: str, block: int, c: Launch, targets: tuple[Target, ...]) -> AotCase:
    scale = "fp8e4nv" if block == 16 else "u8"
    scales = "tensordesc<%s[%d,%d,2,256]>"
    depth = c.bk // (4 * block)
    on_120 = {"require": r"OMMA\.SF\.16864\S*" + (r"UE4M3\.4X" if block == 16 else r"\.E8"), "forbid": r"\bQMMA"}
    on_100 = {"require": r"UTCOMMA\.(4X|BLOCK16)" if block == 16 else "UTCOMMA", "forbid": r"UTCQMMA|\b[HQI]MMA"}
    promise = on_120 if targets[0][1] >= 120 else on_100
    return AotCase(
        name,
        _fp4_gemm,
        signature={
            "CX": f"tensordesc<u8[{c.bm},{c.bk // 2}]>",
            "SX": scales % (scale, c.bm // 128, depth),
            "CW": f"tensordesc<u8[{c.bn},{c.bk // 2}]>",
            "SW": scales % (scale, c.bn // 128, depth),
            "Y": f"tensordesc<bf16[{c.bm},{c.bn}]>",
            **dict.fromkeys(("H", "UP", "BIAS"), "*bf16"),
            "GLOBAL": "*fp32",
            **dict.fromkeys(("M", "N", "K", "columns", "length"), "i32"),
            "eps": "fp32",
        },
        constexprs={
            "R": 32, "RP": 32, "GLOBAL_ROWS": False, "ACTIVATION": "none", "DIM": 0, "HALVES": False, "BLOCK": block,
            "gamma": None, "cos": None, "sin": None,
            "BM": c.bm, "BN": c.bn, "BK": c.bk, "GROUP": GROUP,
        },
        divisible=("H", "UP", "BIAS", "GLOBAL", "N", "K"),
        options={"num_warps": c.warps, "num_stages": c.stages},
        targets=targets,
        require={None: (promise["require"], r"cp\.async\.bulk\.tensor")},
        forbid={None: (promise["forbid"],)},
        efficiency={None: 0.9, ("cuda", 103): 0.6},  # 103 multiplies faster than four warps issue this loop
        macs={"fp4": c.bm * c.bn * c.bk},
        tile=(c.bm, c.bn),
    )  # fmt: skip
