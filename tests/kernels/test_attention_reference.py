"""The meaning of low-bit attention against a float64 softmax, its special cases, and the op around it."""

import math

import pytest
import torch

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, registry
from qgen.kernels import attention_reference as reference
from qgen.kernels.attention_ops import SPECS

# Relative RMS error against float64 for Gaussian q, v and Gaussian k with a shared offset, smoothing on: measured 0.0108, 0.0364,
# 0.143 and 0.192 (L = 200, D = 64, seed 0); the bounds are half a dB above.
QUALITY = {"int8": 0.0114, "int8_fp8": 0.0386, "fp4_fp8": 0.1515, "fp4": 0.204}


def rms(x, truth):
    """Relative root mean square error, in float64."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def inputs(lq=200, lk=200, h=2, hkv=2, d=64, b=1, dtype=torch.float32, offset=3.0):
    """Gaussian q, k, v; every head of k has its own offset per channel, as keys of diffusion transformers do."""
    q, k, v = torch.randn(b, h, lq, d), torch.randn(b, hkv, lk, d), torch.randn(b, hkv, lk, d)
    return q.to(dtype), (k + offset * torch.randn(b, hkv, 1, d)).to(dtype), v.to(dtype)


def oracle(q, k, v, mask=None, causal=False, scale=None):
    """Softmax attention in float64, one head at a time: (out, lse)."""
    (b, h, lq, d), (hkv, lk) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    full = None if mask is None else mask.expand(b, h, lq, lk)
    out, lse = torch.zeros(b, h, lq, d, dtype=torch.float64), torch.zeros(b, h, lq, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            s = q[i, j].double() @ k[i, j * hkv // h].double().T * scale
            if full is not None:
                s = torch.where(full[i, j], s, -math.inf) if mask.dtype == torch.bool else s + full[i, j].double()
            if causal:
                s = s + torch.full((lq, lk), -math.inf, dtype=torch.float64).triu(lk - lq + 1)
            lse[i, j] = torch.logsumexp(s, -1)
            out[i, j] = torch.nan_to_num(torch.softmax(s, -1)) @ v[i, j * hkv // h].double()
    return out, lse


def op(q, k, v, mask=None, causal=False, scale=None, spec="int8", smooth_k=True, smooth_q=False, kernel="reference"):
    return torch.ops.qgen.attention(q, k, v, mask, causal, scale, spec, smooth_k, smooth_q, kernel)


@pytest.mark.parametrize("spec", SPECS)
def test_close_to_float64(spec):
    q, k, v = inputs()
    truth, lse = oracle(q, k, v)
    out, found = op(q, k, v, spec=spec, smooth_q=spec.startswith("fp4"))
    assert rms(out, truth) < QUALITY[spec]
    assert (found - lse).abs().mean() < (0.02 if spec.startswith("int8") else 0.15)


@pytest.mark.parametrize("spec", ["int8", "fp4_fp8", "fp4"])  # with int8_fp8 most of the error is that of P and V
def test_smoothing_of_keys_pays(spec):
    q, k, v = inputs()
    truth, _ = oracle(q, k, v)
    plain, smooth = (op(q, k, v, spec=spec, smooth_k=on)[0] for on in (False, True))
    assert rms(smooth, truth) < 0.75 * rms(plain, truth)


def test_smoothing_of_queries_pays():
    q, k, v = inputs()
    q = q + 3 * torch.randn(1, 2, 1, 64)
    truth, lse = oracle(q, k, v)
    plain, smooth = (op(q, k, v, spec="fp4", smooth_q=on) for on in (False, True))
    assert rms(smooth[0], truth) < 0.75 * rms(plain[0], truth)
    assert (smooth[1] - lse).abs().mean() < (plain[1] - lse).abs().mean()


@pytest.mark.parametrize("smooth_k", [False, True], ids=["plain", "smooth_k"])
@pytest.mark.parametrize("smooth_q", [False, True], ids=["plain", "smooth_q"])
def test_smoothing_alone_changes_nothing(smooth_k, smooth_q, monkeypatch):
    """With codes that are not rounded, smoothed or not, attention and LSE are those of float64."""
    monkeypatch.setattr(torch, "round", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "to", _keeps_float(torch.Tensor.to))
    q, k, v = inputs(lq=150, h=4, offset=1.0)
    codes = reference.prepare(q, k, v, 0.125, "int8", smooth_k, smooth_q)
    out, lse = reference.attend(codes)
    truth, exact = oracle(q, k, v, scale=0.125)
    assert rms(out, truth) < 1e-3  # P and V are still float16
    assert (lse - exact).abs().max() < 1e-4


def _keeps_float(to):
    return lambda x, *args, **kwargs: x if args[:1] == (torch.int8,) else to(x, *args, **kwargs)


@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 63), (63, 200), (200, 63), (130, 64)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_shapes(lq, lk, causal):
    q, k, v = inputs(lq, lk, h=4, hkv=1, b=2)
    out, lse = op(q, k, v, causal=causal)
    truth, exact = oracle(q, k, v, causal=causal)
    assert rms(out, truth) < 0.02
    blind = exact == -math.inf
    assert torch.equal(lse == -math.inf, blind) and not out[blind].any()
    assert (lse - exact)[~blind].abs().max() < 0.1


@pytest.mark.parametrize("shape", [(90, 130), (2, 1, 1, 130), (1, 4, 90, 1), (2, 4, 90, 130), ()], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    q, k, v = inputs(90, 130, h=4, b=2)
    mask = torch.rand(shape) + (shape == ()) > 0.3 if kind == "bool" else torch.randn(shape) * 2
    out, lse = op(q, k, v, mask)
    truth, exact = oracle(q, k, v, mask)
    assert rms(out, truth) < 0.02
    assert torch.equal(lse == -math.inf, exact == -math.inf)


def test_float_mask_of_infinity_is_a_bool_mask():
    q, k, v = inputs(70, 130)
    keep = torch.rand(70, 130) > 0.5
    keep[3] = False
    added = torch.zeros(70, 130).masked_fill(~keep, -math.inf)
    a, b = op(q, k, v, keep), op(q, k, v, added)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not a[0][:, :, 3].any() and (a[1][:, :, 3] == -math.inf).all()


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_and_huge_values(spec):
    """Zero tokens, a zero block of keys, a zero channel of V and |V| = 1e5 in bfloat16 give finite, right numbers."""
    q, k, v = inputs(130, 200, offset=0.0, dtype=torch.bfloat16)
    q[:, :, 5], k[:, :, 64:128], v[..., 7] = 0, 0, 0
    v[..., 9] = 1e5
    out, lse = op(q, k, v, spec=spec, smooth_k=False)
    assert out.isfinite().all() and lse.isfinite().all()
    assert not out[..., 7].any()
    assert ((out[..., 9].float() / 1e5 - 1).abs() < (0.08 if spec == "fp4" else 0.02)).all()
    zero, flat = op(q, torch.zeros_like(k), v, spec=spec)
    assert torch.allclose(flat, torch.tensor(math.log(200.0)), atol=1e-4)
    assert rms(zero, v.double().mean(2, keepdim=True).expand_as(zero)) < (0.005 if spec == "int8" else 0.06)


@pytest.mark.parametrize("spec", SPECS)
def test_scale_of_v_passes_through(spec):
    """Scaling V by a power of two scales the output and changes no code."""
    q, k, v = inputs()
    a, b = (reference.prepare(q, k, x, 0.125, spec) for x in (v, v * 2.0**20))
    assert torch.equal(a.v.view(torch.uint8), b.v.view(torch.uint8))
    assert torch.equal(a.v_scale * 2.0**20, b.v_scale)


def test_float16_values_lose_nothing():
    v = (torch.randn(1, 2, 100, 64) * torch.logspace(-3, 5, 64)).bfloat16()
    codes = reference.prepare(v, v, v, 1.0, "int8")
    big = v.abs() > v.abs().amax(2, keepdim=True) / 2**14  # below, float16 becomes subnormal
    back = codes.v[:, :, :100].float() * codes.v_scale[:, :, None]
    assert torch.equal(back[big], v.float()[big])


@pytest.mark.parametrize("spec", SPECS)
def test_inputs_are_not_touched(spec):
    q, k, v = inputs(dtype=torch.bfloat16)
    kept = [t.clone() for t in (q, k, v)]
    op(q, k, v, spec=spec, smooth_q=True)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize("keys", [256, 1024])
def test_two_levels_of_scales_for_probabilities_beat_one(keys):
    """SageAttention3: a row's probabilities at the top of what block scales in e4m3 can hold, against blocks of them as they are."""
    p, v = torch.softmax(2.5 * torch.randn(64, keys), -1), torch.randn(keys, 64)
    top = 448 * 6 / p.amax(-1, keepdim=True)
    two, one = reference._rounded(p * top, "e2m1") / top, reference._rounded(p, "e2m1")
    assert rms(two @ v, p @ v) <= rms(one @ v, p @ v)
    assert keys == 256 or rms(two @ v, p @ v) <= 0.8 * rms(one @ v, p @ v)


