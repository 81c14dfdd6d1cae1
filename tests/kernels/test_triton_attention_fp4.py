"""Triton's FP4 attention against the reference on the same codes, in every mode, and the op that runs it from end to end."""

import math

import interpreter
import pytest
import torch

interpreter.needed()

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, registry
from qgen.kernels import attention_reference as reference
from qgen.kernels.registry import Ask
from qgen.kernels.triton_attention import Config
from qgen.kernels.triton_attention_fp4 import attend, configure
from qgen.kernels.triton_qkv import E2M1X2

MODES = [("fp4_fp8", False), ("fp4_fp8", True), ("fp4", False)]
MODE_IDS = ["fp4_fp8-acc32", "fp4_fp8-acc16", "fp4"]


interpreter.register_asm(E2M1X2, interpreter.e2m1_model)


pytestmark = pytest.mark.usefixtures("loud_memory")


def inputs(lq, lk, h=2, hkv=1, d=64, b=1, dtype=torch.bfloat16):
    """Gaussian q, k, v, of memory layout (B, L, H, D); q and k have offsets per channel."""
    q, k, v = torch.randn(b, lq, h, d), torch.randn(b, lk, hkv, d), torch.randn(b, lk, hkv, d)
    q, k = q + torch.randn(b, 1, h, d), k + 2 * torch.randn(b, 1, hkv, d)
    return [t.to(dtype).transpose(1, 2) for t in (q, k, v)]


