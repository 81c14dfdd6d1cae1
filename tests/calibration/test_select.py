"""Which calls of a run are kept: by weights, labelled rightly, branches apart."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qgen.calibration.base import Call, Moment, calibrators
from qgen.calibration.recorder import Recorder, split_branches
from qgen.calibration.select import FewStep, Importance, LogSNR, NormalSteps, stratified
from qgen.calibration.timeline import log_snr, unit_of


class Net(nn.Module):
    """Answers with its timestep, so that every recorded input tells where it was recorded."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, timestep):
        return x * 0 + timestep.reshape(-1, 1)


class Pipe:
    """Twenty calls of a net on both halves of guidance; x holds the timestep that belongs to it."""

    def __init__(self, steps=20):
        self.net, self.steps = Net(), steps
        self.scheduler = SimpleNamespace(config={"prediction_type": "flow_prediction"})

    def __call__(self, prompt, generator=None):
        for t in torch.linspace(999, 49, self.steps):
            self.net(torch.full((2 * len(prompt), 1), float(t)), timestep=t.expand(2 * len(prompt)))


def recorded(recorder, steps=20, n=12):
    pipe = Pipe(steps)
    return recorder.calls(pipe, {"net": pipe.net}, [f"p{i}" for i in range(n)])["net"].calls


def test_all_are_registered():
    assert {"uniform", "logsnr", "normal", "importance", "few-step", "recorder", "synthetic", "batchnorm"} <= set(
        calibrators
    )


@pytest.mark.parametrize("kind", [Recorder, LogSNR, NormalSteps, Importance, FewStep])
def test_label_and_input_belong_together(kind):
    """Card PTQ4DM, test 3: the stored timestep is the one of the stored input."""
    calls = recorded(kind(samples=12, steps=5, batch=2))
    assert calls and all(float(call.args[0][0, 0]) == call.moment.t for call in calls)
    assert all(
        call.moment.log_snr == log_snr(SimpleNamespace(config={"use_flow_sigmas": True}), call.moment.t)
        for call in calls
    )
    assert all(call.output is None for call in calls)


@pytest.mark.parametrize("kind", [Recorder, LogSNR, NormalSteps, Importance])
def test_each_run_gives_so_many_different_calls(kind):
    calls = recorded(kind(samples=12, steps=5, batch=2))
    assert len(calls) == 6 * 5 and len({(c.moment.sample, c.moment.step) for c in calls}) == 30


def test_log_snr_calls_cover_its_axis_more_evenly_than_uniform_ones():
    def widest(calls):
        at = sorted(c.moment.log_snr for c in calls)
        return max(b - a for a, b in pairwise(at))

    def share_of_ends(calls):
        return sum(abs(c.moment.log_snr) > 3 for c in calls) / len(calls)

    uniform, even = (recorded(kind(samples=24, steps=4, batch=1), n=24) for kind in (Recorder, LogSNR))
    assert share_of_ends(even) > 1.5 * share_of_ends(uniform)
    assert widest(even) <= widest(uniform) + 1e-9


def test_normal_steps_lie_around_their_mean():
    near = recorded(NormalSteps(samples=24, steps=4, batch=1, mean=0.2, std=0.1), n=24)
    t = torch.tensor([c.moment.t for c in near]) / 1000
    assert abs(float(t.mean()) - 0.2) < 0.08 and float(t.max()) < 0.7
    with pytest.raises(ValueError, match="positive"):
        recorded(NormalSteps(std=0.0))


def test_importance_prefers_calls_whose_output_changes():
    run = [
        Call((), {}, Moment(step=i), torch.tensor([float(v)])) for i, v in enumerate([10, 10, 10, 10, 20, 40, 40, 40])
    ]
    assert Importance().weights(run).argsort()[-2:].sort().values.tolist() == [4, 5]


def test_few_step_keeps_every_call_and_more_prompts():
    calls = recorded(FewStep(samples=4, steps=8, batch=1), steps=4)
    assert len(calls) == 32
    assert {(c.moment.sample, c.moment.step) for c in calls} == {(s, i) for s in range(8) for i in range(4)}


def test_branches_are_kept_apart_and_make_the_whole():
    whole, halves = recorded(Recorder(steps=3, batch=2)), recorded(Recorder(steps=3, batch=2, branches=True))
    assert len(halves) == 2 * len(whole)
    for call, a, b in zip(whole, halves[::2], halves[1::2], strict=True):
        assert (a.moment.branch, b.moment.branch) == ("uncond", "cond")
        assert torch.equal(torch.cat([a.args[0], b.args[0]]), call.args[0])
        assert torch.equal(torch.cat([a.kwargs["timestep"], b.kwargs["timestep"]]), call.kwargs["timestep"])
    alone = Call((torch.zeros(3, 1),), {})
    assert split_branches(alone, 2) == [alone]


@pytest.mark.parametrize("n, count", [(20, 5), (4, 4), (3, 9), (1, 1)])
def test_stratified_draws_differ_and_follow_equal_weights(n, count):
    drawn = stratified(torch.ones(n), count, 0.3)
    assert len(set(drawn)) == len(drawn) == min(n, count)
    if n > count:
        assert drawn == [int((i + 0.3) * n / count) for i in range(count)]
    assert len(stratified(torch.zeros(n), count, 0.0)) == min(n, count)


def test_log_snr_of_both_kinds_of_schedulers():
    table = torch.linspace(0.9999, 0.0001, 1000)
    vp = SimpleNamespace(config={}, alphas_cumprod=table)
    assert log_snr(vp, 500) == pytest.approx(float((table[500] / (1 - table[500])).log()), abs=1e-4)
    flow = type("FlowMatchEuler", (), {"config": {}})()
    assert log_snr(flow, 500.0) == pytest.approx(0, abs=1e-6) and log_snr(flow, 0.25, 1.0) == pytest.approx(
        2.1972, abs=1e-3
    )
    assert log_snr(flow, 0.0) == 14 and log_snr(SimpleNamespace(), 5.0) is None
    assert unit_of([0.2, 1.0]) == 1 and unit_of([0.2, 7, None]) == 1000


def test_a_scheduler_of_unknown_noise_is_refused_by_log_snr_alone():
    pipe = Pipe()
    pipe.scheduler = SimpleNamespace(config={})
    with pytest.raises(ValueError, match="log-SNR of this pipeline"):
        LogSNR().calls(pipe, {"net": pipe.net}, ["a"])
    assert Recorder().calls(pipe, {"net": pipe.net}, ["a"])["net"].calls[0].moment.log_snr is None
