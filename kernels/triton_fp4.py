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

__all__ = ["aot_cases", "configure", "fp4_gemm", "linear"]

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qgen.kernels import tuning
from qgen.kernels.aot_case import AotCase, Target
from qgen.kernels.layouts import round_up, swizzle_scales, unswizzle_scales
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.triton_act import Activations, quantize_act
from qgen.kernels.tuning import Launch, capability_of

BLOCKS = {"nvfp4": 16, "mxfp4": 32}
GROUP = 8  # rows of tiles that run together, so that the tiles of the weight stay in the L2 cache
ACTS = {"nvfp4": "nvfp4_dynamic", "mxfp4": "mxfp4"}


@triton.jit
def _fp4_gemm(
    CX, SX, CW, SW, H, UP, BIAS, GLOBAL, Y, M, N, K,
    R: tl.constexpr, RP: tl.constexpr, GLOBAL_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """CX, SX, CW, SW, Y are tensor descriptors; H, UP, BIAS, GLOBAL pointers or None. RP: columns of H."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP  # GROUP rows of tiles at a time, so that the weight's tiles stay in L2
    height = min(tiles_m - first, GROUP)
    pm = first + pid % (GROUP * tiles_n) % height
    pn = pid % (GROUP * tiles_n) // height
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
    if ACTIVATION == "gelu_tanh":
        inner = 1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)  # gelu(x) = x · sigmoid(2 √(2/π) (x + …))
        acc = acc * tl.sigmoid(inner)
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    Y.store([pm * BM, pn * BN], acc.to(Y.dtype))


# With tensor memory four warps suffice and two programs share a multiprocessor, so that one's epilogue overlaps the
# other's loop (108 KiB and 256 columns each). On GeForce eight warps of 147 registers run at a time, with 54 KiB.
# None spills.
tuning.TABLE["fp4", "any"] = ((tuning.LARGE, Launch(128, 128, 256, 4, 3)),)
tuning.TABLE["fp4", "sm_120"] = ((tuning.LARGE, Launch(128, 128, 128, 8, 4)),)


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
    activation: str = "",
    dtype: torch.dtype = torch.bfloat16,
    config: Launch | None = None,
) -> Tensor:
    """The product described at the top of this file, (M, N) in `dtype`. K must be a multiple of 32, N of 8.

    act: what `qgen.kernels.triton_act.quantize_act` returned for the format that belongs to the weight's; with `h` if
    there is `up`. activation: "", "gelu_tanh" or "silu". config: instead of `configure`'s.
    """
    if activation not in ("", "gelu_tanh", "silu"):
        raise ValueError(f"an epilogue computes gelu_tanh or silu, found {activation!r}")
    m, (n, half) = act.m, cw.shape
    block = 16 if sw.dtype == torch.float8_e4m3fn else 32
    y = torch.empty(m, n, dtype=dtype, device=cw.device)
    c = config or configure(capability_of(cw.device), m)
    grid = (triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn),)
    if m == 0:
        return y

    def tiles(scales: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(
            scales.flatten(2).unflatten(2, (2, 256)), [rows, c.bk // (4 * block), 2, 256]
        )

    with torch.cuda.device_of(cw):
        _fp4_gemm[grid](
            TensorDescriptor.from_tensor(act.codes, [c.bm, c.bk // 2]),
            tiles(act.scales, c.bm // 128),
            TensorDescriptor.from_tensor(cw, [c.bn, c.bk // 2]),
            tiles(sw, c.bn // 128),
            act.h, up, bias, global_scale,
            TensorDescriptor.from_tensor(y, [c.bm, c.bn]),
            m, n, 2 * half,
            R=0 if up is None else up.shape[1],
            RP=0 if up is None else act.h.shape[1],
            GLOBAL_ROWS=global_scale is not None and global_scale.numel() > 1,
            ACTIVATION=activation, BLOCK=block, BM=c.bm, BN=c.bn, BK=c.bk, GROUP=GROUP, **c.options,
        )  # fmt: skip
    return y


def linear(
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
) -> Tensor:
    """The op `qgen::linear` for packed slots: two launches, activations and product. See `reference.linear`."""
    unit = 4 * BLOCKS[weight_format]
    rows = x.reshape(-1, x.shape[-1])
    kp = round_up(2 * codes.shape[1], unit)
    quantized = quantize_act(rows, act, kp, smooth, shift, down, hadamard)
    y = fp4_gemm(quantized, codes, scales, global_scale, up, bias, dtype=x.dtype)
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
            ),
            linear,
            priority=20,
            pack=pack,
            unpack=unpack,
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
            **dict.fromkeys("MNK", "i32"),
        },
        constexprs={
            "R": 32, "RP": 32, "GLOBAL_ROWS": False, "ACTIVATION": "", "BLOCK": block,
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
