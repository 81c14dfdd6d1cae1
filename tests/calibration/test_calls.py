"""Calls and sets of calls: what is held out, what is refused, digests, files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.calibration.files import load, save
from qgen.calibration.prompts import PROMPTS
from qgen.calibration.recorder import Recorder, as_calls
from qgen.errors import BadCheckpoint, BadData
from tests import tiny


def moments(samples, steps=1):
    return CalibrationSet(
        tuple(Call((torch.zeros(1),), {}, Moment(s, t)) for s in range(samples) for t in range(steps))
    )


@pytest.mark.parametrize("samples, held", [(2, 1), (5, 1), (10, 2), (100, 20)])
def test_whole_samples_are_held_out(samples, held):
    chosen = moments(samples, 3).hold_out()
    marks = {(c.moment.sample, c.moment.held) for c in chosen.calls}
    assert len(marks) == samples, "no sample is both fitted and held out"
    assert sum(h for _, h in marks) == held


def test_a_single_sample_is_held_out_by_step_and_says_so():
    chosen = moments(1, 10).hold_out()
    assert sum(c.moment.held for c in chosen.calls) == 2 and "held out by step" in chosen.origin


def test_one_call_is_never_held_out_and_marks_stay():
    assert not moments(1).hold_out().calls[0].moment.held
    marked = moments(10).hold_out()
    assert marked.hold_out(0.9) is marked


def test_nan_is_refused_but_masks_may_hold_infinity():
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(BadData, match=r"calibration call 1, argument kwargs\.cond\.0: holds NaN"):
        as_calls([{"x": torch.ones(2)}, {"cond": [bad]}]).check()
    as_calls({"x": torch.ones(1), "attention_mask": torch.tensor([float("-inf")])}).check()
    with pytest.raises(BadData, match="calibration holds no calls"):
        CalibrationSet(()).check()


@pytest.mark.parametrize(
    "given, args, kwargs",
    [
        (torch.ones(2), 1, 0),
        ([torch.ones(2)], 1, 0),
        ([(torch.ones(2), torch.ones(1))], 2, 0),
        ({"x": torch.ones(2)}, 0, 1),
        ([((torch.ones(2),), {"t": torch.ones(1)})], 1, 1),
    ],
    ids=["tensor", "list", "tuple", "dict", "args-kwargs"],
)
def test_what_a_call_may_be(given, args, kwargs):
    (call,) = as_calls(given).calls
    assert (len(call.args), len(call.kwargs)) == (args, kwargs)


def test_what_a_call_may_not_be():
    with pytest.raises(ValueError, match="a calibration call is a tensor, a tuple, a dict"):
        as_calls(["a picture of a cat"])


def test_the_digest_sees_every_bit():
    calls = tiny.net_calls(2, 1)
    other = tiny.net_calls(2, 1)
    assert calls.digest() == other.digest()
    other.calls[1].args[0][0, 0, 0] += 1e-6
    assert calls.digest() != other.digest()


def test_a_module_that_writes_to_its_input_does_not_change_the_calls():
    calls = as_calls([torch.randn(3, 8)])
    before = calls.digest()
    calls.calls[0].run(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    assert calls.digest() == before


def test_what_a_call_shares_stays_shared():
    x = torch.randn(2)

    class Same(nn.Module):
        def forward(self, a, b):
            return a is b

    assert Call((x,), {"b": x}).run(Same())


def test_files_there_and_back(tmp_path):
    calls = tiny.calls("pixart", 3).hold_out()
    save(calls, tmp_path / "calls.safetensors")
    again = load(tmp_path / "calls.safetensors")
    assert again.digest() == calls.digest() and again.origin == calls.origin
    assert again.calls[0].kwargs["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}


def test_shared_tensors_are_stored_once(tmp_path):
    text = torch.randn(1000)
    save(
        CalibrationSet(tuple(Call((torch.ones(1) * i,), {"text": text}, Moment(i)) for i in range(20))),
        tmp_path / "c.safetensors",
    )
    assert (tmp_path / "c.safetensors").stat().st_size < 12_000


@pytest.mark.parametrize(
    "content",
    [b"", b"no file of ours", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "],
    ids=["empty", "text", "no-header"],
)
def test_files_of_others_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match="not a file of recorded calls"):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h["calls"][0].update(kwargs=[1]), "a call is a list of arguments"),
        (lambda h: h["calls"][0].update(args={"a": 1}), "a call is a list of arguments"),
        (lambda h: h["calls"][0].update(args=[{"tensor": "t99"}]), "t99"),
        (lambda h: h["calls"][0]["moment"].update(t="noon"), "t of a call is float, found 'noon'"),
        (lambda h: h["calls"][0]["moment"].update(colour=1), "unexpected keyword argument 'colour'"),
        (lambda h: h["calls"][0].update(output=3), "an output"),
        (lambda h: h.update(calls=7), "not iterable"),
        (lambda h: h.update(origin=[]), "its origin is no text"),
        (lambda h: h.update(version=2), "recorded calls of version 2"),
    ],
)
def test_tampered_files_are_refused(tmp_path, change, words):
    path = tmp_path / "c.safetensors"
    save(tiny.net_calls(2, 1), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["qgen_calibration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(header)
    save_file(tensors, path, {"qgen_calibration": json.dumps(header)})
    with pytest.raises(BadCheckpoint, match=words):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"missing\.safetensors: not a file of recorded calls"):
        load(tmp_path / "missing.safetensors")


# -- recording ---------------------------------------------------------------------------------------------------------
def recorded(pipe, **options):
    recorder = Recorder(**{"samples": 6, "steps": 2, "batch": 2, **options.pop("recorder", {})})
    return recorder.calls(pipe, pipe.components, **options)["transformer"]


def test_prompts_are_batched_and_steps_spread():
    pipe = tiny.Pipe()
    calls = recorded(pipe, prompts=[f"p{i}" for i in range(5)])
    assert pipe.seen == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [c.moment.sample for c in calls.calls] == [0, 0, 1, 1, 2, 2]
    assert all(c.moment.t == pytest.approx(1 - c.moment.step / 3) for c in calls.calls)
    assert {c.moment.step for c in calls.calls} == {0, 1, 2}, "over the prompts every step is seen"


def test_replayed_calls_give_what_the_pipeline_saw():
    pipe, seen = tiny.Pipe(), []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    calls = recorded(pipe, prompts=["a", "b"], recorder={"steps": 3})
    hook.remove()
    for call, want in zip(calls.calls, seen, strict=True):
        assert torch.equal(call.run(pipe.transformer), want)


def test_latents_that_a_scheduler_changes_in_place_are_copied_each_time():
    class InPlace(tiny.Pipe):
        def __call__(self, prompt, generator=None):
            x = torch.randn(1, 16, 32, generator=generator)
            for _ in range(3):
                x -= self.transformer(x) / 3
            return x

    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            calls = recorded(InPlace(), prompts=["a"], recorder={"steps": 3})
        first, second, third = (c.args[0] for c in calls.calls)
        assert not torch.equal(first, second) and not torch.equal(second, third)


def test_one_prompt_as_text_is_one_prompt():
    pipe = tiny.Pipe()
    recorded(pipe, prompts="a red fox")
    assert pipe.seen == [["a red fox"]]


def test_no_prompts_is_an_error_and_default_prompts_are_many():
    with pytest.raises(ValueError, match="at least one prompt"):
        recorded(tiny.Pipe(), prompts=[])
    assert len(set(PROMPTS)) == len(PROMPTS) >= 128
    pipe = tiny.Pipe()
    recorded(pipe)
    assert pipe.seen[0] == list(PROMPTS[:2])


def test_the_same_seed_records_the_same_calls():
    a, b, c = (recorded(tiny.Pipe(), prompts=["a", "b"], seed=s).digest() for s in (1, 1, 2))
    assert a == b != c


def test_hooks_are_gone_even_after_an_error():
    class Broken(tiny.Pipe):
        def __call__(self, prompt):
            raise RuntimeError("no power")

    pipe = Broken()
    with pytest.raises(RuntimeError, match="no power"):
        recorded(pipe, prompts=["a"])
    assert not pipe.transformer._forward_pre_hooks


def test_a_bare_module_cannot_be_driven():
    with pytest.raises(ValueError, match=r"is no pipeline .* pass calibration=\[\.\.\.\]"):
        Recorder().calls(tiny.net(), {"": tiny.net()})


# -- the verbs of a folder that has no __init__.py -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "first", ["qgen.calibration.recorder", "qgen.calibration.base", "qgen.calibration", "qgen.engine"]
)
def test_the_verbs_are_there_whatever_was_imported_first(first):
    code = f"import {first}, qgen; c = qgen.calibration; print(c.record.__name__, c.save.__name__, c.load.__name__, hasattr(c, 'x'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["record", "save", "load", "False"], done.stderr


# -- one bad call of many ------------------------------------------------------------------------------------------------
def test_a_bad_call_of_ten_is_dropped_and_named(caplog):
    calls = moments(5, 2)
    calls.calls[3].args[0][0] = float("nan")
    left = calls.clean()
    assert len(left.calls) == 9 and calls.calls[3] not in left.calls
    assert left.dropped == ("sample 1, step 1: argument args.0 holds NaN or infinity",)
    assert "calibration call dropped: sample 1, step 1: argument args.0" in caplog.text
    assert left.clean() is left and moments(5, 2).clean().dropped == ()


def test_two_bad_calls_of_ten_are_no_accident():
    calls = moments(5, 2)
    for number in (3, 7):
        calls.calls[number].args[0][0] = float("inf")
    with pytest.raises(BadData, match=r"calibration call 3, argument args\.0: holds NaN"):
        calls.clean()
    once = moments(5, 2).without({0: "argument x"})
    with pytest.raises(
        BadData, match=r"2 of 10 calibration calls hold NaN or infinity, at most a tenth can be left out"
    ):
        once.without({0: "argument x"})


@pytest.mark.parametrize(
    "prompts, parameters, batch", [(1, 1e6, 1), (16, 1e6, 1), (64, 1e6, 6), (192, 1e6, 16), (192, 1e9, 1)]
)
def test_there_are_ten_runs_to_hold_out_of(prompts, parameters, batch):
    from qgen.calibration.recorder import _batch

    assert _batch(prompts, parameters) == batch
