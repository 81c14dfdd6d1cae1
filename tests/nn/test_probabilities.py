"""Attention probabilities in few bits: which code keeps the text, and which the product with V."""

import math

import pytest
import torch
import torch.nn.functional as F

from qgen.nn.probabilities import ProbabilitySpec, attention, rounded, simulated


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_error(p, made, v, keys=slice(None)):
    want = p[..., keys] @ v[keys]
    return float((made[..., keys] @ v[keys] - want).norm() / want.norm())


@pytest.mark.parametrize("seed", range(4))
def test_a_start_token_apart_keeps_the_text(seed):
    logits = randn(64, 77, seed=seed)
    logits[:, 0] += 9
    p, v, text = logits.softmax(-1), randn(77, 32, seed=10 + seed), slice(1, None)
    apart = torch.cat([p[:, :1], rounded(p[:, 1:], ProbabilitySpec("log2", 3))], -1)
    errors = [product_error(p, made, v, text) for made in
              (apart, rounded(p, ProbabilitySpec("log2", 3)), rounded(p, ProbabilitySpec("uniform", 3)))]  # fmt: skip
    assert errors[0] <= 0.5 * errors[1] and errors[1] <= errors[2]
    q, k = randn(1, 1, 64, 16, seed=1), randn(1, 1, 77, 16, seed=2)
    k[..., 0, :] = 4 * q.mean(-2)
    got = attention(q, k, v[None, None], spec=ProbabilitySpec("log2", 3, apart=1))
    inner = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    want = inner[..., :1] @ v[:1] + rounded(inner[..., 1:], ProbabilitySpec("log2", 3)) @ v[1:]
    assert torch.allclose(got, want, atol=1e-6)


def test_the_range_follows_the_prompt():
    """Two prompts whose largest probability beside the start token differs 25 times: a range of the strong one is wrong for the weak."""
    weak, strong = (randn(64, 76, seed=s).softmax(-1) * size for s, size in ((1, 0.02), (2, 0.5)))
    v, spec = randn(76, 32, seed=3), ProbabilitySpec("log2", 3)
    dynamic = product_error(weak, rounded(weak, spec), v)
    static = product_error(weak, rounded(weak, spec, top=strong.amax()), v)
    assert dynamic <= 0.7 * static


@pytest.mark.parametrize("seed", range(3))
def test_half_octaves_and_regions_beat_equal_steps(seed):
    p, v = (2.5 * randn(64, 128, seed=seed)).softmax(-1), randn(128, 32, seed=5)
    errors = {  # relative squares
        kind: product_error(p, rounded(p, ProbabilitySpec(kind, 4, scope="query")), v) ** 2
        for kind in ("uniform", "log2", "logsqrt2")
    }
    assert errors["logsqrt2"] <= 0.6 * errors["log2"] and errors["logsqrt2"] <= 0.8 * errors["uniform"]
    for bits in (4, 8):
        pair = [product_error(p, rounded(p, ProbabilitySpec(kind, bits)), v) for kind in ("regions", "uniform")]
        assert pair[0] <= 0.8 * pair[1]


def test_codes_are_few_and_zero_stays_zero():
    p = torch.cat([torch.zeros(3, 8, 5), randn(3, 8, 32).softmax(-1)], -1)
    for kind in ("uniform", "log2", "logsqrt2", "regions"):
        made = rounded(p, ProbabilitySpec(kind, 4))
        assert (made[..., :5] == 0).all() and len(made.unique()) <= 16 and made.isfinite().all()
        assert made.max() == p.max()
    assert (rounded(torch.zeros(2, 4), ProbabilitySpec("log2", 4)) == 0).all()


def test_eight_bits_are_torchs_attention():
    q, k, v = (randn(2, h, n, 16, seed=i).bfloat16() for i, (h, n) in enumerate(((4, 40), (2, 40), (2, 40))))
    mask = randn(2, 1, 40, 40, seed=9) > -1
    for options in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {}):
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True, **options)
        with simulated("uniform", 8, scope="query"):
            got = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() / want.norm() < 0.02
    blind = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    assert (attention(q, k, v, blind, enable_gqa=True, spec=ProbabilitySpec("log2")) == 0).all()


def test_outside_of_the_context_nothing_changes():
    q = randn(1, 1, 8, 4)
    before = F.scaled_dot_product_attention(q, q, q)
    with simulated("log2", 3):
        inside = F.scaled_dot_product_attention(q, q, q)
    assert not torch.equal(inside, before) and torch.equal(F.scaled_dot_product_attention(q, q, q), before)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"kind": "log3"}, "log2"),
        ({"bits": 6}, "3, 4, 5, 8"),
        ({"kind": "uniform", "bits": 1}, "bits"),
        ({"apart": -1}, "keys"),
        ({"scope": "head"}, "scope"),
    ],
)
def test_refusals(given, said):
    with pytest.raises(ValueError, match=said):
        ProbabilitySpec(**given)


def test_dropout_is_refused():
    q = randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match="dropout"):
        attention(q, q, q, dropout_p=0.1, spec=ProbabilitySpec())
    assert math.isfinite(float(attention(q, q, q, spec=ProbabilitySpec()).sum()))
