"""The whole way: errors fall on calls nobody was fitted to, slots stay, files hold it, nothing changes when it fails, killed runs go on."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.calibration.recorder import Recorder
from qgen.errors import BadCheckpoint, BadData, NotQuantizable
from qgen.methods.bias import BiasCorrection
from qgen.methods.lowrank import LowRank
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Spec
from qgen.train import tunings
from qgen.train.efficientdm import EfficientDM
from qgen.train.full import Full
from tests.tiny import FAMILIES, Pipe, first, net, net_call, net_calls, same, snapshot

RECIPE = Recipe(Spec("int4_g64", "int4_g64", (LowRank(4), BiasCorrection())))
ROUNDED = Recipe(Spec("int3_g64", "int4_g64"))
BRANCHED = Recipe(Spec("int2_g64", "int8_row", (LowRank(8),)))
METHODS = ("full", "efficientdm", "quest", "qvgen", "scales", "lowrank", "bias", "qzo")


def quantized(recipe=RECIPE, blocks=1):
    return qgen.quantize(net(blocks), recipe, calibration=net_calls(), progress=False)


def lessons(samples=10, steps=4):
    return CalibrationSet(tuple(net_call(50 + s, t, 8) for s in range(samples) for t in range(steps)))


def unseen(student, teacher):
    """Mean relative error on calls of other noise."""
    lost = []
    with torch.no_grad():
        for call in net_calls(8, 2).calls:
            call = Call(call.args, call.kwargs)
            want = first(call.run(teacher))
            lost.append(float((first(call.run(student)) - want).square().sum() / want.square().sum()))
    return sum(lost) / len(lost)


def worsened(student, slot):
    """Biases that are off by noise, or scales that are 15 % too large: what these methods are to find."""
    for layer in student.modules():
        if isinstance(layer, Packed):
            t = getattr(layer, slot)
            t.add_(0.1 * torch.randn(t.shape)) if slot == "bias" else t.mul_(1.15)


@pytest.mark.parametrize("name", METHODS)
def test_methods_lower_the_error_on_unseen_calls_and_add_no_tensor(name):
    teacher, student = net(1), quantized({"lowrank": BRANCHED, "bias": RECIPE, "qzo": RECIPE}.get(name, ROUNDED))
    if name in ("bias", "qzo"):
        worsened(student, {"bias": "bias", "qzo": "scales"}[name])
    before, slots = unseen(student, teacher), {n: (t.shape, t.dtype) for n, t in student.state_dict().items()}
    method = tunings["qzo"](rate=0.05) if name == "qzo" else name
    assert qgen.finetune(student, teacher, method, steps=40, calibration=lessons(), progress=False) is student
    told = student.qgen_tuning
    assert told["method"] == name and len(told["curve"]) == 40 and told["held"][told["best"]] < told["held"][0]
    assert {n: (t.shape, t.dtype) for n, t in student.state_dict().items()} == slots
    assert unseen(student, teacher) < 0.97 * before, (unseen(student, teacher), before)


def test_what_was_trained_is_what_is_packed_saved_and_loaded(tmp_path):
    make, call = FAMILIES["pixart"]
    calls = CalibrationSet(tuple(call(seed) for seed in range(10)))
    teacher = make()
    student = qgen.quantize(make(), ROUNDED, calibration=calls, progress=False)
    names = set(student.state_dict())
    qgen.prepare(student, "reference")
    qgen.finetune(student, teacher, EfficientDM(rate=0.2), steps=50, calibration=calls, progress=False)
    assert student.qgen_tuning["best"] > 0 and set(student.state_dict()) == names
    report = [row for row in student.qgen_report if row["path"] == "(output)"]
    assert len(report) == 1 and "efficientdm" in report[0]["why"]
    want = first(calls.calls[0].run(student))
    qgen.save(student, tmp_path / "tuned")
    loaded = qgen.load(tmp_path / "tuned")
    qgen.prepare(loaded, "reference")
    assert torch.equal(first(calls.calls[0].run(loaded)), want)
    # the error that the last fake-quantized look saw is the packed model's
    held = [c for c in calls.hold_out().calls if c.moment.held]
    errors = []
    for c in held:
        y = first(c.run(teacher))
        errors.append(
            float(((first(c.run(loaded)) - y).square().flatten(1).sum(1) / y.square().flatten(1).sum(1)).mean())
        )
    assert errors == pytest.approx(student.qgen_tuning["after"], rel=1e-5)


def test_the_calls_are_the_teachers_own_trajectory():
    """Also where the student would walk elsewhere: the same curve as from calls that the teacher's pipeline recorded before."""
    curves = []
    for given in (None, "recorded"):
        teacher, student = Pipe(), Pipe()
        qgen.quantize(student, Recipe(Spec("int2_g32", "int4_g64")), prompts=["a", "b", "c", "d"], progress=False)
        calls = qgen.calibration.record(teacher, ["a", "b", "c", "d", "e"], progress=False) if given else None
        prompts = None if given else ["a", "b", "c", "d", "e"]
        student.seen.clear()
        qgen.finetune(student, teacher, "scales", steps=6, prompts=prompts, calibration=calls, progress=False)
        assert not student.seen, "the student draws nothing"
        curves.append(student.transformer.qgen_tuning["curve"])
    assert curves[0] == curves[1]


