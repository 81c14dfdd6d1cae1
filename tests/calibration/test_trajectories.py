"""Roll-outs are the data: ranges along a whole trajectory, labels that belong to their latents, seeds, prompts, the sampler's timesteps."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.calibration.recorder import Recorder
from qgen.calibration.synthetic import Synthetic
from qgen.methods.temporal import Static
from qgen.nn.clock import _bins
from qgen.recipe import Recipe, Spec
from tests.train.calls import watching

STEPS, D = 20, 64


class Gaussian(nn.Module):
    """The exact velocity of flow matching for data N(μ, s²), ‖μ‖ ≫ 1, whose input passes a layer first."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(D, D, bias=False)
        self.layer.weight.data = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
        self.turned = self.layer.weight.data.clone()
        self.mu, self.s = 6 * torch.randn(D, generator=g), 0.5

    def forward(self, x, timestep):
        sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))
        x = self.layer(x) @ self.turned
        gain = (1 - sigma) * self.s**2 / ((1 - sigma) ** 2 * self.s**2 + sigma**2)
        data = self.mu + gain * (x - (1 - sigma) * self.mu)
        return (x - data) / sigma


class Pipe:
    """Twenty steps of Euler from noise."""

    def __init__(self):
        self.net = Gaussian().eval().requires_grad_(False)

    def __call__(self, prompt, generator=None):
        x = torch.randn(len(prompt), 8, D, generator=generator)
        for i in range(STEPS):
            sigma = torch.full((len(prompt),), 1 - i / STEPS)
            x = x - self.net(x, timestep=sigma) / STEPS
        return x


def recorded(seed, prompts=6):
    pipe = Pipe()
    recorder = Recorder(samples=prompts, steps=STEPS, batch=1)
    return recorder.calls(pipe, {"net": pipe.net}, [f"p{i}" for i in range(prompts)], seed=seed)["net"]


def lost(calibration, act, bins, given):
    """Relative squared error of the layer's output at each step of calls that were not seen."""
    teacher = Pipe().net
    recipe = Recipe(Spec("int8_row", act, (Static(),), bins=bins))
    student = qgen.quantize(copy.deepcopy(teacher), recipe, calibration=calibration, progress=False)
    errors: dict[int, list[float]] = {}
    with torch.no_grad(), watching((student, teacher), ["layer"]) as seen:
        for call in given.calls:
            for module in (student, teacher):
                call.run(module)
            a, b = seen[0, "layer"], seen[1, "layer"]
            errors.setdefault(call.moment.step, []).append(float((a - b).square().sum() / b.square().sum()))
    return torch.tensor([sum(found) / len(found) for found in errors.values()])


def test_roll_outs_calibrate_what_noise_does_not():
    """Zero-shot card, test 2: 4-bit inputs, a range for each step; noise knows nothing of where the data lie."""
    seen, unseen = recorded(0), recorded(100, 2)
    example = {"x": seen.calls[0].args[0], "timestep": seen.calls[0].kwargs["timestep"]}
    noise = Synthetic(samples=6, steps=STEPS, example=example).calls(Gaussian(), {"net": None})["net"]
    ours, theirs = lost(seen, "int4_row", STEPS, unseen).mean(), lost(noise, "int4_row", STEPS, unseen).mean()
    assert ours <= 0.2 * theirs, (ours, theirs)


@pytest.mark.parametrize("count", [20, 25, 50])
def test_the_table_in_use_is_that_of_the_nearest_calibrated_timestep(count):
    """QuEST's card, test 4: whatever the number of steps at inference."""
    seen = recorded(0, 3)
    recipe = Recipe(Spec("int8_row", "int4_row", (Static(),), bins=STEPS))
    student = qgen.quantize(Gaussian().eval(), recipe, calibration=seen, progress=False)
    calibrated = torch.tensor(sorted({c.moment.t for c in seen.calls}))
    assert len(calibrated) == STEPS == len(student.layer.t_scale) - 1
    for i in range(count):
        t = torch.tensor([1 - i / count - 1e-4])  # no ties
        student.qgen_clock.t = t
        assert int(_bins(student.layer, torch.zeros(1, D))) == int((calibrated - t).abs().argmin())


