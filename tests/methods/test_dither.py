"""Temporal dither: the float function stays, errors of a run's steps stop adding up, inputs that are new at each step are left alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from qgen.calibration.base import Moment
from qgen.calibration.moments import Moments, fine_edges
from qgen.calibration.observers import Reservoir
from qgen.calibration.paths import Paths
from qgen.methods.base import Stats, refine
from qgen.methods.bias import BiasCorrection
from qgen.methods.dither import Dither, along
from qgen.methods.lowrank import LowRank
from qgen.methods.rotate import Rotate
from qgen.methods.smooth import Smooth
from qgen.methods.temporal import Center, Static, TemporalBias, begin
from qgen.nn import QuantLinear, clock
from qgen.recipe import Recipe, Spec
from qgen.site import Draft, Site

K, N, TOKENS = 192, 192, 32
TS = tuple(50.0 * i + 25 for i in range(20))  # what is calibrated
OTHER_TS = tuple(71.0 * i + 11 for i in range(14))  # another scheduler, with none of these
SITE = (Site("layer", "linear", "", 0, "in", (N, K)),)
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.1
BIAS = torch.randn(N, generator=torch.Generator().manual_seed(1))
TIMED = (Center(curves=0), LowRank(8), Dither(), TemporalBias(curves=0))


def rows(sample, t, still):
    """(TOKENS, K) at timestep t: the sample's tokens with 0.2 % of noise, or others at each t."""
    generator = torch.Generator().manual_seed(sample if still else 10_000 * sample + int(t) + 1)
    x = torch.randn(TOKENS, K, generator=generator)
    mean = torch.randn(K, generator=torch.Generator().manual_seed(77))
    noise = torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(31 * sample + int(t)))
    return x * (1 + mean.abs()) + mean + 0.002 * noise


