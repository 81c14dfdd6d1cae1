"""Language models: perplexity, greedy agreement and cache bytes against numbers worked otherwise."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from qgen.eval.agreement import greedy, match
from qgen.eval.kv_bytes import cache_bytes, kv_bytes
from qgen.eval.perplexity import nll_per_token, perplexity
from qgen.eval.text import encode, evaluate_text
from qgen.eval.tokens_per_second import tokens_per_second


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) % 96 for c in text]}


TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "pack my box with five dozen liquor jugs"]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=96, bos_token_id=None, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_perplexity_is_the_models_own_loss(llama):
    ids = encode(Letters(), TEXTS[:1], 64)[0]
    with torch.inference_mode():
        want = float(llama(input_ids=ids, labels=ids).loss.exp())
    assert perplexity(llama, [ids]) == pytest.approx(want, rel=1e-5)
    assert nll_per_token(llama, ids).shape == (63,)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(llama):
    class Blank(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            out = torch.zeros(*input_ids.shape, 96)
            return type("Out", (), {"logits": out})

    assert perplexity(Blank(), encode(Letters(), TEXTS, 32)) == pytest.approx(96, rel=1e-5)


def test_greedy_is_generate(llama):
    ids = encode(Letters(), TEXTS, 16)[0]
    want = llama.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, 16:]
    assert torch.equal(greedy(llama, ids, 8), want)


def test_match_by_hand():
    assert match(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 9, 4])) == 0.5
    assert match(torch.tensor([1, 2]), torch.tensor([1, 2])) == 1
    with pytest.raises(ValueError, match="equal length"):
        match(torch.tensor([1]), torch.tensor([1, 2]))


def test_cache_bytes_by_hand(llama):
    """2 layers x (keys, values) x 2 heads x 8 numbers x 4 bytes for each of 10 tokens."""
    assert kv_bytes(llama, torch.zeros(1, 10, dtype=torch.long)) == 2 * 2 * 2 * 8 * 4 * 10
    shared = torch.zeros(4, dtype=torch.float16)
    assert cache_bytes({"a": [shared, shared], "b": torch.zeros(3, dtype=torch.uint8)}) == 8 + 3


def test_speed_is_positive_and_ordered(llama):
    found = tokens_per_second(llama, torch.zeros(1, 4, dtype=torch.long), new_tokens=3, runs=3)
    assert 0 < found.low <= found.mean <= found.high and found.n == 3


def test_a_model_against_itself_and_against_noise(llama):
    import copy

    options = {"length": 32, "new_tokens": 6, "prompt_tokens": 8, "timed": False}
    same = evaluate_text(llama, Letters(), TEXTS, llama, **options)
    assert same["agreement"].value == 100
    assert same["perplexity"].difference == 0
    assert same["perplexity"].low <= same["perplexity"].value <= same["perplexity"].high
    shares = []
    for sigma in (0.0003, 0.2):
        noisy = copy.deepcopy(llama)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in noisy.parameters():
                parameter += sigma * torch.randn(parameter.shape, generator=generator)
        shares.append(evaluate_text(noisy, Letters(), TEXTS, llama, **options)["agreement"].value)
    assert 100 >= shares[0] > shares[1]


def test_empty_texts_are_refused(llama):
    with pytest.raises(ValueError, match="two tokens"):
        evaluate_text(llama, Letters(), ["", "a"], timed=False)
    assert not math.isnan(evaluate_text(llama, Letters(), ["ab"], timed=False)["perplexity"].value)
