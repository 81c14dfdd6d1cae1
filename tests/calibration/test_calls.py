"""Calls and sets of calls: what is held out, what is refused, digests, files."""

import pytest
import torch
from torch import nn

from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.calibration.prompts import PROMPTS
from qgen.calibration.recorder import Recorder, as_calls, load, save
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
