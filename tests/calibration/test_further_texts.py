"""Further texts: prompts beyond those that are drawn, which layers that read text alone are fitted to as well."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qgen
from qgen import Recipe, Spec, waves
from qgen.calibration.base import CalibrationSet
from qgen.calibration.files import load, save
from qgen.calibration.recorder import Recorder
from qgen.calibration.select import FewStep
from qgen.demo import demo_prompts
from qgen.errors import BadCheckpoint
from qgen.methods.gptq import GPTQ
from qgen.probe import probe

RECORDER = Recorder(samples=3, steps=2, texts=10, held=0.34)


def record(pipe, recorder=RECORDER, **options):
    options.setdefault("call_kwargs", {"num_inference_steps": 4})
    parts = {"transformer": pipe.transformer}
    return recorder.calls(pipe, parts, demo_prompts("calibration"), **options)["transformer"]


@pytest.fixture(scope="module")
def pipe():
    return qgen.demo_pipeline()


@pytest.fixture(scope="module")
def calls(pipe):
    return record(pipe)


def text_of(call):
    return call.kwargs["encoder_hidden_states"].flatten(1)


def test_every_further_prompt_is_one_call(pipe, calls):
    """And calls of the prompts that are drawn are what they are without."""
    assert len(calls.calls) == 6 and len(calls.texts) == 7 and "7 more texts" in calls.origin
    assert {c.moment.sample for c in calls.texts}.isdisjoint(c.moment.sample for c in calls.calls)
    texts = torch.stack([text_of(c)[-1] for c in (*calls.calls[::2], *calls.texts)])
    assert torch.cdist(texts, texts).fill_diagonal_(1).min() > 1e-3, "no text comes twice"
    assert 0 < sum(c.moment.held for c in calls.texts) < 7
    alone = record(pipe, replace(RECORDER, texts=3))
    assert not alone.texts and alone.digest() == CalibrationSet(calls.calls).digest() != calls.digest()


def test_they_reach_layers_that_read_text_and_no_other(pipe, calls):
    module = pipe.transformer
    sites = [s for s in probe(module, calls.calls[0]) if s.block.endswith("blocks.0")]
    spec = Spec("int4_g64", "int8_row", (GPTQ(),))
    (wave,) = waves.plan([(s, spec) for s in sites], 1 << 40)
    quiet = lambda items, **_: items  # noqa: E731
    alone, more = (waves.measure(module, wave, c, 0, quiet) for c in (replace(calls, texts=()), calls))
    rows = []
    layer = module.transformer_blocks[0].attn2.to_k
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2).double()))
    for call in calls.numbered:
        if not call.moment.held:
            call.run(module)
    hook.remove()
    want = torch.cat(rows)
    seen = {site.path.removeprefix("transformer_blocks.0."): site for site in sites}
    assert seen["attn2.to_k"].role == "context" and seen["attn2.to_q"].role == "inside"
    got = more[seen["attn2.to_k"].shares]
    assert torch.allclose(got.gram.double(), want.T @ want / len(want), rtol=1e-4, atol=1e-6)
    assert len(got.held) > len(alone[seen["attn2.to_k"].shares].held), "they judge as well"
    for name in ("attn1.to_q", "attn2.to_q", "ff.net.2"):
        shares = seen[name].shares
        assert torch.equal(more[shares].gram, alone[shares].gram) and torch.equal(more[shares].fit, alone[shares].fit)


def test_what_text_layers_become_depends_on_them(calls):
    recipe = Recipe(Spec("int4_g64", "int8_row", (GPTQ(),)))
    made = {}
    for name, some in (("alone", replace(calls, texts=())), ("more", calls)):
        pipe = qgen.quantize(qgen.demo_pipeline(), recipe, calibration=some, progress=False)
        made[name] = pipe.transformer.transformer_blocks[0]
    same = lambda path: torch.equal(*(block.get_submodule(path).codes for block in made.values()))  # noqa: E731
    assert same("attn1.to_q") and not same("attn2.to_k")


def test_files_hold_them(calls, tmp_path):
    path = tmp_path / "calls.safetensors"
    save(calls, path)
    assert load(path).digest() == calls.digest() and len(load(path).texts) == 7
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["qgen_calibration"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"qgen_calibration": json.dumps({**header, "texts": [{"args": 1}]})})
    with pytest.raises(BadCheckpoint, match="not a file of recorded calls"):
        load(path)
    header.pop("texts")  # as older files are
    save_file(tensors, path, {"qgen_calibration": json.dumps(header)})
    assert not load(path).texts and len(load(path).calls) == 6


def test_a_spoilt_one_is_dropped_and_named(calls):
    some = tuple(replace(c, kwargs={n: _copied(v) for n, v in c.kwargs.items()}) for c in calls.texts)
    some[2].kwargs["encoder_hidden_states"][0, 0, 0] = torch.nan
    clean = replace(calls, texts=some).clean()
    assert len(clean.calls) == 6 and len(clean.texts) == 6
    assert clean.dropped == (
        f"sample {some[2].moment.sample}, step 0, timestep 999: argument kwargs.encoder_hidden_states holds NaN or infinity",
    )


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_a_pipeline_that_cannot_draw_one_step_goes_without(caplog):
    class Stubborn(type(qgen.demo_pipeline())):
        def __call__(self, prompt=None, num_inference_steps=4, **options):
            if num_inference_steps < 2:
                raise ValueError("two steps at least")
            return super().__call__(prompt=prompt, num_inference_steps=num_inference_steps, **options)

    pipe = qgen.demo_pipeline()
    pipe.__class__ = Stubborn
    with caplog.at_level(logging.WARNING, "qgen"):
        calls = record(pipe)
    assert len(calls.calls) == 6 and not calls.texts and "two steps at least" in caplog.text


def test_a_text_that_was_drawn_or_comes_again_is_none():
    pipe, prompts = qgen.demo_pipeline(), ["a", "b", "c", "a", "d", "d", "e"]
    assert RECORDER._further(pipe, prompts, {}) == ["d", "e"]
    parts = {"transformer": pipe.transformer}
    calls = RECORDER.calls(pipe, parts, ["a"] * 9, {"num_inference_steps": 2})["transformer"]
    assert len(calls.calls) == 6 and not calls.texts and "more texts" not in calls.origin


def test_embeddings_take_the_place_of_prompts(pipe):
    """Among the arguments of the call they are one sample; as inputs, one for each."""
    text, mask, *_ = pipe.encode_prompt(["a cat", "a dog", "a house"], do_classifier_free_guidance=False)
    given = {"prompt_embeds": text, "prompt_attention_mask": mask}
    calls = record(pipe, call_kwargs={"num_inference_steps": 4, **given})
    assert len(calls.calls) == 2 and not calls.texts
    assert torch.equal(calls.calls[0].kwargs["encoder_hidden_states"][-3:], text)
    calls = record(pipe, replace(RECORDER, inputs=given, batch=1))
    assert len(calls.calls) == 6 and not calls.texts
    for call in calls.calls:
        assert torch.equal(call.kwargs["encoder_hidden_states"][-1:], text[call.moment.sample][None])


def test_only_what_got_further_texts_says_so(pipe):
    """One step of two experts' pipeline calls the one for high noise alone."""
    idle = torch.nn.Linear(4, 4)

    class Second(type(pipe)):
        def __call__(self, prompt=None, num_inference_steps=4, **options):
            if num_inference_steps > 1:
                idle(torch.ones(len(prompt), 4))
            return super().__call__(prompt=prompt, num_inference_steps=num_inference_steps, **options)

    twice = qgen.demo_pipeline()
    twice.__class__ = Second
    parts = {"transformer": twice.transformer, "transformer_2": idle}
    sets = RECORDER.calls(twice, parts, demo_prompts("calibration"), {"num_inference_steps": 2})
    assert "7 more texts" in sets["transformer"].origin and len(sets["transformer"].texts) == 7
    assert "more texts" not in sets["transformer_2"].origin and not sets["transformer_2"].texts


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"steps": 0}, {"texts": -1}, {"batch": -1}, {"held": 1.0}, {"held": -0.1}]
)
def test_numbers_that_say_nothing(wrong):
    with pytest.raises(ValueError, match=f"found .*{next(iter(wrong.values()))}"):
        Recorder(**wrong)


@pytest.mark.parametrize("options", [{"timesteps": [999, 500]}, {"sigmas": [1.0, 0.5]}])
def test_none_where_steps_are_told_otherwise(pipe, options):
    assert RECORDER._further(pipe, demo_prompts("calibration"), {}) and not RECORDER._further(
        pipe, demo_prompts("calibration"), options
    )


def test_calibrators_that_choose_steps_keep_every_text(pipe):
    calls = record(pipe, FewStep(samples=2, steps=2, texts=6))
    assert len(calls.calls) == 4 and len(calls.texts) == 5, "one prompt of four calls"
