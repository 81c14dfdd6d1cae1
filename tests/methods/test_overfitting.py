"""Few prompts on the shipped pipeline: what is held out is text that nothing was fitted to, and no layer loses by GPTQ there."""

import pytest
import torch

import qgen
from qgen.calibration.recorder import Recorder
from qgen.demo import demo_prompts


@pytest.fixture(scope="module")
def calls(make_demo_pipe):
    pipe = make_demo_pipe()
    prompts = demo_prompts("calibration")[:16]
    return Recorder(samples=16, steps=3).calls(pipe, {"transformer": pipe.transformer}, prompts)["transformer"]


@pytest.mark.slow
def test_of_sixteen_prompts_some_texts_are_held_out(calls):
    assert "held out by step" not in calls.origin
    texts = {True: set(), False: set()}
    for call in calls.calls:
        cond = call.kwargs["encoder_hidden_states"][-1]  # the half that has the text
        texts[call.moment.held].add(cond.numpy().tobytes())
    assert len(texts[True]) == 3 and len(texts[False]) == 13 and not texts[True] & texts[False]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["svdquant-int4", "w4a8"])
def test_no_layer_is_worse_than_rounding_to_nearest_with_refits(make_demo_pipe, calls, recipe):
    """On held-out calls, against the error that the log noted when the low-rank branch had been refitted and nothing else done."""
    pipe = qgen.quantize(make_demo_pipe(), recipe, calibration=calls, progress=False)
    rows = [row for row in pipe.transformer.qgen_report if "lowrank" in row.get("log", {})]
    assert len(rows) > 40
    before = torch.tensor([float(row["log"]["lowrank"]) for row in rows])
    after = torch.tensor([10 ** (-row["sqnr_db"] / 10) for row in rows])
    worst = float((after / before).max())
    assert worst <= 1.006, f"{rows[int((after / before).argmax())]['path']}: {worst:.3f}"  # the log has three digits
    assert float((after / before).log().mean().exp()) < 0.97
    assert all("sqnr_fit_db" in row for row in rows), "both errors are in the report"
