"""Rotations folded into language models: orthogonal for every width, nothing changes in float, outliers gone."""

import pytest
import torch

from qgen.methods.fold_rotation import fold_rotation
from qgen.methods.hadamard import hadamard, rotation


@pytest.mark.parametrize("n", [2, 4, 12, 20, 28, 36, 44, 60, 64, 76, 96, 108, 160, 576, 768, 896, 960])
def test_hadamard_of_every_width(n):
    h = hadamard(n)
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [36, 64, 576, 1536, 70, 93 * 4])
def test_rotations_are_orthogonal_and_spread_a_spike(n):
    r = rotation(n, 3)
    assert float((r @ r.T - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-12
    assert not torch.equal(r, rotation(n, 4))
    x = torch.randn(n, dtype=torch.float64)
    x[1] = 100
    if n >= 96 and n % 93:
        peak = [float(v.abs().max() / v.square().mean().sqrt()) for v in (x, x @ r)]
        assert peak[1] < 0.5 * peak[0]


def test_no_matrix_is_made_up():
    with pytest.raises(ValueError, match="order 6"):
        hadamard(6)


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=144, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=80, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.randn_like(p) if "norm" in name else 0.05 * torch.randn_like(p) if "bias" in name else 0
    model.model.embed_tokens.weight.data[:, 7] *= 60
    return model


def test_the_function_stays(llama):
    ids = torch.arange(40)[None] % 80
    want = llama(ids).logits
    fold_rotation(llama)
    got = llama(ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight and not llama.config.tie_word_embeddings
    assert torch.equal(llama.model.norm.weight, torch.ones(144))


def test_writers_must_be_rotated_too(llama):
    """The test of the test: without Rᵀ on one writer the function is another one."""
    ids = torch.arange(40)[None] % 80
    want = llama(ids).logits
    before = llama.model.layers[0].mlp.down_proj.weight.clone()
    fold_rotation(llama)
    llama.model.layers[0].mlp.down_proj.weight.data = before
    assert float((llama(ids).logits - want).norm() / want.norm()) > 1e-2


def test_the_residual_stream_loses_its_outlier(llama):
    ids = torch.arange(40)[None] % 80
    seen = []
    hook = llama.model.layers[1].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    llama(ids)
    fold_rotation(llama)
    llama(ids)
    hook.remove()
    peak = [float(x.abs().amax() / x.square().mean().sqrt()) for x in seen]
    assert peak[1] < 0.5 * peak[0]


def test_other_architectures_are_refused_and_left_alone():
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, num_key_value_heads=1, head_dim=32))
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    for model in (gemma, gpt):
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="rotation"):
            fold_rotation(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