def grown(seed, samples=6):
    """Calls whose amplitude grows from 0.3 to 3 along twenty steps."""
    g = torch.Generator().manual_seed(seed)
    times = [1 - i / STEPS for i in range(STEPS)]
    return CalibrationSet(
        tuple(
            Call(
                (0.3 * 10 ** (i / (STEPS - 1)) * torch.randn(1, 8, D, generator=g),),
                {"timestep": torch.tensor([t])},
                Moment(s, i, t),
            )
            for s in range(samples)
            for i, t in enumerate(times)
        )
    )


def test_ranges_of_the_first_steps_do_not_serve_the_last():
    """Q-Diffusion's card, test 2: 8 bits, one range; the worst step under steps spread evenly, and under the first five."""
    evenly = grown(0)
    early = replace(evenly, calls=tuple(c for c in evenly.calls if c.moment.step < 5))
    worst = [float(lost(given, "int8_row", 1, grown(9, 2)).max()) for given in (evenly, early)]
    assert worst[0] <= 0.2 * worst[1], worst


def test_every_stored_latent_is_that_of_its_label():
    """Q-Diffusion's card, test 3, and EfficientDM's, test 4: computed anew from the seed, by a loop of the float net's own."""
    calls, net = recorded(40, 3).calls, Gaussian()
    assert len(calls) == 3 * STEPS
    for sample in range(3):
        x = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(40 + sample))
        for call in (c for c in calls if c.moment.sample == sample):
            assert call.moment.t == pytest.approx(1 - call.moment.step / STEPS)
            assert torch.equal(call.args[0], x)
            with torch.no_grad():
                x = x - net(x, torch.full((1,), 1 - call.moment.step / STEPS)) / STEPS


@pytest.fixture(scope="module")
def pictures(make_demo_pipe):
    """Recorded calls of the demo pipeline, which a real scheduler of 1000 timesteps drives, by seed; and the pipeline."""
    pipe = make_demo_pipe()
    recorder, options = Recorder(samples=2, steps=4, batch=1), {"num_inference_steps": 4}
    record = lambda seed: recorder.calls(  # noqa: E731
        pipe, {"transformer": pipe.transformer}, ["noto owl", "noto cat"], options, seed=seed
    )["transformer"]
    return {name: record(seed) for name, seed in (("a", 1), ("again", 1), ("b", 50))}, pipe


def test_timesteps_are_the_schedulers_own(pictures):
    """FP4DiT's card, test 4: and not the numbers of the steps, which are all of nearly clean pictures."""
    sets, pipe = pictures
    pipe.scheduler.set_timesteps(4)
    wanted = sorted(float(t) for t in pipe.scheduler.timesteps)
    for sample in (0, 1):
        assert sorted(c.moment.t for c in sets["a"].calls if c.moment.sample == sample) == pytest.approx(wanted)
    assert max(wanted) > 900


def test_seeds_decide_and_the_empty_prompt_is_there(pictures):
    """Zero-shot card, test 3."""
    sets, pipe = pictures
    assert sets["a"].digest() == sets["again"].digest() != sets["b"].digest()
    latents = [c.args[0][:1] for name in ("a", "b") for c in sets[name].calls]
    assert len({x.numpy().tobytes() for x in latents}) == 2 * 2 * 4, "all differ"
    empty = pipe.encode_prompt("", max_sequence_length=16, clean_caption=False)[0]
    text = sets["a"].calls[0].kwargs["encoder_hidden_states"]
    assert len(text) == 2, "both halves of guidance"
    assert torch.allclose(text[:1], empty, atol=1e-5) and not torch.allclose(text[1:], empty, atol=1e-2)