def rms(x, truth):
    """Relative root mean square error."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def compare(q, k, v, spec, causal=False, smooth_q=True, **config):
    """Kernel and reference on the codes of the reference."""
    config = Config(**config)
    codes = reference.prepare(q, k, v, q.shape[-1] ** -0.5, spec, True, smooth_q, config.v_max)
    out, lse = attend(codes, q.dtype, causal, config)
    wanted, exact = reference.attend(codes, None, causal)
    assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert out.isfinite().all() and not lse.isnan().any()
    assert rms(out, wanted) < 4e-3
    assert torch.equal(lse == -math.inf, exact == -math.inf)
    seen = exact.isfinite()
    assert (lse - exact)[seen].abs().max() < 1e-4 if seen.any() else True
    return out, lse


@pytest.mark.parametrize("spec, acc16", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lq, lk", [(1, 1), (63, 200), (200, 63), (200, 333)], ids=str)
def test_lengths(spec, acc16, dtype, lq, lk):
    compare(*inputs(lq, lk, dtype=dtype), spec, acc16=acc16)


@pytest.mark.parametrize("spec, acc16", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("d", [96, 128])
def test_head_dimensions(spec, acc16, d):
    compare(*inputs(130, 140, d=d), spec, acc16=acc16)


@pytest.mark.parametrize("h, hkv, b", [(3, 3, 2), (4, 2, 2), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("spec", ["fp4_fp8", "fp4"])
def test_heads_share_keys(spec, h, hkv, b):
    compare(*inputs(70, 130, h, hkv, b=b), spec)


@pytest.mark.parametrize("spec, acc16", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("smooth_q", [False, True], ids=["plain", "smooth_q"])
@pytest.mark.parametrize("lq, lk", [(200, 200), (63, 200), (333, 200)], ids=str)
def test_causal(spec, acc16, smooth_q, lq, lk):
    compare(*inputs(lq, lk), spec, causal=True, smooth_q=smooth_q, acc16=acc16)


@pytest.mark.parametrize("spec, acc16", MODES, ids=MODE_IDS)
def test_plain_queries(spec, acc16):
    compare(*inputs(130, 200), spec, smooth_q=False, acc16=acc16)


@pytest.mark.parametrize("spec, acc16", MODES, ids=MODE_IDS)
def test_zeros_and_huge_values(spec, acc16):
    """Zero tokens, a zero block of keys, a zero channel, |V| = 1e5: also where all keys add up, so that float16 would overflow."""
    q, k, v = (t.clone() for t in inputs(130, 200))
    q[:, :, 5], k[:, :, 64:128], v[..., 7] = 0, 0, 0
    v[..., 9], v[..., 10] = 1e5, -1e5
    for smooth_q in (False, True):
        out, _ = compare(q, k, v, spec, acc16=acc16, smooth_q=smooth_q)
        assert not out[..., 7].any()
    compare(q, torch.zeros_like(k), torch.full_like(v, 1e5), spec, acc16=acc16)


@pytest.mark.parametrize("spec", ["fp4_fp8", "fp4"])
def test_sharp_logits(spec):
    """Logits in the tens: few keys take all, whole blocks of P are 0, the running maximum jumps from block to block."""
    q, k, v = inputs(70, 200)
    compare(4 * q, 3 * k, v, spec)


def test_instruction_equals_plain_operations():
    q, k, v = inputs(130, 140)
    plain, asm = (compare(q, k, v, "fp4", asm=on) for on in (False, True))
    assert torch.equal(plain[0], asm[0]) and torch.equal(plain[1], asm[1])


@pytest.mark.parametrize("spec", ["fp4_fp8", "fp4"])
def test_start_of_sums_in_tensor_memory_is_not_seen(spec):
    q, k, v = inputs(130, 140)
    plain, tmem = (compare(q, k, v, spec, tmem=on) for on in (False, True))
    assert torch.equal(plain[0], tmem[0]) and torch.equal(plain[1], tmem[1])


# -- the op -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", ["fp4_fp8", "fp4"])
@pytest.mark.parametrize("smooth_q", [False, True], ids=["plain", "smooth_q"])
def test_op_equals_reference_from_end_to_end(spec, smooth_q):
    q, k, v = inputs(130, 200, h=4, hkv=2, b=2)
    kept = [t.clone() for t in (q, k, v)]
    with interpreter.launches() as names:
        out, lse = torch.ops.qgen.attention(q, k, v, None, False, None, spec, True, smooth_q, f"triton_{spec}")
    assert names == ["_sums", "_queries", "_keys", *(["_delta"] if smooth_q else []), "_attend"]
    wanted, exact = torch.ops.qgen.attention(q, k, v, None, False, None, spec, True, smooth_q, "reference")
    assert rms(out, wanted) < 2e-2  # the means of k differ in their last bits, and a few of sixteen codes with them
    assert (lse - exact).abs().max() < 2e-2
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


def test_op_with_fake_tensors_and_gradient():
    q, k, v = (t.detach().requires_grad_() for t in inputs(63, 70))
    torch.library.opcheck(torch.ops.qgen.attention, (q, k, v, None, True, 0.1, "fp4_fp8", True, True, "triton_fp4_fp8"))


def test_masks_are_refused_before_launch():
    mask = torch.ones(8, 8, dtype=torch.bool)
    with interpreter.launches() as names, pytest.raises(NoKernel, match="cannot do mask"):
        torch.ops.qgen.attention(*inputs(8, 8), mask, False, None, "fp4", True, True, "triton_fp4")
    assert names == []


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)], ids=str)
@pytest.mark.parametrize("spec", ["fp4_fp8", "fp4"])
def test_dispatch(capability, spec):
    qk, pv = attention_ops.SPECS[spec]
    for traits, serves in ((frozenset({"causal", "smooth_q"}), True), (frozenset({"mask"}), False)):
        wanted = Ask("attention", "cuda", qk, pv, k=128, capability=capability, traits=traits)
        able = serves and capability >= (10, 0)
        assert registry.choose(wanted).name == (f"triton_{spec}" if able else "reference")


def test_configurations():
    assert configure((12, 0), "fp4_fp8") == Config(acc16=True, asm=True)
    assert configure((10, 0), "fp4_fp8") == Config(asm=True, tmem=True)
    assert configure((12, 1), "fp4") == Config(asm=True)
    assert configure(None, "fp4") == Config()