def test_subtracting_the_mean_key_leaves_softmax_alone_and_the_callers_keys_untouched():
    q, k, _ = inputs()
    kept = k.clone()
    codes = reference.prepare(q, k, k, 0.125, "int8", smooth_k=True)
    assert torch.equal(k, kept)
    mean = k.mean(2, keepdim=True)
    plain, moved = (torch.softmax(0.125 * q @ x.transpose(2, 3), -1) for x in (k, k - mean))
    assert (plain - moved).abs().max() < 1e-5
    assert torch.allclose(codes.shift, 0.125 * (q @ mean.transpose(2, 3))[..., 0], atol=1e-4)


def test_float_path():
    q, k, v = inputs(90, 130, h=4, b=2)
    for mask, causal in ((None, True), (torch.rand(90, 130) > 0.5, False), (torch.randn(4, 1, 130), True)):
        out, lse = reference.attention_float(q, k, v, mask, causal)
        truth, exact = oracle(q, k, v, mask, causal)
        assert rms(out, truth) < 1e-6
        assert torch.allclose(lse.double(), exact, atol=1e-5)


# -- the op -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", ["int8", "fp4"])
def test_opcheck(spec):
    q, k, v = (t.requires_grad_() for t in inputs(70, 90, h=4, dtype=torch.bfloat16))
    mask = torch.rand(70, 90) > 0.2
    args = (q, k, v, mask, False, None, spec, True, spec == "fp4", "reference")
    torch.library.opcheck(torch.ops.qgen.attention, args)


