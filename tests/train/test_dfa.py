"""Weights by the sampler's factors: the weighted loss is the squared error of the latents that the sampler makes next."""

import copy

import pytest
import torch

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.recipe import Recipe, Spec
from qgen.train.dfa import factors, weights
from qgen.train.distill import Lessons
from tests.tiny import first, net

diffusers = pytest.importorskip("diffusers", reason="the samplers are diffusers'")
STEPS = 10


def samplers():
    ddim = {"beta_schedule": "scaled_linear", "clip_sample": False}
    yield "ddim", diffusers.DDIMScheduler(**ddim), {}
    yield "ddim, v, eta 1", diffusers.DDIMScheduler(**ddim, prediction_type="v_prediction"), {"eta": 1.0}
    yield "flow", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {}
    yield "dpm++ 2m", diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear"), {}


@pytest.mark.parametrize("scheduler, step", [s[1:] for s in samplers()], ids=[s[0] for s in samplers()])
def test_the_loss_is_the_squared_error_of_the_next_latents(scheduler, step):
    """Card of low-bit floats, test 5: against the sampler itself, along the teacher's trajectory, for every step."""
    teacher = net()
    student = qgen.quantize(net(), Recipe(Spec("int4_g64", "int8_row")), progress=False)
    scheduler.set_timesteps(STEPS)
    g = torch.Generator().manual_seed(0)
    x, calls, wanted = torch.randn(2, 24, 32, generator=g), [], []
    for i, t in enumerate(scheduler.timesteps):
        call = Call((x,), {"timestep": t.expand(2).float()}, Moment(0, i, float(t)))
        answers = [first(call.run(model)) for model in (student, teacher)]
        options = {**step, "return_dict": False}
        if "eta" in step:
            options["variance_noise"] = torch.randn(x.shape, generator=g)
        twin = copy.deepcopy(scheduler)  # with the teacher's answers so far, as the sampler that it is
        theirs, x = (s.step(y, t, x, **options)[0] for s, y in zip((twin, scheduler), answers, strict=True))
        calls.append(call)
        wanted.append(float((theirs - x).square().sum()))
    lessons = Lessons(CalibrationSet(tuple(calls)), teacher, weights(scheduler, STEPS, step))
    square = lambda got, want: (got - want).square().flatten(1).sum(1) * len(got)  # noqa: E731 (a call's mean is over samples)
    got = [float(lessons.loss(student, i, square).detach()) for i in range(STEPS)]
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert sum(got) == pytest.approx(sum(wanted), rel=1e-5)
    assert max(wanted) > 1.5 * min(w for w in wanted if w > 0), "steps differ: a constant weight would not do"


def test_factors_by_hand():
    ddim = diffusers.DDIMScheduler(beta_schedule="scaled_linear")  # which clips what it takes for the picture
    kept = ddim.alphas_cumprod.double()
    for t, c in factors(ddim, STEPS).items():
        now, then = kept[int(t)], kept[int(t) - 100] if t >= 100 else ddim.final_alpha_cumprod.double()
        assert c == pytest.approx(float((1 - then).sqrt() - (then * (1 - now) / now).sqrt()), rel=1e-4)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(STEPS)
    gaps = (flow.sigmas[1:] - flow.sigmas[:-1]).tolist()
    assert list(factors(flow, STEPS).values()) == pytest.approx(gaps, rel=1e-4)
    assert ddim.num_inference_steps is None, "the given one is as it was"


def test_calls_are_weighed_by_their_timestep_alone():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    weight, told = weights(flow, STEPS), weights(flow, STEPS, told=1e-3)
    for t, c in factors(flow, STEPS).items():
        for step in (0, 7):
            assert weight(Moment(3, step, t)) == weight(Moment(0, 0, t + 0.01)) == pytest.approx(c * c)
        assert told(Moment(t=t / 1000)) == weight(Moment(t=t))
    with pytest.raises(ValueError, match="timestep"):
        weight(Moment())
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert len(factors(dynamic, 4, mu=0.7)) == 4


def test_fine_tuning_takes_them():
    """The held-out error falls under them as it does without."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    times = list(factors(flow, 4))
    g = torch.Generator().manual_seed(1)
    calls = CalibrationSet(
        tuple(
            Call((torch.randn(2, 24, 32, generator=g),), {"timestep": torch.full((2,), t)}, Moment(s, i, t))
            for s in range(4)
            for i, t in enumerate(times)
        )
    )
    student = qgen.quantize(net(), Recipe(Spec("int3_g64", "int8_row")), progress=False)
    qgen.finetune(student, net(), "scales", steps=20, calibration=calls, weight=weights(flow, 4), progress=False)
    told = student.qgen_tuning
    assert told["held"][told["best"]] < told["held"][0]
