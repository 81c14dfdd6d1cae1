"""Chance by dealing out again: covers zero where both sets have one source, leaves it out where they have not, and is counted by hand."""

import numpy as np
import pytest
import torch

from qgen.eval.evaluate import evaluate
from qgen.eval.exchange import LEAST, excess
from qgen.eval.fid import frechet_distance


def cloud(n, K, seed, shift=0.0):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed)) + shift


def gap(x, y):
    return float(x.mean() - y.mean())


def test_the_interval_holds_the_deals_in_the_middle():
    """Order statistics counted by hand: of 39 deals the least and the greatest, of 199 the fifth from either end."""
    x, y = cloud(9, 1, 0), cloud(7, 1, 1)
    for draws, edge in ((39, 0), (199, 4)):
        seen = []

        def distance(a, b, seen=seen):
            seen.append(gap(a, b))
            return seen[-1]

        found, over = excess(distance, x, y, draws=draws)
        assert found == seen[0] == gap(x, y) and len(seen) == draws + 1
        differences = np.sort(found - np.array(seen[1:]))
        assert (over.low, over.high) == (differences[edge], differences[-1 - edge])
        assert over.mean == pytest.approx(differences.mean()) and over.n == 7


def test_deals_keep_all_rows_and_pairs_stay_pairs():
    x, y = torch.arange(6.0)[:, None], torch.arange(6.0)[:, None] + 10

    def whole(a, b):
        assert sorted(torch.cat([a, b]).flatten().tolist()) == sorted(torch.cat([x, y]).flatten().tolist())
        return 0.0

    def pairs(a, b):
        assert torch.equal((a - b).abs(), torch.full((6, 1), 10.0))
        return 0.0

    excess(whole, x[:4], torch.cat([x[4:], y]), draws=LEAST)
    excess(pairs, x, y, paired=True, draws=LEAST)


@pytest.mark.parametrize("paired", [False, True])
def test_sets_from_one_source_differ_no_more_than_chance(paired):
    """95 of 100 intervals hold zero, though the Fréchet distance itself is far above it."""
    covered = 0
    for s in range(60):
        x, y = cloud(12, 20, 2 * s), cloud(12, 20, 2 * s + 1)
        if paired:  # what the prompt gives to both sides
            x, y = x + (z := 3 * cloud(12, 20, 1000 + s)), y + z
        found, over = excess(frechet_distance, x, y, paired=paired, draws=LEAST, seed=s)
        assert found > 5
        covered += over.low <= 0 <= over.high
    assert covered >= 51, "of 60 intervals of 95 % fewer than 51 hold zero once in 700 runs"


def test_a_real_shift_is_more_than_chance():
    x, y = cloud(16, 20, 0), cloud(16, 20, 1, shift=1.0)
    _, over = excess(frechet_distance, x, y)
    assert over.low > 0
    hidden = 10 * cloud(16, 20, 2)  # pictures of one prompt share this, and dealing in pairs sees through it
    _, apart = excess(frechet_distance, x + hidden, y + hidden)
    _, pairs = excess(frechet_distance, x + hidden, y + hidden, paired=True)
    assert apart.low <= 0 < pairs.low


def test_equal_sets_have_no_excess_and_bad_wishes_are_refused():
    x = cloud(8, 5, 0)
    found, over = excess(frechet_distance, x, x.clone(), paired=True)
    assert found == pytest.approx(0, abs=1e-9) and over.low == pytest.approx(0, abs=1e-9) == over.high
    with pytest.raises(ValueError, match="at least 39"):
        excess(gap, x, x, draws=10)
    with pytest.raises(ValueError, match="pairs wanted"):
        excess(gap, x, x[:3], paired=True)


class Colours:
    """The mean colour as features."""

    name, digest, usual, labels = "colours", "0", False, {"fid": "FD-colours", "kid": "KD-colours"}

    def features(self, pictures):
        return pictures.flatten(1, 2).mean(1)


def test_rows_carry_chance_or_the_other_model_as_the_reference(photos, noisy):
    options = {"metrics": ("fid",), "extractor": Colours()}
    alone = evaluate(noisy(0.1)[:4], real=photos[4:], **options)["fid"]
    assert alone.value == pytest.approx(alone.reference + alone.difference)
    assert alone.difference_low <= alone.difference <= alone.difference_high and "199 random deals" in alone.note
    both = evaluate(noisy(0.4)[:4], photos[:4], real=photos[4:], **options)["fid"]
    assert both.value == pytest.approx(evaluate(noisy(0.4)[:4], real=photos[4:], **options)["fid"].value)
    assert both.reference == pytest.approx(evaluate(photos[:4], real=photos[4:], **options)["fid"].value)
    assert both.difference == pytest.approx(both.value - both.reference) and "199 swaps" in both.note
    same = evaluate(photos[:4], photos[:4], real=photos[4:], **options)["fid"]
    assert same.difference == same.difference_low == same.difference_high == 0
    pairs = evaluate(noisy(0.1), photos, **options)["fid"]
    assert pairs.reference is pairs.difference is None
