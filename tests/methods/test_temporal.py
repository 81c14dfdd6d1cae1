"""Binned parameters against their blind counterparts, and against independent truths."""

import pytest
import torch

from qgen import formats
from qgen.calibration.base import Moment
from qgen.calibration.moments import Moments, fine_edges
from qgen.methods.base import Stats, refine
from qgen.methods.temporal import Center, Static, TemporalBias, begin
from qgen.recipe import Spec
from qgen.site import Draft, Site

T, K, N = 20, 64, 48
SITE = (Site("l", "linear", "", 0, "in", (N, K)),)


def rows(t, seed, amplitude=True, shift=True):
    """64 rows at step t of 0..19: amplitude e^-1.5 … e^1.5, mean moving along one direction, as in the card of TFMQ-DM."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    u = t / (T - 1)
    direction = torch.randn(K, generator=torch.Generator().manual_seed(5))
    x = torch.randn(64, K, generator=generator) * (torch.exp(torch.tensor(3 * u - 1.5)) if amplitude else 1)
    return x + (4 * (u - 0.5) * direction if shift else 0)


def stats(**how):
    fit, held = (torch.cat([rows(t, s, **how) for t in range(T)]) for s in (1, 2))
    times = torch.arange(T).repeat_interleave(64).float()
    moments = Moments(fine_edges(range(T)))
    for t in range(T):
        moments.update(rows(t, 1, **how), Moment(0, t, float(t)))
    return Stats(
        fit=fit,
        held=held,
        gram=fit.T @ fit / len(fit),
        absmax=fit.abs().amax(0),
        moments=moments,
        fit_t=times,
        held_t=times,
    )


def draft(methods, bins, act="int4_row", weight_format="int8_row"):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.1
    return Draft(SITE, Spec(weight_format, act, methods, bins), weight, torch.zeros(N), dtype=torch.float16)


def solved(methods, bins, act="int4_row", weight_format="int8_row", **how):
    d, s = begin(draft(methods, bins, act, weight_format), stats(**how))
    d = refine(d, s)
    return d, s, s.judge.error(d)


def test_scales_by_step_leave_a_fifth_of_the_error_of_one_scale():
    """Card TFMQ-DM, test 2: mean relative error by step, 4-bit activations."""

    def by_step(bins):
        d, s = begin(draft((Static(),), bins), stats(shift=False))
        d = refine(d, s)
        errors = []
        for t in range(T):
            x = rows(t, 3, shift=False)
            b = None if d.edges is None else torch.bucketize(torch.full((len(x),), float(t)), d.edges)
            errors.append(float((d.inputs(x, bins=b) - x).square().sum() / x.square().sum()))
        return torch.tensor(errors), d

    (binned, d), (blind, _) = by_step(T), by_step(1)
    assert binned.mean() <= 0.2 * blind.mean()
    backwards = []
    for t in range(T):  # test 3: a table read in the wrong direction is far worse
        x = rows(t, 3, shift=False)
        b = torch.bucketize(torch.full((len(x),), float(T - 1 - t)), d.edges)
        backwards.append(float((d.inputs(x, bins=b) - x).square().sum() / x.square().sum()))
    assert sum(backwards) / T >= 5 * binned.mean()


def test_centres_by_bin_beat_one_centre_and_none():
    errors = {bins: solved((Center(),), bins, "uint4_row", amplitude=False)[2] for bins in (1, 8)}
    without = solved((), 1, "uint4_row", amplitude=False)[2]
    assert errors[8] < 0.8 * min(errors[1], without)


def test_centred_statistics_are_those_of_the_centred_rows():
    raw = stats()
    d, s = begin(draft((Center(),), 8, "uint4_row"), raw)
    assert d.log["centred"] == "mean of each bin"
    x = raw.fit + d.center[s.fit_bins]
    torch.testing.assert_close(s.fit, x)
    torch.testing.assert_close(s.gram, x.T @ x / len(x), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(s.absmax, x.abs().amax(0))


def test_centring_leaves_the_float_function_as_it_was():
    d, s, _ = solved((Center(),), 8, "uint4_row")
    table = d.tables(slice(None), torch.float32)
    x, b = stats().held, s.held_bins
    exact = (x + table["t_shift"].float()[b]) @ d.weight.T + table["t_bias"][b]
    offset = d.folded_bias()
    torch.testing.assert_close(exact - (0 if offset is None else offset), x @ d.weight.T, atol=1e-3, rtol=1e-3)


def test_bias_by_bin_takes_off_the_mean_error_of_each_bin():
    d, s, after = solved((TemporalBias(),), 8, "uint4_row", "int4_row", amplitude=False)
    if d.fixes is None:
        pytest.fail("the correction was dropped although the weight's error has a mean that moves with the timestep")
    before = s.judge.error(Draft(SITE, d.spec, d.weight, d.bias, edges=d.edges, qweight=d.qweight, dtype=d.dtype))
    assert after < before
    assert d.fixes.shape == (len(d.edges) + 2, N)


def test_static_refuses_formats_with_zero_points():
    with pytest.raises(ValueError, match="signed activation format"):
        solved((Static(),), 4, "uint4_row")


def test_centre_refuses_unsigned_formats_without_zero_points():
    with pytest.raises(ValueError, match="signed or have zero points"):
        solved((Center(),), 4, "uint4p_g64")


def test_static_scales_of_blocks_are_one_number_per_block_and_one_per_bin():
    d, _, error = solved((Static(),), 4, "int4_g32")
    assert d.ratio.shape == (2,) and d.steps.shape == (5,)
    assert error < 2 * solved((), 1, "int4_g32")[2] + 0.05  # no worse than twice the dynamic error
    table = d.tables(slice(None), torch.float32)
    assert table["act_scale"] is d.ratio and table["t_scale"] is d.steps
    assert formats.get("int4_g32").element.signed


def test_centres_along_one_curve_serve_as_well_as_one_for_each_bin():
    """The input's mean moves along a line here; what it takes is two rows, however many bins there are."""
    (d, _, one), (_, _, each) = (solved((Center(curves=c),), 8, "uint4_row", amplitude=False) for c in (1, None))
    assert d.log["centred"] == "mean of each bin" and one < 1.02 * each
    table = d.tables(slice(None), torch.float32)
    assert table["t_shift"].shape == (2, K) and table["t_bias"].shape == (2, N) and table["t_mix"].shape[1] == 2


def test_a_centre_for_each_bin_stays_only_where_it_is_worth_it():
    labels = [
        solved((Center(curves=1, worth=w),), 8, "uint4_row", amplitude=False)[0].log["centred"] for w in (0.1, 0.9)
    ]
    assert labels == ["mean of each bin", "one mean"]
    for wrong in ({"worth": 1.0}, {"worth": -0.1}, {"curves": -1}):
        with pytest.raises(ValueError, match=r"worth is a share|no, one or more curves"):
            Center(**wrong)
