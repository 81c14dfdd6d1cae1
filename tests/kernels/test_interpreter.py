"""The corrected interpreter against torch: every cast, dots of every operand type, bfloat16 arithmetic, scaled dots,
assembly.

The last tests pin what is wrong in the interpreter as released: when one fails, a correction is no longer needed and
should go.
"""

# ruff: noqa: E402 - nothing that defines a kernel is imported before the interpreter is corrected
import subprocess
import sys

import interpreter
import numpy as np
import pytest
import torch

interpreter.needed()

import triton
import triton.language as tl

FLOATS = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
LIMIT = {"e4m3": 448.0, "e5m2": 57344.0}


@triton.jit
def _cast(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _dot(a, b, c, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    rm, rn, rk = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    x = tl.load(a + rm[:, None] * k + rk[None, :])
    w = tl.load(b + rk[:, None] * n + rn[None, :])
    out = tl.dot(x, w, out_dtype=c.dtype.element_ty)
    tl.store(c + rm[:, None] * n + rn[None, :], out)


@triton.jit
def _arithmetic(a, b, out, less, n: tl.constexpr):
    i = tl.arange(0, n)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x * y)
    tl.store(out + n + i, x + y)
    tl.store(out + 2 * n + i, x - y)
    tl.store(out + 3 * n + i, tl.maximum(x, y))
    tl.store(out + 4 * n + i, tl.abs(x))
    tl.store(out + 5 * n + i, -x)
    tl.store(out + 6 * n + i, x * 1.5)
    tl.store(out + 7 * n + i, tl.where(x < y, x, y))
    tl.store(less + i, (x < y).to(tl.int8))


@triton.jit
def _reduce(a, out, m: tl.constexpr, n: tl.constexpr):
    rm, rn = tl.arange(0, m), tl.arange(0, n)
    x = tl.load(a + rm[:, None] * n + rn[None, :])
    tl.store(out + rm, tl.max(x, 1))
    tl.store(out + m + rm, tl.min(x, 1))


@triton.jit
def _fma(a, b, c, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))


