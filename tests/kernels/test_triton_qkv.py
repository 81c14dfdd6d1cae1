"""Triton's q, k, v preparation against the reference's: codes and scales bit for bit, means to float32 accuracy."""

import interpreter
import pytest
import torch

interpreter.needed()

import triton
import triton.language as tl

from qgen.formats import packing
from qgen.formats.fp4 import E2M1
from qgen.kernels import attention_reference as reference
from qgen.kernels import triton_qkv
from qgen.kernels.attention_ops import SPECS
from qgen.kernels.fused_reference import apply_heads
from qgen.kernels.fusion import Heads
from qgen.kernels.triton_qkv import E2M1X2, e2m1_pairs, prepare

EXACT = ("q", "q_blocks", "q_scale", "k", "k_blocks", "k_scale", "v", "v_blocks", "v_scale")


interpreter.register_asm(E2M1X2, interpreter.e2m1_model)


pytestmark = pytest.mark.usefixtures("loud_memory")


def inputs(lq, lk, h, hkv, d, dtype):
    """Gaussian q, k, v with offsets, laid out in memory as (B, L, H, D), as models have them."""
    q, k, v = torch.randn(2, lq, h, d), torch.randn(2, lk, hkv, d), torch.randn(2, lk, hkv, d)
    q, k = q + torch.randn(2, 1, h, d), k + 3 * torch.randn(2, 1, hkv, d)
    return [t.to(dtype).transpose(1, 2) for t in (q, k, v)]


def logits(codes):
    """delta in units of log 2, whatever it is stored over."""
    if codes.delta is None or not codes.spec.startswith("fp4"):
        return codes.delta
    groups = codes.q.shape[1] // codes.k.shape[1]
    steps = codes.q_scale[:, :, :: reference.BLOCK_Q, None] * codes.k_scale.repeat_interleave(groups, 1)[:, :, None]
    return codes.delta * steps.repeat_interleave(reference.BLOCK_K, -1)


def compare(q, k, v, spec, smooth_k=True, smooth_q=False, v_max=448.0, asm=False):
    """Prepares with both, the reference with the kernel's mean of k, and compares every tensor."""
    sums = []
    original = triton_qkv._keys

    class Spy:  # sees the mean that the kernel subtracts
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (sums.append(args[2]), original[grid](*args, **kwargs))

    triton_qkv._keys = Spy()
    try:
        found = prepare(q, k, v, 0.11, spec, smooth_k, smooth_q, v_max, asm)
    finally:
        triton_qkv._keys = original
    wanted = reference.prepare(q, k, v, 0.11, spec, smooth_k, smooth_q, v_max, sums[0])
    if smooth_k:
        assert torch.allclose(sums[0], k.float().mean(2), rtol=1e-5, atol=1e-6)
    for name in EXACT:
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.is_contiguous(), name
            different = (a.view(torch.uint8) != b.view(torch.uint8)).float().mean().item()
            assert a.shape == b.shape and different == 0, f"{name}: {different:.2%} of the bytes differ"
    for name, get in (("delta", logits), ("shift", lambda codes: codes.shift)):
        a, b = get(found), get(wanted)
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4), name
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lq, lk, h, hkv, d", [(200, 333, 4, 2, 64), (1, 63, 2, 2, 96), (130, 1, 8, 1, 128)], ids=str)
def test_codes_equal_the_reference(spec, dtype, lq, lk, h, hkv, d):
    compare(*inputs(lq, lk, h, hkv, d, dtype), spec, smooth_q=spec == "fp4")


@pytest.mark.parametrize("spec", ["int8", "fp4"])
@pytest.mark.parametrize("smooth_k", [False, True], ids=["plain", "smooth_k"])
@pytest.mark.parametrize("smooth_q", [False, True], ids=["plain", "smooth_q"])
def test_smoothing(spec, smooth_k, smooth_q):
    compare(*inputs(200, 130, 2, 1, 64, torch.bfloat16), spec, smooth_k, smooth_q)


