r"""Block Hadamard transform of activations, y = x H per block of K, with H symmetric or not and orthonormal.

Powers of two are Sylvester's construction, entry (i, j) = (−1)^popcount(i & j) / √size: the kernel computes the signs
and multiplies on tensor cores. Signs are exact in bfloat16 and x is the sum of three bfloat16 parts, so that the
result is as good as a float32 product. Other sizes, 12 · 2^p, 20 · 2^p, 28 · 2^p, 36 · 2^p, …, are a Kronecker
product with one of Paley's constructions, of order q + 1 for a prime q ≡ 3 (mod 4) or 2 (q + 1) for a prime q ≡ 1 (mod 4); they are
transformed by a matrix that the kernel reads.

`rotate` is the part that other kernels call on a tile in their registers, no launch of its own: the activation kernel
on its input, for powers of two from 16 to 256, and attention's preparation on q and k, for powers of two that divide
the head dimension. `hadamard` is the transform alone, one launch, for all sizes; sizes that are no power of two exist
only so. Paley, On orthogonal matrices, 1933, https://doi.org/10.1002/sapm1933121311
"""

__all__ = ["aot_cases", "hadamard", "matrix", "rotate", "sizes"]

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgen.kernels import tuning
from qgen.kernels.aot_case import AotCase

# Order to the prime it is made from; each once, doubles are Kronecker products. 28 and 36 are of the second construction.
PALEY = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43, 60: 59}
LARGEST = 512


def sizes() -> tuple[int, ...]:
    """All sizes that `hadamard` serves, in ascending order."""
    found = {2**p for p in range(1, 10)} | {order << p for order in PALEY for p in range(6)}
    return tuple(sorted(n for n in found if n <= LARGEST))


def matrix(size: int) -> Tensor:
    """The orthonormal Hadamard matrix (size, size) float64 on the CPU; ValueError if no construction here gives that size."""
    if size not in sizes():
        raise ValueError(f"Hadamard matrices are known here for the sizes {', '.join(map(str, sizes()))}; found {size}")
    order, doublings = size, 0
    while order % 2 == 0 and order not in PALEY:
        order, doublings = order // 2, doublings + 1
    h = torch.ones(1, 1, dtype=torch.float64) if order == 1 else _paley(PALEY[order])
    for _ in range(doublings):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / size**0.5


def _paley(q: int) -> Tensor:
    """With Q[i, j] the quadratic character of j − i modulo q: I + S for S = [[0, 1], [−1, Q]] where q ≡ 3 (mod 4), else
    S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] for S = [[0, 1], [1, Q]]."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:] = 1
    s[1:, 0] = 1 if q % 4 == 1 else -1
    s[1:, 1:] = character[(i[None, :] - i[:, None]) % q]
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return one + s
    a, b = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(s, a) + torch.kron(one, b)


@triton.constexpr_function
def log2(size):
    """Exponent of a power of two."""
    return size.bit_length() - 1


@lru_cache(maxsize=16)
def _padded_matrix(size: int, device: torch.device) -> Tensor:
    """Signs of `matrix`, float32 (P, P) with P the next power of two; zeros around."""
    padded = triton.next_power_of_2(size)
    h = torch.zeros(padded, padded, device=device)
    h[:size, :size] = matrix(size).sign()
    return h


@triton.jit
def rotate(x, BM: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr):
    """Tile x (BM, BK) float32 times the Sylvester-Hadamard matrix of SIZE in each block of SIZE columns: log₂ SIZE
    rounds of sums and differences, whose pairs lie 1, 2, 4, … columns apart."""
    ROUNDS: tl.constexpr = log2(SIZE)
    for i in tl.static_range(ROUNDS):
        x = _butterfly(x, BM, BK, 2**i)
    return x * (SIZE**-0.5)


@triton.jit
def _butterfly(x, BM: tl.constexpr, BK: tl.constexpr, APART: tl.constexpr):
    """Columns a and b = a + APART become a + b and a − b."""
    pairs = tl.permute(tl.reshape(x, (BM, BK // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (BM, BK))


@triton.jit
def product(x, h, PRECISION: tl.constexpr):
    """x h in float32 precision for an h that bfloat16 holds exactly: x is three bfloat16 parts, 24 bits together."""
    if PRECISION == "bf16x3":
        h16 = h.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, h16, tl.dot(middle, h16, tl.dot(low, h16)))
    return tl.dot(x, h, input_precision=PRECISION)


@triton.jit
def _hadamard(
    x, h, y, M, BLOCKS, SIZE, scale, stride_x, stride_y, BM: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr
):
    """One program: BM blocks of SIZE columns; block b of row m is number m · BLOCKS + b. h (P, P) of signs and zeros, or None."""
    block = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row, col = block // BLOCKS, (block % BLOCKS) * SIZE
    i = tl.arange(0, P)
    keep = (row < M)[:, None] & (i < SIZE)[None, :]
    t = tl.load(x + (row * stride_x + col)[:, None] + i[None, :], mask=keep, other=0.0).to(tl.float32)
    if h is None:  # noqa: SIM108 - Triton compiles one of the branches
        t = rotate(t, BM, P, P)
    else:
        t = product(t, tl.load(h + i[:, None] * P + i[None, :]), PRECISION) * scale
    tl.store(y + (row * stride_y + col)[:, None] + i[None, :], t.to(y.dtype.element_ty), mask=keep)


def precision(capability: tuple[int, int] | str | None) -> str:
    """How float32 products are computed: three products on NVIDIA's tensor cores, plain float32 elsewhere."""
    return "bf16x3" if isinstance(capability, tuple) else "ieee"


