"""Codes of the activation kernel, bit for bit against the reference; its low-rank product and producers against
torch."""

import interpreter
import numpy as np
import pytest
import torch
from torch.nn import functional as F

interpreter.needed()

import triton
import triton.language as tl

from qgen import formats
from qgen.kernels import layouts, reference, triton_act
from qgen.kernels.triton_act import ACTS, quantize_act
from qgen.kernels.triton_producers import Producer

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 64), (63, 200), (200, 96), (333, 256)]


def canonical(out, act, m, k):
    """(codes, scales, zeros) of the kernel in the reference's order, padding cut off."""
    if act == "int8_row":
        return layouts.codes_from_groups(out.codes.view(torch.uint8), 8)[:, :k], out.scales[:, None], None
    if act in ("nvfp4_dynamic", "mxfp4"):
        block = formats.get(act).block
        return out.codes[:m, : k // 2], layouts.unswizzle_scales(out.scales, m, k // block), None
    return layouts.codes_from_groups(out.codes, 4)[:, : k // 2], out.scales[: k // 64].T, out.zeros


def check(x, act, smooth=None, shift=None, down=None, extra=0):
    """Quantizes x and compares everything with the reference, exactly."""
    m, k = x.shape
    kp = layouts.round_up(k, 128)
    before = x.clone()
    out = quantize_act(x, act, kp + extra, smooth, shift, down)
    assert torch.equal(x, before)
    want = reference.quantize_act(reference.transform_act(x, kp, smooth, shift, 0), act)
    codes, scales, zeros = canonical(out, act, m, kp)
    assert torch.equal(codes, want.codes)
    assert torch.equal(scales.float(), want.scales.float())
    if want.zero is not None:
        assert torch.equal(zeros[:, : kp // 64], want.zero)
    if extra:  # what is padded counts for nothing
        rest = out.codes[kp // 64 :] if out.codes.ndim == 3 else out.codes[:, kp // 2 :]
        assert not rest.any()
    return out


@pytest.mark.parametrize(("m", "k"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("act", ACTS)
def test_codes(act, m, k):
    for dtype in DTYPES:
        x = (torch.randn(m, k) * 3).to(dtype)
        check(x, act, torch.rand(k).add(0.5).to(dtype))


@pytest.mark.parametrize("shift", ["scalar", "row"])
@pytest.mark.parametrize("act", ACTS)
def test_codes_with_shift_and_padding(act, shift):
    x = torch.randn(63, 200).bfloat16()
    offset = torch.tensor(0.171875) if shift == "scalar" else torch.randn(200)
    check(x, act, torch.rand(200).add(0.5).bfloat16(), offset.bfloat16(), extra=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_codes_of_awkward_rows(act, dtype):
    big = 6e4 if dtype == torch.float16 else 1e38 if act == "uint4_g64" else 3e38  # there max − min must be finite
    x = torch.randn(8, 256).to(dtype)
    x[0] = 0
    x[1] = 1.25
    x[2] = -3
    x[3, :64] = 0
    x[4, 7] = big
    x[5] *= big / x[5].abs().max()
    x[6] *= 1e-4
    x[7] = -0.0
    check(x, act)


STATIC = ["int8_row", "int4_g64", "uint4p_g64", "uint4_g64"]


@pytest.mark.parametrize(("m", "k"), [(1, 64), (63, 200)], ids=lambda v: str(v))
@pytest.mark.parametrize("act", STATIC)
def test_codes_under_stored_scales(act, m, k):
    """Of one scale and of one per group; what they do not cover saturates; groups of scale 0 become 0."""
    kp = layouts.round_up(k, 64)
    for dtype in DTYPES:
        x = (torch.randn(m, k) * 3).to(dtype)
        x[m // 2, 0], x[m // 3, -1] = 6e4, -6e4
        smooth, down = torch.rand(k).add(0.5).to(dtype), torch.randn(16, k).to(dtype)
        for scale in (torch.tensor(0.03), torch.rand(kp // 64).add(0.1)):
            if scale.numel() > 1 and act == "int8_row":
                continue
            if scale.numel() > 1:
                scale[-1] = 0
            out = quantize_act(x, act, kp, smooth, torch.tensor(0.25).to(dtype), down, act_scale=scale)
            seen = reference.transform_act(x, kp, smooth, torch.tensor(0.25).to(dtype), 0)
            want = reference.quantize_act(seen, act, scale)
            codes, scales, zeros = canonical(out, act, m, kp)
            assert torch.equal(codes, want.codes)
            assert torch.equal(scales, want.scales.expand(m, -1))
            assert zeros is None or not zeros.any()
            assert torch.equal(out.h, quantize_act(x, None, kp, down=down).h)


@pytest.mark.parametrize(
    ("act", "scale", "message"),
    [
        ("int8_row", torch.ones(2), "takes one scale, found"),
        ("int4_g64", torch.ones(3), "takes one scale or 2, found"),
        ("mxfp4", torch.ones(()), "go with integers, found the format 'mxfp4'"),
        (None, torch.ones(()), "go with integers, found the format 'none'"),
    ],
)
def test_stored_scales_that_do_not_fit(act, scale, message):
    with pytest.raises(ValueError, match=message):
        quantize_act(torch.randn(2, 128).bfloat16(), act, 128, act_scale=scale)


def test_rows_may_lie_apart():
    x = torch.randn(63, 512).bfloat16()
    out, want = quantize_act(x[:, :256], "int8_row", 256), quantize_act(x[:, :256].contiguous(), "int8_row", 256)
    assert torch.equal(out.codes, want.codes)


def test_no_rows():
    out = quantize_act(torch.empty(0, 64).bfloat16(), "int4_g64", 64, down=torch.randn(16, 64).bfloat16())
    assert out.codes.shape == (1, 0, 32) and out.h.shape == (0, 16)


@pytest.mark.parametrize("rank", [1, 16, 20, 100])
@pytest.mark.parametrize("act", ["int8_row", "int4_g64", None])
def test_low_rank_product(act, rank):
    for dtype in DTYPES:
        x, down = torch.randn(63, 200).to(dtype), torch.randn(rank, 200).to(dtype)
        shift = torch.tensor(0.5).to(dtype)  # not seen by the low-rank branch
        h = quantize_act(x, act, 256, torch.rand(200).add(0.5).to(dtype), shift, down).h
        assert h.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert not h[:, rank:].any()
        want = x.float() @ down.float().T
        assert (h[:, :rank].float() - want).norm() <= (3e-3 if h.dtype == torch.bfloat16 else 1e-6) * want.norm()


def test_every_e2m1_code_and_midpoint():
    values = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5])
    near = torch.cat([values, values * (1 + 2**-8), values * (1 - 2**-8)])
    x = torch.cat([near, -near]).bfloat16()
    x = torch.cat([F.pad(part, (0, 31 - part.numel())) for part in x.split(31)]).view(-1, 31)
    x = torch.cat([x, torch.full((x.shape[0], 1), 6.0)], 1).bfloat16()  # so that the scale is 1
    x = F.pad(x, (0, 96))
    check(x, "mxfp4")
    y = torch.cat([x[:, :15], x[:, 31:32]], 1)
    check(F.pad(y, (0, 112)), "nvfp4_dynamic")


def test_e2m1_assembly_equals_plain_operations():
    element = formats.get("mxfp4").element

    def model(low, high):
        codes = [element.encode(torch.from_numpy(np.ascontiguousarray(v))).numpy() for v in (low, high)]
        return ((codes[0] | (codes[1] << 4)).astype(np.uint8),)

    interpreter.register_asm(triton_act.E2M1_ASM, model)
    x = (torch.randn(130, 256) * 3).bfloat16()
    for act in ("nvfp4_dynamic", "mxfp4"):
        plain, asm = quantize_act(x, act, 256, asm=False), quantize_act(x, act, 256, asm=True)
        assert torch.equal(plain.codes, asm.codes)


@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("act", ["int8_row", "int4_g64"])
def test_fused_hadamard(act, size):
    """Sums have another order than in the reference, so that a code at a tie may fall to the other side."""
    x, smooth = torch.randn(63, 200).bfloat16(), torch.rand(200).add(0.5).bfloat16()
    out = quantize_act(x, act, 256, smooth, hadamard=size)
    want = reference.quantize_act(reference.transform_act(x, 256, smooth, None, size), act)
    codes, scales, _ = canonical(out, act, 63, 256)
    assert torch.allclose(scales.float(), want.scales.float(), rtol=1e-2 if act == "int4_g64" else 1e-5)
    assert (codes != want.codes).float().mean() < 5e-3


PRODUCERS = ["layernorm", "layernorm_affine", "layernorm_adaln", "rmsnorm", "gelu_tanh", "silu", "silu_mul"]


@pytest.mark.parametrize("act", ["int8_row", "int4_g64"])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_producers(kind, act):
    """Against the unfused modules: float32 inside, one rounding to bf16 at the end."""
    m, k, images = 66, 200, 2
    x = (torch.randn(m, k) * 2 + 1).bfloat16()
    gamma, beta, gate = torch.randn(k).bfloat16(), torch.randn(k).bfloat16(), torch.randn(m, k).bfloat16()
    scale, shift = torch.randn(images, k).bfloat16(), torch.randn(images, k).bfloat16()
    per_row = lambda t: t.float().repeat_interleave(m // images, 0)  # noqa: E731
    norm = F.layer_norm(x.float(), (k,), eps=1e-6)
    made = {
        "layernorm": (Producer("layernorm"), norm),
        "layernorm_affine": (Producer("layernorm", gamma, beta), norm * gamma.float() + beta.float()),
        "layernorm_adaln": (
            Producer("layernorm", scale=scale, shift=shift),
            norm * (1 + per_row(scale)) + per_row(shift),
        ),
        "rmsnorm": (Producer("rmsnorm", gamma), F.rms_norm(x.float(), (k,), gamma.float(), 1e-6)),
        "gelu_tanh": (Producer("gelu_tanh"), F.gelu(x.float(), approximate="tanh")),
        "silu": (Producer("silu"), F.silu(x.float())),
        "silu_mul": (Producer("silu_mul", gate=gate), F.silu(x.float()) * gate.float()),
    }
    producer, unfused = made[kind]
    down = torch.randn(16, k).bfloat16()
    fused = quantize_act(x, act, 256, down=down, producer=producer)
    want = quantize_act(unfused.bfloat16(), act, 256, down=down)
    assert (fused.codes != want.codes).float().mean() < 1e-2
    assert torch.allclose(fused.scales, want.scales, rtol=1e-2)
    assert (fused.h.float() - want.h.float()).norm() < 5e-3 * want.h.float().norm()
    assert not fused.codes[3, :, 8:].any() if act == "int8_row" else True  # columns beyond K, whatever the norm adds


def test_producer_refusals():
    with pytest.raises(ValueError, match="producers are none, layernorm"):
        Producer("swish")
    with pytest.raises(ValueError, match="gate goes with the producer 'silu_mul'"):
        Producer("silu_mul")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3_g64", 64), "can be quantized to int8_row, int4_g64"),
        (("int8_row", 32), "multiple of 64, at least 64; found 32"),
        (("mxfp4", 64), "multiple of 128"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_act(torch.zeros(4, 64).bfloat16(), *arguments)


def test_refuses_long_ranks_and_odd_transforms():
    x = torch.zeros(4, 64).bfloat16()
    with pytest.raises(ValueError, match="rank 256, found 300"):
        quantize_act(x, "int8_row", 64, down=torch.zeros(300, 64).bfloat16())
    with pytest.raises(ValueError, match="power of two, 16 to 256, that divides 64; found 48"):
        quantize_act(x, "int8_row", 64, hadamard=48)
    with pytest.raises(ValueError, match="contiguous last axis"):
        quantize_act(torch.zeros(64, 4).bfloat16().T, "int8_row", 64)


@triton.jit
def _arithmetic(s, x, reciprocals, quotients, n: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(reciprocals + i, triton_act.reciprocal(tl.load(s + i)))
    tl.store(quotients + i, triton_act._divide(tl.load(x + i), C))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reciprocals_are_correctly_rounded(dtype):
    """All positive numbers of 16 bits, many of 32; float64 is exact enough to be the truth."""
    if dtype == torch.float32:  # noqa: SIM108
        s = torch.rand(32767) + 1
    else:
        s = torch.arange(1, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    s = s[s.isfinite() & (s.float() >= 2.0**-126) & (s.float() < 2.0**126)]
    s = F.pad(s, (0, 32768 - s.numel()), value=1.0)
    x = torch.randn(32768) * torch.exp2(torch.randint(-60, 60, (32768,)).float())
    r, q = torch.empty(32768), torch.empty(32768)
    for divisor in (7.0, 15.0, 6.0, 127.0):
        _arithmetic[(1,)](s, x, r, q, 32768, divisor)
        assert torch.equal(r, (1 / s.double()).float())
        assert torch.equal(q, (x.double() / divisor).float())


def test_reciprocal_survives_an_inexact_start():
    """The GPU's 1 / √s is good to two units in the last place; so is its square to five. The Newton step hides it."""
    s = np.arange(1024, 2048, dtype=np.float64) / 1024  # all significands of 11 bits
    for error in range(-8, 9):
        r = ((1 / s).astype(np.float32) * (1 + error * 2.0**-24)).astype(np.float32).astype(np.float64)
        rest = (1 - s * r).astype(np.float32).astype(np.float64)  # the product of 35 bits and its difference are exact
        assert np.array_equal((r * rest + r).astype(np.float32), (1 / s).astype(np.float32))