@triton.jit
def _scaled(a, sa, b, sb, out, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, g: tl.constexpr):
    rm, rn = tl.arange(0, m), tl.arange(0, n)
    rk, rg = tl.arange(0, k // 2), tl.arange(0, k // g)
    x = tl.load(a + rm[:, None] * (k // 2) + rk[None, :])
    w = tl.load(b + rn[None, :] * (k // 2) + rk[:, None])
    xs = tl.load(sa + rm[:, None] * (k // g) + rg[None, :])
    ws = tl.load(sb + rn[:, None] * (k // g) + rg[None, :])
    tl.store(out + rm[:, None] * n + rn[None, :], tl.dot_scaled(x, xs, "e2m1", w, ws, "e2m1"))


ASM = tl.constexpr("mov.b32 $0,   $1;\n")


@triton.jit
def _asm(a, out, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.inline_asm_elementwise(ASM, "=r,r", [tl.load(a + i)], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, x)


def values(name):
    """All codes of narrow formats; for wide ones a spread of magnitudes, ties between neighbours of every narrower format, extremes."""
    dtype = FLOATS[name]
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        return bits[bits.isfinite()][:32768]
    magnitudes = torch.randn(12288) * torch.exp2(torch.randint(-20, 20, (12288,)).float())
    grids = [torch.arange(256, dtype=torch.uint8).view(FLOATS[name]).float() for name in LIMIT]
    ties = [(grid + grid.roll(-1)) / 2 for grid in grids]
    edges = torch.tensor([0.0, -0.0, 448.0, 464.0, 465.0, 500.0, 1e6, -1e6, 1.99, 65504.0, 65520.0, 1e-8, 3e38, -3e38])
    bf16_ties = torch.arange(2048, dtype=torch.int32).mul(0x8000).add(0x3F800000).view(torch.float32)
    everything = torch.cat([magnitudes, *[t[t.isfinite()] for t in ties], edges, bf16_ties])
    return everything.flip(0)  # the caller keeps a power of two from the front


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_cast(source, target):
    x = values(source)
    n = 1 << (x.numel().bit_length() - 1)
    x = x[:n].clone()
    y = torch.empty(n, dtype=FLOATS[target])
    _cast[(1,)](x, y, n)
    want = x.float().clamp(-LIMIT[target], LIMIT[target]) if target in LIMIT and source != target else x
    want = want.to(FLOATS[target])
    nan = want.float().isnan()
    assert torch.equal(y.float().isnan(), nan)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.element_size()]
    assert torch.equal(y.view(width)[~nan], want.view(width)[~nan])


@pytest.mark.parametrize("target", ["f32", "f16", "bf16"])  # Triton has no cast between integers and 8-bit floats
@pytest.mark.parametrize("source", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_integer_to_float(source, target):
    x = torch.arange(-128, 128).to(source) if source.is_signed else torch.arange(256).to(source)
    y = torch.empty(256, dtype=FLOATS[target])
    _cast[(1,)](x, y, 256)
    assert torch.equal(y.float(), x.float().to(FLOATS[target]).float())


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_float_to_integer_truncates(source):
    x = (torch.arange(256).float() * 0.99 - 126.7).to(FLOATS[source])
    y = torch.empty(256, dtype=torch.int32)
    _cast[(1,)](x, y, 256)
    assert torch.equal(y, x.float().trunc().to(torch.int32))


@pytest.mark.parametrize("name", [*FLOATS, "int8"])
def test_dot(name):
    m, n, k = 16, 32, 64
    if name == "int8":
        a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (k, n), dtype=torch.int8)
        out, want = torch.empty(m, n, dtype=torch.int32), (a.long() @ b.long()).int()
    else:
        a, b = torch.randn(m, k).to(FLOATS[name]), torch.randn(k, n).to(FLOATS[name])
        out, want = torch.empty(m, n), (a.double() @ b.double()).float()
    _dot[(1,)](a, b, out, m, n, k)
    assert torch.equal(out, want) if name == "int8" else torch.allclose(out, want, rtol=1e-5, atol=1e-5)


def test_long_integer_dot_is_exact():
    m, n, k = 16, 16, 2048
    a, b = torch.full((m, k), -128, dtype=torch.int8), torch.full((k, n), -127, dtype=torch.int8)
    out = torch.empty(m, n, dtype=torch.int32)
    _dot[(1,)](a, b, out, m, n, k)
    assert torch.equal(out, torch.full((m, n), 128 * 127 * k, dtype=torch.int32))


def test_bfloat16_arithmetic():
    n = 1024
    a, b = torch.randn(n).bfloat16(), torch.randn(n).bfloat16()
    out, less = torch.empty(8, n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int8)
    _arithmetic[(1,)](a, b, out, less, n)
    want = torch.stack([a * b, a + b, a - b, torch.maximum(a, b), a.abs(), -a, a * 1.5, torch.where(a < b, a, b)])
    assert torch.equal(out, want)
    assert torch.equal(less.bool(), a < b)


def test_bfloat16_reductions():
    x = torch.randn(16, 64).bfloat16()
    out = torch.empty(2, 16, dtype=torch.bfloat16)
    _reduce[(1,)](x, out, 16, 64)
    assert torch.equal(out, torch.stack([x.amax(1), x.amin(1)]))


def test_fma_rounds_once():
    a = torch.full((16,), 1.0 + 2.0**-12)
    out = torch.empty(16)
    _fma[(1,)](a, a, -torch.ones(16), out, 16)
    assert torch.equal(out, torch.full((16,), 2.0**-11 + 2.0**-24))  # two roundings lose the last term


@pytest.mark.parametrize("block", [16, 32], ids=["e4m3", "e8m0"])
def test_scaled_dot(block):
    from qgen import formats

    m, n, k = 16, 32, 128
    fmt = formats.get("nvfp4_dynamic" if block == 16 else "mxfp4")
    a, b = fmt.quantize(torch.randn(m, k)), fmt.quantize(torch.randn(n, k))
    out = torch.empty(m, n)
    _scaled[(1,)](a.codes, a.scales, b.codes, b.scales, out, m, n, k, block)
    assert torch.allclose(out, a.dequantize() @ b.dequantize().T, rtol=1e-5, atol=1e-5)


def test_assembly_runs_its_registered_model():
    x, out = torch.arange(16, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="no numpy model"):
        _asm[(1,)](x, out, 16)
    interpreter.register_asm("mov.b32 $0, $1;", lambda a: (a + 1,))
    _asm[(1,)](x, out, 16)
    assert torch.equal(out, x + 1)


def test_launches_are_counted():
    x = torch.zeros(16)
    with interpreter.launches() as names:
        _cast[(1,)](x, x.clone(), 16)
        _cast[(2,)](x, x.clone(), 16)
    assert names == ["_cast", "_cast"]


STOCK = """
import torch, triton, triton.language as tl
@triton.jit
def cast(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))
@triton.jit
def product(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i) * tl.load(x + i))
@triton.jit
def asm(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tl.load(x + i)], dtype=tl.int32, is_pure=True, pack=1))
def right(name):
    if name == "bf16_cast":
        x, dtype = torch.tensor([1.0078125 - 2.0**-12] * 16), torch.bfloat16
    elif name == "fp8_carry":
        x, dtype = torch.full((16,), 1.99), torch.float8_e4m3fn
    else:
        x, dtype = torch.full((16,), 1.5).bfloat16(), torch.bfloat16
    y = torch.zeros(16, dtype=dtype)
    if name == "bf16_product":
        product[(1,)](x, y, 16)
        return torch.equal(y, x * x)
    if name == "assembly":
        i = torch.arange(16, dtype=torch.int32); o = torch.zeros_like(i)
        try:
            asm[(1,)](i, o, 16)
        except Exception:
            return False
        return torch.equal(i, o)
    cast[(1,)](x, y, 16)
    return torch.equal(y.float(), x.to(dtype).float())
"""


@pytest.mark.parametrize("name", ["bf16_cast", "fp8_carry", "bf16_product", "assembly"])
def test_correction_is_still_needed(name, tmp_path):
    """When this fails, the Triton that is installed does it right by itself: drop the correction from interpreter.py."""
    program = tmp_path / "stock.py"
    program.write_text(STOCK + f"\nprint('right' if right({name!r}) else 'wrong')\n")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "wrong", f"triton {triton.__version__}: {done.stdout} {done.stderr[-500:]}"


def test_models_must_give_the_promised_type():
    x, out = torch.arange(16, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    interpreter.register_asm("mov.b32 $0, $1;", lambda a: (a.astype(np.int64),))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int64"):
        _asm[(1,)](x, out, 16)