def hadamard(x: Tensor, size: int) -> Tensor:
    """x (…, K) times the Hadamard matrix of `size` in each block of `size` columns; result in x's dtype, x untouched.

    Raises ValueError if `size` does not divide K or no construction gives it.
    """
    if size not in sizes() or x.shape[-1] % size:
        raise ValueError(
            f"a block Hadamard needs one of the sizes {sizes()} that divides K, found {size} for K={x.shape[-1]}"
        )
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    m, k = rows.shape
    if m == 0:
        return y.view(x.shape)
    capability = tuning.capability_of(x.device)
    config = tuning.launch("hadamard", capability, m)
    computed = size & (size - 1) == 0 and 16 <= size <= 256
    h = None if computed else _padded_matrix(size, x.device)
    padded = max(16, triton.next_power_of_2(size))
    if h is not None and h.shape[0] < padded:
        h = torch.nn.functional.pad(h, (0, padded - h.shape[0]) * 2)
    blocks = k // size
    grid = (triton.cdiv(m * blocks, config.bm),)
    with torch.cuda.device_of(x):
        _hadamard[grid](
            rows, h, y, m, blocks, size, size**-0.5, rows.stride(0), k, BM=config.bm, P=padded,
            PRECISION=precision(capability), **config.options,
        )  # fmt: skip
    return y.view(x.shape)


def aot_cases() -> list[AotCase]:
    """The computed transform of 64 columns and the read one of 48."""
    targets = (*(("cuda", cc) for cc in (80, 86, 89, 90, 100, 120)), ("hip", "gfx942"))
    config = tuning.launch("hadamard", None, 4096)
    cases = []
    for size, h in ((64, None), (48, "*fp32")):
        signature = {
            "x": "*bf16",
            "y": "*bf16",
            **dict.fromkeys(("M", "BLOCKS", "SIZE", "stride_x", "stride_y"), "i32"),
        }
        signature["scale"] = "fp32"
        constexprs = {"BM": config.bm, "P": 64}
        if h is None:
            constexprs["h"] = None
        else:
            signature["h"] = h
        for name, some in (("bf16x3", targets[:-1]), ("ieee", targets[-1:])):
            cases.append(
                AotCase(
                    f"hadamard/{size}_{name}",
                    _hadamard,
                    signature=signature,
                    constexprs={**constexprs, "PRECISION": name},
                    divisible=tuple(n for n in signature if n not in ("M", "BLOCKS", "scale")),
                    options=config.options,
                    targets=some,
                )
            )
    return cases