def test_a_recorder_and_a_weight_by_moment():
    teacher, student = Pipe(), Pipe()
    qgen.quantize(student, ROUNDED, prompts=["a", "b", "c"], progress=False)
    seen = []

    def weight(moment):
        seen.append(moment.t)
        return 0.0

    before = snapshot(student.transformer)
    options = {"calibration": Recorder(samples=4, steps=3, batch=1), "prompts": ["a", "b", "c", "d"], "progress": False}
    qgen.finetune(student, teacher, Full(scale_rate=0.0), steps=9, weight=weight, **options)
    assert same(student.transformer, before) and student.transformer.qgen_tuning["curve"] == [0.0] * 9
    assert len(set(seen)) == 3, "all timesteps take part"


# -- nothing changes when it fails ---------------------------------------------------------------------------------------
class Stops:
    """A bar that raises at its third update."""

    def __init__(self, error):
        self.error, self.count = error, 0

    def __call__(self, *args, **kwargs):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def set_postfix_str(self, text):
        pass

    def update(self, n):
        self.count += n
        if self.count == 3:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_it_is_as_before(error):
    teacher, student = net(1), quantized()
    before, want = snapshot(student), first(net_call().run(student))
    kernels = {p: m.kernel for p, m in student.named_modules() if hasattr(m, "kernel")}
    with pytest.raises((KeyboardInterrupt, OSError)):
        qgen.finetune(student, teacher, "full", steps=9, calibration=lessons(), progress=Stops(error))
    assert same(student, before) and torch.equal(first(net_call().run(student)), want)
    assert {p: m.kernel for p, m in student.named_modules() if hasattr(m, "kernel")} == kernels
    assert not hasattr(student, "qgen_tuning")
    assert all("forward" not in m.__dict__ for m in student.modules())


def test_nan_ends_the_run_with_the_best_state_and_says_so(caplog):
    """A rate so high that weights overflow: what was best before is kept, and if nothing was, the model is as it was."""
    teacher, student = net(1), quantized()
    before = snapshot(student)
    with caplog.at_level(logging.WARNING, "qgen"):
        qgen.finetune(student, teacher, Full(slot_rate=1e30), steps=20, every=5, calibration=lessons(), progress=False)
    assert same(student, before) and student.qgen_tuning["best"] == 0 and len(student.qgen_tuning["curve"]) < 20
    assert "unchanged" in caplog.text and "step" in caplog.text


class Bursts(Full):
    """`full` whose distance is NaN from some step on."""

    name = "full"
    calls = 0

    def distance(self, got, want):
        Bursts.calls += got.requires_grad
        return super().distance(got, want) * (float("nan") if Bursts.calls > 30 and got.requires_grad else 1.0)


def test_nan_after_an_improvement_keeps_the_improvement(caplog):
    teacher, student = net(1), quantized(ROUNDED)
    before = unseen(student, teacher)
    Bursts.calls = 0
    with caplog.at_level(logging.WARNING, "qgen"):
        qgen.finetune(student, teacher, Bursts(), steps=60, every=10, calibration=lessons(), progress=False)
    told = student.qgen_tuning
    assert told["best"] in (10, 20, 30) and f"step {told['best']}" in caplog.text
    assert unseen(student, teacher) < before


def test_a_call_without_a_finite_answer_is_left_out_and_named(caplog):
    good = lessons(4, 2).calls
    bad = Call(good[3].args, good[3].kwargs, Moment(sample=9, step=7), output=torch.full((2, 24, 32), torch.nan))
    teacher, student = net(1), quantized()
    with caplog.at_level(logging.WARNING, "qgen"):
        qgen.finetune(
            student, teacher, "bias", steps=4, calibration=CalibrationSet((*good, bad)).hold_out(), progress=False
        )
    assert "step=7" in caplog.text and "left out" in caplog.text
    with pytest.raises(BadData, match="no call is left"):
        qgen.finetune(student, teacher, "bias", steps=4, calibration=CalibrationSet((bad, bad)), progress=False)


