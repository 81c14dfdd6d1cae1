"""The 4-bit cache of keys and values: shapes, bytes, which axis shares a scale, beams, generation with a real model class."""

import pytest
import torch

from qgen.nn.cache_name import cache_name
from qgen.nn.kv_cache import KV4, LayerKV, Packed4, kv_cache


def error(got, want):
    return float((got - want).norm() / want.norm())


def planted(t=256, d=64, seed=0):
    """Keys with one channel at +20 and one eight times as large, (1, 2, t, d)."""
    k = torch.randn(1, 2, t, d, generator=torch.Generator().manual_seed(seed))
    k[..., 5] += 20
    k[..., 9] *= 8
    return k


def test_keys_per_channel_beat_keys_per_token():
    """A quarter at most of the logits' squared error per token: fixed channels stand out in keys."""
    k, q = planted(), torch.randn(1, 2, 32, 64)
    logits = q @ k.mT
    by = {along: error(q @ Packed4.of(k, along, 64).values(torch.float32).mT, logits) ** 2 for along in (2, 3)}
    assert by[2] <= 0.25 * by[3]


def test_what_comes_back_is_what_went_in_but_for_four_bits():
    spec = KV4(group=32, window=8, sink=4)
    layer, k, v = LayerKV(spec), planted(150), torch.randn(1, 2, 150, 64)
    for start, stop in ((0, 3), (3, 70), *((i, i + 1) for i in range(70, 150))):
        whole = layer.add(k[:, :, start:stop], v[:, :, start:stop])
        assert whole[0].shape == (1, 2, stop, 64) and layer.length == stop
        for got, want in zip(whole, (k, v), strict=True):
            assert torch.equal(got[:, :, :4], want[:, :, : min(4, stop)])
            assert torch.equal(got[:, :, -8:], want[:, :, max(0, stop - 8) : stop])
            assert error(got, want[:, :, :stop]) < 0.1
    assert layer.packed["keys"].q.codes.shape == (1, 2, 64, 64)  # 128 tokens, two in a byte
    assert layer.packed["values"].q.codes.shape == (1, 2, 128, 32)


def test_a_group_is_rounded_once():
    layer, k = LayerKV(KV4(group=16, window=0, sink=0)), planted(64)
    layer.add(k[:, :, :16], k[:, :, :16])
    first = layer.packed["keys"].values(torch.float32)
    for i in range(16, 64):
        layer.add(k[:, :, i : i + 1], k[:, :, i : i + 1])
    assert torch.equal(layer.packed["keys"].values(torch.float32)[:, :, :16], first)


@pytest.mark.parametrize(("length", "most"), [(4096, 0.30), (16384, 0.285)])
def test_bytes_at_long_context(length, most):
    layer, x = LayerKV(KV4()), torch.randn(1, 1, length, 64, dtype=torch.bfloat16)
    layer.add(x, x)
    assert layer.nbytes / (2 * x.nbytes) <= most
    counted = sum(t.nbytes for pair in layer.ends.values() for t in pair)
    counted += sum(t.nbytes for p in layer.packed.values() for t in (p.q.codes, p.q.scales, p.q.zero))
    assert layer.nbytes == counted


def test_beams_and_dropping():
    layer, k = LayerKV(KV4(group=16, window=8, sink=2)), torch.randn(3, 2, 40, 32)
    layer.add(k, k)
    full = layer.add(k[:, :, :1], k[:, :, :1])[0]
    layer.select(lambda t: t[[2, 0]])
    assert torch.equal(layer.add(k[[2, 0], :, 1:2], k[[2, 0], :, 1:2])[0][:, :, :41], full[[2, 0]])
    layer.drop(2)
    assert layer.length == 40
    with pytest.raises(ValueError, match="newest"):
        layer.drop(30)


def test_refused():
    for options in ({"group": 48}, {"window": -1}, {"keys": "head"}):
        with pytest.raises(ValueError):
            KV4(**options)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_model_runs_on_it(llama):
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(1))
    want = llama(ids).logits
    cache = kv_cache(group=32, window=16)
    got = [llama(ids[:, :100], **{cache_name(llama): cache}).logits]
    assert torch.allclose(got[0], want[:, :100], atol=1e-4)  # nothing is packed before the first call is over
    got += [llama(ids[:, i : i + 1], **{cache_name(llama): cache}).logits for i in range(100, 200)]
    tail = torch.cat(got[1:], 1)
    assert cache.get_seq_length() == 200
    assert 1e-4 < error(tail, want[:, 100:]) < 0.05
    exact = sum(2 * 200 * 2 * 32 * 4 for _ in range(2))
    assert cache.nbytes < exact / 2


def test_generate_and_beams(llama):
    ids = torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(2))
    out = llama.generate(ids, max_new_tokens=20, do_sample=False, **{cache_name(llama): kv_cache(group=16, window=4)})
    assert out.shape == (2, 80)
    beams = llama.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, **{cache_name(llama): kv_cache(group=16)}
    )
    assert beams.shape == (2, 66)