def test_mean_over_several_chunks():
    q, k, v = inputs(1, 1030, 1, 1, 64, torch.bfloat16)
    compare(q, k, v, "int8")


def test_range_of_values_for_float16_sums():
    found = compare(*inputs(64, 130, 2, 2, 64, torch.bfloat16), "int8_fp8", v_max=2.25)
    assert found.v.float().abs().max() == 2.25


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_and_huge_values(spec):
    q, k, v = (t.clone() for t in inputs(130, 200, 2, 2, 64, torch.bfloat16))
    q[:, :, 5], k[:, :, 64:128], v[..., 7], v[..., 9] = 0, 0, 0, 1e5
    found = compare(q, k, v, spec, smooth_k=False)
    assert all(t.float().isfinite().all() for t in (found.v, found.v_scale, found.q_scale, found.k_scale))
    assert not found.q[:, :, 5].any() and not found.k[:, :, 64:128].any()


@pytest.mark.parametrize("spec", ["fp4", "fp4_fp8"])
def test_scales_of_queries_are_shared_by_128_and_never_zero(spec):
    q, k, v = (t.clone() for t in inputs(200, 130, 2, 1, 64, torch.bfloat16))
    q[:, :, 128:], k[:, :, 64:128] = 0, 0
    found = compare(q, k, v, spec, smooth_k=False)
    assert (found.q_scale[:, :, :128] == found.q_scale[:, :, :1]).all() and (found.q_scale > 0).all()
    assert (found.k_scale > 0).all() and not found.q[:, :, 128:].any() and not found.k[:, :, 64:128].any()


def test_instruction_equals_plain_operations():
    q, k, v = inputs(130, 130, 2, 2, 64, torch.bfloat16)
    plain, asm = (prepare(q, k, v, 0.1, "fp4", smooth_q=True, asm=on) for on in (False, True))
    for name in EXACT:
        assert torch.equal(getattr(plain, name).view(torch.uint8), getattr(asm, name).view(torch.uint8)), name


@triton.jit
def _pairs(X, Y, CODES, N: tl.constexpr, ASM: tl.constexpr):
    r = tl.arange(0, N)
    tl.store(CODES + r, e2m1_pairs(tl.load(X + r), tl.load(Y + r), ASM))


@pytest.mark.parametrize("asm", [False, True], ids=["plain", "asm"])
def test_e2m1_of_all_codes_midpoints_and_beyond(asm):
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 7.0, 1e30])
    near = torch.cat([edges, torch.nextafter(edges, torch.tensor(9.0)), torch.nextafter(edges, torch.tensor(-9.0))])
    x = torch.cat([near, -near, 3 * torch.randn(1024 - 2 * len(near))])
    y, codes = x.flip(0).contiguous(), torch.empty(1024, dtype=torch.uint8)
    _pairs[(1,)](x, y, codes, N=1024, ASM=asm)
    assert torch.equal(packing.unpack(codes, 4), torch.stack([E2M1.encode(x), E2M1.encode(y)], -1).flatten())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("d, size", [(64, 64), (96, 32), (128, 128), (128, 16)], ids=str)
def test_rotated_codes_equal_the_reference_up_to_ties(spec, d, size):
    q, k, v = inputs(130, 140, 2, 1, d, torch.bfloat16)
    smooth_q = spec == "fp4"
    found = prepare(q, k, v, 0.11, spec, smooth_q=smooth_q, hadamard=size)
    wanted = reference.prepare(q, k, v, 0.11, spec, smooth_q=smooth_q, hadamard=size)
    plain = reference.prepare(q, k, v, 0.11, spec, smooth_q=smooth_q)
    for name in ("q", "k"):
        a, b, c = (getattr(codes, name).view(torch.uint8) for codes in (found, wanted, plain))
        assert (a != b).float().mean() < 2e-3 and (b != c).float().mean() > 0.3
    for name in ("q_scale", "k_scale"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-9)
    assert torch.equal(found.v.view(torch.uint8), wanted.v.view(torch.uint8))
    if smooth_q:
        assert torch.allclose(logits(found), logits(wanted), rtol=1e-4, atol=1e-4)


