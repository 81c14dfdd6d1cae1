"""SmoothAttention: the function stays, keys per token lose the error that a fixed channel brings."""

import pytest
import torch

from qgen.methods.smooth_attention import smooth_attention
from qgen.nn.cache_name import cache_name
from qgen.nn.kv_cache import kv_cache


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 4
    for layer in model.model.layers:
        for channel in (5, 32 + 9):
            layer.self_attn.k_proj.weight.data[channel] *= 20
    return model


def ids(seed, length):
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def error(got, want):
    return float((got - want).norm() / want.norm())


def chunked(model, x):
    cache = kv_cache(keys="token", group=16, window=0, sink=0)
    return torch.cat([model(part, **{cache_name(model): cache}).logits for part in x.split(16, 1)], 1)


def test_function_stays_and_keys_per_token_get_better(llama):
    x = ids(9, 128)
    want = llama(x).logits
    before = error(chunked(llama, x), want)
    smooth_attention(llama, [ids(i, 64) for i in range(4)])
    assert error(llama(x).logits, want) < 1e-4
    assert error(chunked(llama, x), want) < 0.8 * before


def test_refusals(llama):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    with pytest.raises(ValueError, match="normalizes"):
        smooth_attention(Qwen3ForCausalLM(Qwen3Config(**small, num_key_value_heads=1, head_dim=32)), [ids(0, 8)])
    with pytest.raises(ValueError, match="exponent"):
        smooth_attention(llama, [ids(0, 8)], alpha=2.0)
    with pytest.raises(ValueError, match="q_proj"):
        smooth_attention(torch.nn.Linear(4, 4), [ids(0, 8)])
