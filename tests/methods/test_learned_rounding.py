"""AdaRound, SignRound and rotation: what their cards ask for, on data of the kind where each helps."""

from dataclasses import replace

import pytest
import torch

from qgen import formats
from qgen.methods.adaround import AdaRound
from qgen.methods.base import Stats, refine
from qgen.methods.gptq import GPTQ
from qgen.methods.grid import Grid, neighbours
from qgen.methods.rotate import Rotate
from qgen.methods.signround import SignRound
from qgen.methods.smooth import Smooth
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K = 32, 64


def correlated(m, seed, k=K):
    """Rows of rank 16 and a little noise: roundings of different weights can make up for each other."""
    mix = torch.randn(16, k, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, 16, generator=g) @ mix + 0.1 * torch.randn(m, k, generator=g)


def stats(fit, held):
    return Stats(fit, held, fit.T @ fit / len(fit), fit.abs().amax(0), fit.abs().mean(0))


def layer(weight="fp4_e2m1_g32", act=None, n=N, k=K, methods=()):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(5)) / k**0.5
    return Draft((Site("layer", "linear", "", 0, "x", (n, k)),), Spec(weight, act, tuple(methods)), w)


@pytest.fixture(scope="module")
def seen():
    return stats(correlated(1024, 1), correlated(512, 2))


@pytest.mark.parametrize("name", ["fp4_e2m1_g32", "fp4_e1m2_g32", "fp4_e3m0_g32", "int4_g64", "nf4_g64", "nvfp4"])
def test_neighbours_enclose_and_nothing_lies_between(name):
    fmt = formats.get(name)
    values = sorted({v + 0.0 for v in fmt.element.values if v == v})
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)) * (values[-1] - values[0]) + values[0]
    low, high = neighbours(fmt, torch.cat([x, torch.tensor(values)]))
    grid = torch.tensor(values)
    for v, a, b in zip([*x.tolist(), *grid.tolist()], low.tolist(), high.tolist(), strict=True):
        assert a <= v <= b and a in grid and b in grid
        assert not ((grid > a) & (grid < b)).any()
        assert (a == b) == (v in grid)
    beyond = torch.tensor([values[0] - 1, values[-1] + 1])
    assert [t.tolist() for t in neighbours(fmt, beyond)] == [[values[0], values[-1]]] * 2


def test_adaround_halves_the_error_of_a_float_grid_and_scale_awareness_helps(seen):
    d = layer()
    nearest = d.rounded().error(seen.held)
    aware = AdaRound(steps=500).refine(d, seen).error(seen.held)
    plain = AdaRound(steps=500, scale_aware=False).refine(d, seen).error(seen.held)
    assert aware <= 0.6 * nearest and aware < plain, (aware / nearest, plain / nearest)


@pytest.mark.parametrize("weight", ["int4_g64", "uint4_g32", "fp4_e3m0_g32", "nvfp4", "int3_g32"])
def test_adaround_serves_every_grid_and_stays_on_it(seen, weight):
    d = layer(weight)
    made = AdaRound().refine(d, seen)
    grid = Grid.of(d, seen)
    values = made.qweight.dequantize()
    off = torch.minimum((values - grid.values(grid.low)).abs(), (values - grid.values(grid.high)).abs())
    assert float(off.max()) < 1e-6, "each weight takes one of its two neighbours"
    assert made.error(seen.held) < 0.7 * d.rounded().error(seen.held)
    assert float(made.log["undecided"].rstrip("%")) < 3, "soft and hard rounding agree"


def test_signround_lowers_the_error_and_never_the_fitted_one(seen):
    for weight in ("int4_g64", "uint4_g32", "int2_g32", "nvfp4", "fp4_e2m1_g32"):
        d = layer(weight)
        made = SignRound().refine(d, seen)
        assert made.error(seen.fit) <= d.rounded().error(seen.fit) + 1e-7
        assert made.error(seen.held) < 0.75 * d.rounded().error(seen.held), weight


def test_clipping_helps_signround_at_two_bits(seen):
    d = layer("uint2_g32")
    both, offsets = (SignRound(least=least).refine(d, seen).error(seen.held) for least in (0.6, 1.0))
    assert both < offsets


def test_learned_rounding_leaves_formats_without_a_step_alone(seen):
    d = layer("vq2_d4")
    assert AdaRound().refine(d, seen) is d and SignRound().refine(d, seen) is d


def test_they_are_dropped_where_held_out_rows_say_so():
    fit = correlated(40, 1)
    hurt = stats(fit, torch.randn(256, K, generator=torch.Generator().manual_seed(7)))
    made = refine(layer("int2_g32", methods=(AdaRound(steps=50), SignRound(steps=50))), hurt)
    for name in ("adaround", "signround"):
        kept = not made.log[name].startswith("dropped")
        assert not kept or float(made.log[name]) < layer("int2_g32").rounded().error(hurt.held)


# -- rotation ----------------------------------------------------------------------------------------------------------
def spiky(m, seed, k=128):
    """Two channels that are always large, and one spike per token that could be anywhere."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    x[:, 3] *= 40
    x[:, 77] *= 25
    x[torch.arange(m), torch.randint(0, k, (m,), generator=g)] += 30 * torch.randn(m, generator=g).sign()
    return x


def test_static_and_dynamic_balancing_beats_either_alone():
    seen = stats(spiky(512, 1), spiky(256, 2))
    d = layer("int4_row", "int4_row", n=64, k=128)
    smooth = Smooth(alphas=(0.5,)).refine(d, seen)
    rotated, both = Rotate().refine(d, seen), Rotate().refine(smooth, seen)
    none, s, r, b = (x.rounded().error(seen.held) for x in (d, smooth, rotated, both))
    assert b < min(s, r) and b <= 0.25 * none, (none, s, r, b)


@pytest.mark.parametrize("k", [128, 96, 100])
@pytest.mark.parametrize("signs", [True, False])
def test_rotation_leaves_the_float_function_unchanged(k, signs):
    d = Rotate(signs=signs).refine(
        replace(layer("int4_row", "int4_row", k=k), smooth=torch.rand(k) + 0.5), stats(spiky(64, 1, k), spiky(64, 2, k))
    )
    x = spiky(64, 3, k).double()
    got = d.inputs(x, quantized=False).double() @ d.target().double().T
    want = x @ d.weight.double().T
    assert d.hadamard >= 2 and float((got - want).norm() / want.norm()) < 1e-5


def test_rotation_of_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two, found 48"):
        Rotate(size=48).refine(layer(), stats(correlated(8, 1), correlated(8, 2)))


def test_learned_rounding_against_gptq(seen):
    """All minimize the same loss. GPTQ's feedback is hard to beat here; what is learned must stay in sight of it."""
    d = layer("int4_g64")
    gptq = GPTQ().refine(d, seen).error(seen.held)
    assert AdaRound().refine(d, seen).error(seen.held) < 2.5 * gptq
    assert SignRound().refine(d, seen).error(seen.held) < 8 * gptq