def test_bad_input_is_refused_before_anything_happens():
    teacher, student = net(1), quantized()
    before, calls = snapshot(student), lessons()
    with pytest.raises(ValueError, match="efficientdm"):
        qgen.finetune(student, teacher, "eficientdm", calibration=calls)
    with pytest.raises(ValueError, match="steps=0"):
        qgen.finetune(student, teacher, steps=0, calibration=calls)
    with pytest.raises(NotQuantizable, match="no quantized layer"):
        qgen.finetune(teacher, teacher, calibration=calls)
    with pytest.raises(NotQuantizable, match="16-bit"):
        qgen.finetune(student, copy.deepcopy(student), calibration=calls)
    with pytest.raises(ValueError, match="pass the teacher"):
        qgen.finetune(student, None, calibration=calls, progress=False)
    with pytest.raises(ValueError, match="low-rank branch"):
        qgen.finetune(quantized(ROUNDED), teacher, "lowrank", calibration=calls, progress=False)
    with pytest.raises(ValueError, match="one by one"):
        books = qgen.quantize(net(1), Recipe(Spec("vq2_d4")), calibration=net_calls(), progress=False)
        qgen.finetune(books, teacher, "full", calibration=calls, progress=False)
    with pytest.raises(ValueError, match="phases"):
        qgen.finetune(student, teacher, "qvgen", steps=5, calibration=calls, progress=False)
    broken = net(1)
    broken.head.weight.data[0, 0] = torch.nan
    with pytest.raises(BadData, match="head"):
        qgen.finetune(student, broken, calibration=calls)
    assert same(student, before)


def test_answers_in_the_calls_take_the_place_of_a_teacher():
    teacher, curves = net(1), []
    with torch.no_grad():
        told = [Call(c.args, c.kwargs, c.moment, first(c.run(teacher))) for c in lessons().calls]
    for given, calls in ((teacher, lessons()), (None, CalibrationSet(tuple(told)))):
        student = quantized()
        qgen.finetune(student, given, "bias", steps=5, calibration=calls, progress=False)
        curves.append(student.qgen_tuning["curve"])
    assert curves[0] == curves[1]


# -- progress on disk ----------------------------------------------------------------------------------------------------
PROGRAM = """
import json, sys, time, torch
torch.set_num_threads(1)
import qgen
from qgen.calibration.base import CalibrationSet
from qgen.recipe import Recipe, Spec
from qgen.train import tunings
from tests.tiny import net, net_call
from tests.train.test_finetune import lessons, quantized, ROUNDED
method, folder, slow = sys.argv[1], sys.argv[2], float(sys.argv[3])
student = quantized(ROUNDED)
kind = tunings[method]
if slow:
    before = kind.before
    kind.before = lambda self, *a: (time.sleep(slow), before(self, *a))[1]
qgen.finetune(student, net(1), method, steps=40, every=4, batch=2, calibration=lessons(6, 2), checkpoint=folder, progress=False)
told = student.qgen_tuning
print(json.dumps([told["curve"], {str(k): v for k, v in told["held"].items()}, told["best"],
    {n: t.reshape(-1).view(torch.uint8).sum().item() for n, t in student.state_dict().items() if not n.endswith("weight")}]))
"""


def program(method, folder, slow=0.0):
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, method, str(folder), str(slow)]
    return subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qvgen", "efficientdm", "qzo"])
def test_a_killed_run_goes_on_with_the_same_curve_bit_for_bit(method, tmp_path):
    whole, _ = program(method, tmp_path / "whole").communicate()
    killed = program(method, tmp_path / "killed", slow=0.05)
    file = tmp_path / "killed" / "tuning-module.safetensors"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and killed.poll() is None and (not file.exists() or steps_in(file) < 8):
        time.sleep(0.02)
    assert killed.poll() is None, "it was to be killed before its end"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert 8 <= steps_in(file) < 40
    again, _ = program(method, tmp_path / "killed").communicate()
    assert json.loads(again) == json.loads(whole) and len(json.loads(whole)[0]) == 40


def steps_in(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["qgen_tuning"])["step"]


def test_progress_in_one_process_is_continued_and_of_another_job_refused(tmp_path):
    def tune(folder, steps=12, progress=False, seed=0):
        teacher, student = net(1), quantized(ROUNDED)
        options = {"steps": steps, "every": 3, "checkpoint": folder, "progress": progress, "seed": seed}
        qgen.finetune(student, teacher, "qvgen", calibration=lessons(6, 2), **options)
        return student

    whole = tune(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "b", progress=Stops(KeyboardInterrupt()))
    gone_on = tune(tmp_path / "b")
    assert gone_on.qgen_tuning == whole.qgen_tuning and same(gone_on, snapshot(whole))
    finished = tune(tmp_path / "b")
    assert finished.qgen_tuning == whole.qgen_tuning and same(finished, snapshot(whole))
    with pytest.raises(BadCheckpoint, match=r"another job .*seed"):
        tune(tmp_path / "b", seed=1)
    (tmp_path / "b" / "tuning-module.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(BadCheckpoint, match="delete it"):
        tune(tmp_path / "b")


def test_a_pipeline_is_tuned_through_its_module_alone():
    teacher, student = Pipe(), Pipe()
    qgen.quantize(student, ROUNDED, prompts=["a", "b", "c"], progress=False)
    calls = qgen.calibration.record(teacher, ["a", "b", "c", "d"], progress=False)
    qgen.finetune(student.transformer, teacher.transformer, "scales", steps=4, calibration=calls, progress=False)
    assert isinstance(student.transformer, nn.Module) and student.transformer.qgen_tuning["method"] == "scales"
