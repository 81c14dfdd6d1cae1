"""The interval covers the truth as often as it says, is reproducible, and pairs sharpen it."""

import math

import numpy as np
import pytest
import torch

from qgen.eval.bootstrap import bootstrap_difference, bootstrap_mean


def test_interval_covers_the_mean_about_95_times_in_100():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = bootstrap_mean(random.exponential(2.0, 80).tolist(), draws=400, seed=trial)
        hits += found.low <= 2.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_width_is_that_of_the_normal_approximation():
    x = np.random.default_rng(1).normal(5, 3, 400)
    found = bootstrap_mean(x.tolist(), draws=4000)
    assert found.mean == pytest.approx(x.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.08)


def test_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(2).normal(0, 1, 100)
    expected = stats.bootstrap((x,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    found = bootstrap_mean(x.tolist(), draws=4000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_seed_decides():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_mean(x, seed=1) == bootstrap_mean(x, seed=1)
    assert bootstrap_mean(x, seed=1) != bootstrap_mean(x, seed=2)


def test_pairs_find_a_difference_that_two_means_hide():
    random = np.random.default_rng(3)
    hard = random.normal(30, 5, 60)
    a, b = hard + random.normal(0.5, 0.3, 60), hard
    alone = [bootstrap_mean(v.tolist()) for v in (a, b)]
    assert alone[1].high > alone[0].low
    paired = bootstrap_difference(a.tolist(), b.tolist())
    assert 0.3 < paired.low < 0.5 < paired.high < 0.7


def test_infinite_values_pass():
    found = bootstrap_mean([math.inf] * 5)
    assert (found.mean, found.low, found.high) == (math.inf, math.inf, math.inf)
    assert bootstrap_mean([1.0] * 40 + [math.inf]).low == 1.0
    assert bootstrap_difference([math.inf, 2.0], [math.inf, 1.0]).mean == 0.5


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [([], {}, "no values"), ([1.0, math.nan], {}, "1 of 2 values are NaN"), ([1.0], {"level": 1.5}, "level")],
    ids=["none", "nan", "level"],
)
def test_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, **options)


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="3 and 2 values"):
        bootstrap_difference([1.0, 2.0, 3.0], [1.0, 2.0])