def stats(still=True, samples=6):
    moments, kept, paths = Moments(fine_edges(TS)), Reservoir(1024), Paths(1024)
    gram, absmax = torch.zeros(K, K), torch.zeros(K)
    for sample in range(samples):
        for step, t in enumerate(TS):
            x, moment = rows(sample, t, still), Moment(sample, step, t, held=sample == samples - 1)
            for observer in (moments, kept, paths):
                observer.update(x, moment)
            if not moment.held:
                gram, absmax = gram + x.T @ x, absmax.maximum(x.abs().amax(0))
    whole, path_t = paths.whole()
    return Stats(
        fit=kept.result(), held=kept.result(True), fit_t=kept.times(), held_t=kept.times(True),
        gram=gram / (TOKENS * len(TS) * (samples - 1)), absmax=absmax, absmean=absmax / 3,
        moments=moments, paths=whole, path_t=path_t,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    return {"still": stats(True), "new": stats(False)}


def made(methods, seen, act="uint4_g64", weight="int8_row", bins=32):
    draft = Draft(SITE, Spec(weight, act, methods, bins), WEIGHT, BIAS, dtype=torch.float16)
    return refine(*begin(draft, seen))


class Wrapped(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, draft):
        super().__init__()
        self.layer = QuantLinear.from_draft(draft, dtype=torch.float32)
        self.layer.prepare("reference")
        clock.wind(self)

    def forward(self, x, timestep=None):
        return self.layer(x)


def summed(module, ts, still=True, sample=500):
    """Error of the sum of a run's outputs, mean over tokens, and of its single steps, in squares."""
    total, single = torch.zeros(TOKENS, N), 0.0
    with torch.no_grad():
        for t in ts:
            x = rows(sample, t, still)
            error = module(x[None], torch.tensor([t]))[0] - (x @ WEIGHT.T + BIAS)
            total += error
            single += float(error.square().sum(1).mean())
    return float(total.square().sum(1).mean()), single


RECIPES = {
    "plain": ((Dither(),), "uint4_g64"),
    "whole": (TIMED, "uint4_g64"),
    "rotated": ((Center(curves=0), Rotate(), Dither(), TemporalBias(curves=0)), "int4_g64"),
    "smooth": ((Center(curves=0), Smooth(), LowRank(8), Dither(), TemporalBias(curves=0)), "uint4_g64"),
    "smooth, rotated": ((Smooth(), Rotate(), Dither(), BiasCorrection()), "int4_g64"),
    "nvfp4": (TIMED, "nvfp4_dynamic"),
    "int8": (TIMED, "int8_row"),
    "static": ((Center(curves=0), Static(), Dither(), TemporalBias(curves=0)), "int4_g64"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_function_stays_where_nothing_is_rounded(name, seen):
    """The finished layer's tables around the float product, at calibrated timesteps, others, and none."""
    methods, act = RECIPES[name]
    draft = made(methods, seen["still"], act)
    assert draft.log["dithered"] > 0 and draft.dither is not None
    fixes = torch.zeros(len(draft.offsets), N) if draft.fixes is None else draft.fixes
    module = Wrapped(draft)
    layer = module.layer
    assert layer.t_mix is not None and layer.t_shift is not None and len(layer.t_mix) == len(layer.t_edges) + 2
    offset = 0.0 if draft.bias_fix is None else draft.bias_fix
    for t in (*TS[::6], *OTHER_TS[::4], -3.0, 5000.0, None):
        module.qgen_clock.t = None if t is None else torch.tensor([t])
        x = rows(3, t or 0, True)
        row = -1 if t is None else sum(t > float(edge) for edge in draft.edges)
        got = clock.apply(layer, x[None], lambda z: z @ WEIGHT.T)[0]
        torch.testing.assert_close(got, x @ WEIGHT.T + BIAS + offset + fixes[row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ts", [TS, OTHER_TS], ids=["calibrated", "never seen"])
@pytest.mark.parametrize("name", RECIPES)
def test_errors_of_a_run_stop_adding_up(name, ts, seen):
    methods, act = RECIPES[name]
    without = tuple(m for m in methods if not isinstance(m, Dither))
    plain, dithered = (summed(Wrapped(made(m, seen["still"], act)), ts) for m in (without, methods))
    assert plain[0] > 3 * plain[1]  # they do add up: of independent ones both would be alike
    assert dithered[0] < 0.7 * plain[0]


def test_inputs_that_are_new_at_each_step_are_left_alone(seen):
    draft = made(TIMED, seen["new"])
    assert draft.log["dithered"] == 0.0 and draft.dither is None and draft.offsets is None
    layer = Wrapped(draft).layer
    assert layer.t_edges is None and layer.t_mix is None and layer.layout.bins == 1 and layer.t_shift.shape == (1, K)


def test_one_bin_does_nothing(seen):
    draft = made((Dither(),), seen["still"], bins=1)
    plain = made((), seen["still"], bins=1)
    assert draft.dither is None and "dithered" not in draft.log
    slots, want = (QuantLinear.from_draft(d, dtype=torch.float32).canonical() for d in (draft, plain))
    assert slots.keys() == want.keys() and all(torch.equal(slots[name], want[name]) for name in want)


@pytest.mark.parametrize("missing", ["paths", "act"])
def test_without_paths_or_rounded_inputs_it_does_nothing(missing, seen):
    given = replace(seen["still"], paths=None, path_t=None) if missing == "paths" else seen["still"]
    draft = made((Dither(),), given, act="uint4_g64" if missing == "paths" else None)
    assert draft.dither is None and "dithered" not in draft.log


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"amplitudes": ()}, {"amplitudes": (1.0, -1.0)}, {"amplitudes": (0.0,)}, {"worth": 1.0},
              {"worth": -0.1}, {"worth": math.nan}, {"amplitudes": (math.nan,)}]
)  # fmt: skip
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"amplitudes are positive, a run has a step.*found"):
        Dither(**wrong)


@pytest.mark.parametrize("method", [Center, TemporalBias])
def test_a_negative_number_of_curves_is_refused(method):
    with pytest.raises(ValueError, match="no, one or more curves over the timesteps, found -1"):
        method(curves=-1)


def test_a_recipe_with_dither_is_json_and_back():
    recipe = Recipe(Spec("int4_g64", "uint4_g64", (Center(curves=1), Dither((0.25, 3.0), 7, 0.1)), bins=32))
    assert Recipe.from_json(recipe.to_json()) == recipe


def by_hand(draft, paths, bins, steps):
    """The error of `steps` steps' summed outputs for one, of each token, by the definition."""
    errors, energy = [], 0.0
    for path, owner in zip(paths, bins, strict=True):
        for x, b in zip(path, owner, strict=True):
            energy += float((WEIGHT @ x).square().sum()) / bins.numel()  # of what it is asked, however far it is moved
            x = x if draft.dither is None else x + draft.offsets[b] * draft.dither
            got = draft.values() @ draft.inputs(x[None], bins=b[None])[0]
            errors.append(got + (0 if draft.up is None else draft.up @ (draft.down @ x)) - WEIGHT @ x)
    errors = (torch.stack(errors) - torch.stack(errors).mean(0)).reshape(*bins.shape, N)
    made = []
    for token in errors:
        p = sum(float(e @ e) for e in token) / len(token)
        pairs = [float(a @ b) for i, a in enumerate(token) for j, b in enumerate(token) if i != j]
        made.append((p + (steps - 1) * sum(pairs) / len(pairs)) / energy)
    return made


@pytest.mark.parametrize("name", ["plain", "whole", "static"])
def test_along_is_its_definition(name, seen):
    methods, act = RECIPES[name]
    draft = made(methods, seen["still"], act)
    paths, t = seen["still"].paths[:4, :5], seen["still"].path_t[:4, :5]
    bins = torch.bucketize(t.contiguous(), draft.edges)
    far = replace(draft, dither=20 * draft.dither)
    for trial in (draft, far, replace(draft, dither=None, offsets=None)):
        for steps in (1, 10):
            wanted = torch.tensor(by_hand(trial, paths, bins, steps))
            torch.testing.assert_close(along(trial, paths, bins, steps), wanted, rtol=1e-3, atol=1e-6)


def test_the_judge_sees_what_the_finished_layer_computes(seen):
    """Held-out error of a dithered draft, against the packed layer row by row."""
    start, stats = begin(Draft(SITE, Spec("int8_row", "uint4_g64", TIMED, 32), WEIGHT, BIAS), seen["still"])
    draft = refine(start, stats)
    module = Wrapped(draft)
    x, want = seen["still"].held, seen["still"].held @ WEIGHT.T
    with torch.no_grad():
        got = module(x[:, None], seen["still"].held_t)[:, 0] - BIAS
    error = float((got - want).square().sum() / want.square().sum())
    assert stats.judge.error(draft) == pytest.approx(error, rel=1e-2)


def test_without_a_timestep_nothing_is_moved(seen):
    draft = made(TIMED, seen["still"])
    assert float(draft.offsets[-1]) == 0 and len(draft.offsets) == len(draft.edges) + 2
    assert bool((draft.offsets[:-1] >= -1).all()) and bool((draft.offsets[:-1] < 1).all())
    layer = Wrapped(draft).layer
    table = layer.t_mix[:, -len(layer.t_shift) :] @ layer.t_shift.float()
    torch.testing.assert_close(table[-1], draft.center[-1], atol=5e-3, rtol=5e-3)
    still = replace(draft, dither=None, offsets=None)
    x = rows(4, 0, True)
    with torch.no_grad():
        got, want = (Wrapped(d)(x[None]) for d in (draft, still))
    assert (
        float((got - want).norm() / want.norm()) < 0.02
    )  # but for codes that change as the centre is stored otherwise


def test_steps_that_follow_each_other_are_moved_apart(seen):
    """Of any 2, 3, 5 or 8 neighbouring bins, and of every second or third, no two lie closer than chance would have it."""
    u = made((Dither(),), seen["still"]).offsets[:-1].double()
    assert len(u) >= 16
    for stride in (1, 2, 3):
        for count in (2, 3, 5):
            for i in range(len(u) - stride * (count - 1)):
                near = u[i : i + stride * count : stride].sort().values
                gaps = torch.cat([near.diff(), near[:1] + 2 - near[-1:]])  # on a circle of two
                assert float(gaps.min()) > 2 / count / 5


def test_signs_and_amplitudes_depend_on_the_seed_alone(seen):
    first, again, other = (made((Dither(amplitudes=(1.0,)),), replace(seen["still"], seed=s)).dither for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and bool((first != 0).all())
    share = float((first > 0).float().mean())
    assert 0.3 < share < 0.7
