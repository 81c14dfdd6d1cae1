"""Search of the format: what it finds equals brute force, each distribution gets its own, and the error never rises."""

import itertools
from dataclasses import replace

import pytest
import torch

from qgen import formats
from qgen.methods.base import Judge, Stats
from qgen.methods.clip import Clip
from qgen.methods.format_search import FormatSearch
from qgen.recipe import Spec
from qgen.site import Draft, Site

SPLITS = ("fp4_e1m2_row", "fp4_e2m1_row", "fp4_e3m0_row")
UNSIGNED = ("ufp4_e1m3_row", "ufp4_e2m2_row", "ufp4_e3m1_row")


def draw(kind, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    if kind == "uniform":
        return torch.rand(*shape, generator=g) * 2 - 1
    if kind == "student":  # three degrees of freedom
        return x / (torch.randn(3, *shape, generator=g).square().mean(0)).sqrt()
    if kind == "silu":
        return torch.nn.functional.silu(1.5 * x)
    return x


def error(name, x):
    """One range for all of x, as a static scale has."""
    x = x.reshape(1, -1)
    return float((formats.get(name).fake(x) - x).square().sum() / x.square().sum())


def layer(weight, spec, methods=()):
    n, k = weight.shape
    return Draft((Site("layer", "linear", "", 0, "x", (n, k)),), Spec(*spec, tuple(methods)), weight)


def stats(rows):
    return Stats(rows, rows, rows.T @ rows / len(rows))


@pytest.mark.parametrize("kind, want, least", [("uniform", 0, 10), ("gauss", 1, 10), ("student", 2, 6)])
def test_each_distribution_of_weights_gets_its_format(kind, want, least):
    """Wide inputs of no correlation: the output error is the weight's. Student's tails are not always heavy in a sample."""
    found = 0
    for seed in range(10):
        weight, rows = draw(kind, 16, 256, seed=seed), draw("gauss", 512, 256, seed=100 + seed)
        method = FormatSearch(SPLITS, clip=False)
        made = method.refine(layer(weight, (SPLITS[0],)), stats(rows))
        found += made.spec.weight == SPLITS[want]
    assert found >= least


def test_the_result_is_the_best_of_the_grid():
    weight, rows = draw("student", 24, 64), draw("silu", 256, 64, seed=1)
    acts = ("fp4_e1m2_row", "fp4_e2m1_row", *UNSIGNED)
    d, s = layer(weight, (SPLITS[0], acts[0])), stats(rows)
    made = FormatSearch(SPLITS, acts, turns=5).refine(d, s)
    judge = Judge(rows)
    every = {}
    for w, a in itertools.product(SPLITS, acts):
        plain = replace(d, spec=replace(d.spec, weight=w, act=a))
        every[w, a, "plain"] = judge.error(plain)
        every[w, a, "clipped"] = judge.error(Clip().refine(plain, s))
    assert judge.error(made) == pytest.approx(min(every.values()), rel=1e-6)


def test_the_error_never_rises_from_turn_to_turn():
    weight, rows = draw("gauss", 24, 64), draw("silu", 256, 64, seed=3)
    d = layer(weight, ("fp4_e3m0_row", "fp4_e3m0_row"))
    made = FormatSearch(SPLITS, UNSIGNED, turns=4).refine(d, stats(rows))
    path = [Judge(rows).error(d), *map(float, made.log["errors"].split())]
    assert all(after <= before * 1.01 for before, after in itertools.pairwise(path)) and path[-1] < 0.5 * path[0]


def test_unsigned_floats_halve_the_error_of_what_is_bounded_below_and_signed_ones_keep_gaussians():
    for seed in range(3):
        silu, gauss = draw("silu", 64, 512, seed=seed), draw("gauss", 64, 512, seed=seed)
        best = {
            kind: [min(error(n, x) for n in names) for names in (SPLITS, UNSIGNED)]
            for kind, x in (("silu", silu), ("gauss", gauss))
        }
        assert best["silu"][1] <= 0.5 * best["silu"][0]
        assert best["gauss"][1] >= 1.1 * best["gauss"][0]
        weight = draw("uniform", 32, 512, seed=9)
        for x, signed in ((silu, False), (gauss, True)):
            made = FormatSearch((), (*SPLITS, *UNSIGNED), clip=False).refine(
                layer(weight, ("int8_row", SPLITS[0])), stats(x)
            )
            assert made.spec.act.startswith("fp4") == signed


def test_searched_floats_against_integers():
    gauss, uniform = draw("gauss", 64, 1024), draw("uniform", 64, 1024)
    assert min(error(n, gauss) for n in SPLITS) <= 0.6 * error("int4_row", gauss)
    assert min(error(n, uniform) for n in SPLITS) <= 1.05 * error("int4_row", uniform)


def test_zero_points_of_floats_are_the_minimum():
    x = torch.tensor([[-0.25, -0.2, 0.0, 7.25]])
    for name in UNSIGNED:
        q = formats.get(name).quantize(x)
        assert q.zero.item() == -0.25 and q.dequantize()[0, 0] == -0.25
        assert q.dequantize()[0, 3] == pytest.approx(7.25, rel=1e-6)


def test_formats_of_other_widths_and_absent_activations_are_refused():
    d, s = layer(draw("gauss", 8, 64), (SPLITS[0],)), stats(draw("gauss", 32, 64))
    with pytest.raises(ValueError, match="equal bits"):
        FormatSearch(("int8_row",)).refine(d, s)
    with pytest.raises(ValueError, match="16-bit activations"):
        FormatSearch(SPLITS, ("fp4_e2m1_row",)).refine(d, s)


def test_equal_steps_are_uint4():
    values = formats.get("ufp4_e1m3_row").element.values
    assert [v / values[1] for v in values] == list(range(16))
    assert formats.get("ufp4_e2m2_row").element.values[:9] == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
    assert formats.get("ufp4_e3m1_row").element.values[-3:] == (12.0, 16.0, 24.0)