def test_equal_tokens():
    """All rows the same: what smoothing leaves is zero, and so are its codes."""
    q, k, v = (t[:, :, :1].expand(-1, -1, 140, -1) for t in inputs(1, 1, 2, 1, 64, torch.bfloat16))
    for spec in SPECS:
        found = compare(q, k, v, spec, smooth_q=True)
        assert all(t.float().isfinite().all() for t in (found.q_scale, found.k_scale, found.v_scale, found.delta))


def test_inputs_are_not_touched():
    tensors = inputs(70, 90, 2, 2, 64, torch.bfloat16)
    kept = [t.clone() for t in tensors]
    prepare(*tensors, 0.1, "fp4", smooth_q=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# -- norm and rotation -----------------------------------------------------------------------------------------------------
def heads_of(count, d, length, halves, normed=True, turned=True):
    """A norm's weights for `count` heads of d and a rotation over `length` positions."""
    angle = torch.outer(torch.arange(length).float(), 1 / 100 ** (torch.arange(d // 2) / d))
    return Heads(
        d, count * d, torch.rand(count * d).add(0.5).bfloat16() if normed else None, angle.cos() if turned else None,
        angle.sin() if turned else None, halves, 1e-5,
    )  # fmt: skip


def applied(x, heads):
    """What the model's own modules would have made of x (B, H, L, D), rounded to its dtype."""
    rows = x.transpose(1, 2).flatten(2).float()
    return apply_heads(rows, heads).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2).to(x.dtype)


@pytest.mark.parametrize(
    "spec, h, hkv, d, halves, normed, turned",
    [
        ("int8", 4, 2, 64, False, True, True),
        ("int8", 2, 2, 64, False, True, False),
        ("int8", 2, 2, 64, False, False, True),
        ("int8_fp8", 2, 2, 96, True, True, True),
        ("fp4", 2, 1, 128, True, True, True),
    ],
)
def test_norm_and_rotation_are_those_of_the_modules(spec, h, hkv, d, halves, normed, turned):
    """Codes of q and k are those of the normed, rotated, stored tensors, but where another order of a sum turned a last bit."""
    q, k, v = inputs(65, 65, h, hkv, d, torch.bfloat16)
    heads = heads_of(h, d, 65, halves, normed, turned), heads_of(hkv, d, 65, halves, normed, turned)
    before = [t.clone() for t in (q, k, v)]
    found = prepare(q, k, v, 0.11, spec, True, spec == "fp4", heads=heads)
    wanted = prepare(applied(q, heads[0]), applied(k, heads[1]), v, 0.11, spec, True, spec == "fp4")
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))
    for name in ("v", "v_scale", "v_blocks"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    for name in ("q", "k"):
        different = (getattr(found, name) != getattr(wanted, name)).float().mean()
        assert different < 0.01, f"{name}: {different:.2%} of the codes differ"
    (out, lse), (want, exact) = reference.attend(found), reference.attend(wanted)
    assert (out - want).norm() < 4e-3 * want.norm() and (lse - exact).abs().max() < 2e-2


def test_positions_repeat_and_other_heads_are_refused():
    q, k, v = inputs(64, 64, 2, 2, 64, torch.bfloat16)
    once, twice = heads_of(2, 64, 32, False, normed=False), heads_of(2, 64, 32, False, normed=False)
    again = Heads(64, 128, None, twice.cos.repeat(2, 1), twice.sin.repeat(2, 1))
    for name in ("q", "k", "shift"):
        pair = (prepare(q, k, v, 0.11, "int8", heads=(h, h)) for h in (once, again))
        assert torch.equal(*(getattr(codes, name) for codes in pair))
    with pytest.raises(
        ValueError, match="expected norm and rotation of 2 heads of 64, found 64 columns in heads of 64"
    ):
        prepare(q, k, v, 0.11, "int8", heads=(once, heads_of(1, 64, 32, False)))