def test_compiles_into_one_graph():
    q, k, v = inputs(70, 90, h=4, dtype=torch.bfloat16)

    def model(q, k, v):
        out, lse = op(q, k, v, causal=True)
        return out.transpose(1, 2).flatten(2) * 2, lse

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), model(q, k, v), strict=True):
        assert torch.equal(a, b)


def test_pure_torch_compiles_into_one_graph():
    q, k, v = inputs(70, 90)
    args = (q, k, v, None, False, 0.125, "int8_fp8", True, True)
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args), reference.attention(*args), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradient_is_that_of_float_attention():
    q, k, v = (t.requires_grad_() for t in inputs(130, 140, h=4, b=2, offset=0.0))
    mask, weight = torch.randn(130, 140), torch.randn(2, 4, 130, 64)
    grads = []
    for attend in (lambda: op(q, k, v, mask, True), lambda: oracle(q, k, v, mask, True)):
        out, lse = attend()
        grads.append(torch.autograd.grad((out * weight).sum() + lse.sin().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert rms(a, b) < 0.02  # the sine's argument is the quantized LSE


def test_gradient_for_a_mask_is_refused():
    q, k, v = inputs(40, 40)
    out, _ = op(q, k, v, torch.zeros(40, 40, requires_grad=True))
    with pytest.raises(ValueError, match="no gradient for its mask"):
        out.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spec": "int7"}, "unknown attention spec 'int7'"),
        ({"q": torch.zeros(40, 2, 64)}, "pad them and pass a mask"),
        ({"k": torch.zeros(1, 3, 40, 64)}, "one shape"),
        ({"v": torch.zeros(1, 2, 40, 64, dtype=torch.float16)}, "one float dtype"),
        ({"mask": torch.zeros(40, dtype=torch.int32)}, "a mask is bool"),
        ({"mask": torch.zeros(7, dtype=torch.bool)}, "must broadcast"),
        ({"scale": 0.0}, "above 0"),
        ({"kernel": "referense"}, "did you mean 'reference'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(change, message):
    q, k, v = inputs(40, 40)
    with pytest.raises(ValueError, match=message):
        op(**{"q": q, "k": k, "v": v, **change})


def test_head_dimension_is_named_when_refused():
    needs = attention_ops.AttentionNeeds(weights=("int8",), acts=("fp16",), head_dims=(64, 96, 128))
    wanted = attention_ops.ask(torch.zeros(1, 1, 1, 80), "int8")
    assert needs.refusals(wanted) == ["serves head_dim 64/96/128, asked 80"]


def test_reference_serves_every_cpu_call():
    for spec in SPECS:
        wanted = attention_ops.ask(torch.zeros(1, 1, 1, 80), spec, mask=torch.ones(1), causal=True, smooth_q=True)
        assert registry.choose(wanted).name == "reference"
    with pytest.raises(NoKernel, match="head_dim"):
        registry.choose(attention_ops.ask(torch.zeros(1, 1, 1, 80), "int8"), prefer="triton_int8")
