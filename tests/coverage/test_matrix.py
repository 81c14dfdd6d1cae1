"""A dozen rows of the matrix, of every shape of model there is; `python -m tests.coverage_matrix` runs them all."""

import pytest

from tests.coverage import check, denoisers, language

pytest.importorskip("diffusers", reason="the classes are diffusers'")

FAST = (
    "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel", "SanaTransformer2DModel",
    "HunyuanVideo15Transformer3DModel", "UNet2DConditionModel", "StableAudioDiTModel",
)  # fmt: skip
WORDS = ("LlamaForCausalLM", "MixtralForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel", "T5EncoderModel", "ViTModel")


@pytest.mark.parametrize(
    "group, name", [*((denoisers, n) for n in FAST), *((language, n) for n in WORDS)], ids=[*FAST, *WORDS]
)
def test_a_row_of_the_matrix(group, name):
    row = check.check(name, *group.model_and_call(name))
    assert not row.reason, row
    assert row.packed and row.saved


def test_every_case_is_a_class():
    """A class that was renamed would leave the matrix without a word."""
    assert set(denoisers.CASES) <= set(denoisers.classes())
    assert set(language.CASES) == set(language.classes())
    assert len(denoisers.classes()) >= 90 and len(language.classes()) >= 40


def test_a_wrong_number_is_seen():
    """The judge can fail: a model that reads a weight past its layer, and an error of a tenth."""
    import torch

    assert abs(check.sqnr(torch.ones(10) * 0.9, torch.ones(10)) - 20) < 1e-4
    row = check.check("none", lambda: torch.nn.Linear(64, 64), None)
    assert row.reason
