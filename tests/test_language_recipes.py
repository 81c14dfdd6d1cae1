"""Language models by recipe name: tokens or texts calibrate, each recipe beats plain rounding in its own format, files keep every bit."""

from dataclasses import replace

import pytest
import torch

import qgen
from qgen import recipes
from qgen.calibration.recorder import as_calls
from qgen.calibration.texts import Texts

transformers = pytest.importorskip("transformers", reason="the models are transformers'")

NAMES = ["awq-w4a16", "gptq-w4a16", "loftq-w4a16", "qoq-w4a8", "quarot-w4a4"]


def llama():
    """Two blocks whose embedding has channels thirty times as large, as residual streams of language models have."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight[:, ::32] *= 30
    for layer in model.model.layers:
        mix = torch.randn(128, 128) * 0.15 + torch.eye(128)
        for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight.data = reader.weight @ mix
    return model


def tokens(seed, rows=16, length=48):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_beat_rounding_and_files_keep_every_bit(name, tmp_path):
    recipe = recipes.get(name)
    assert qgen.Recipe.from_json(recipe.to_json()) == recipe
    plain = replace(recipe, default=replace(recipe.default, methods=()))
    mine, theirs = (qgen.quantize(llama(), r, calibration=tokens(1), progress=False) for r in (name, plain))
    assert mine.qgen_report[0]["path"].endswith("q_proj") and mine.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        unseen = tokens(2)
        want, got, base = (model(unseen).logits for model in (llama(), mine, theirs))
    assert (got - want).norm() < 0.95 * (base - want).norm()
    qgen.save(mine, tmp_path)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(back(unseen).logits, got)


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


def test_texts_are_cut_into_windows_in_turn():
    texts = Texts(Letters(), ["a" * 25, "bc", "d", "e" * 9], length=10, samples=4)
    assert [(int(w[0, 0]), w.shape[1]) for w in texts.windows()] == [(1, 10), (2, 2), (5, 9), (1, 10)]
    (calls,) = texts.calls(None, {"": llama()}).values()
    assert calls.calls[0].kwargs["use_cache"] is False and calls.calls[0].kwargs["input_ids"].shape == (1, 10)
    assert sum(call.moment.held for call in calls.calls) == 1
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1, vocab_size=96)
    )
    assert set(texts.calls(None, {"": encoder})[""].calls[0].kwargs) == {"input_ids"}


@pytest.mark.parametrize("documents", ["one text", [], ["x", ""]])
def test_texts_of_nothing_are_refused(documents):
    with pytest.raises(ValueError, match="text"):
        Texts(Letters(), documents).windows()


def test_texts_and_tokens_calibrate_alike():
    rows = tokens(3)
    texts = ["".join(chr(96 + i) for i in row) for row in rows.tolist()]
    by = [
        qgen.quantize(llama(), "gptq-w4a16", calibration=c, progress=False)
        for c in (rows, list(rows.split(1)), Texts(Letters(), texts))
    ]
    layers = [model.model.layers[1].mlp.up_proj.canonical() for model in by]
    assert all(torch.equal(layer["codes"], layers[0]["codes"]) for layer in layers)


def test_rows_of_tokens_are_samples():
    assert len(as_calls(tokens(0)).calls) == 16 and len(as_calls(torch.randn(16, 48)).calls) == 1
