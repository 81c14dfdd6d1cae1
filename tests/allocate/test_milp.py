"""The integer program against brute force, and the split of a budget between two metrics."""

import itertools

import pytest
import torch

from qgen.allocate.decouple import FACTORS, mixtures
from qgen.allocate.milp import Limit, choose, smallest


def instance(layers, candidates, seed):
    """Damages that fall with bits, by a different amount in each layer, and costs in proportion to its size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(layers, 1, generator=g, dtype=torch.float64) * 9 + 1
    bits = torch.tensor([16.0, 8.0, 4.25, 3.25], dtype=torch.float64)[-candidates:]
    damage = (
        torch.rand(layers, 1, generator=g, dtype=torch.float64).exp2()
        * 4.0 ** (-bits)
        * torch.rand(layers, candidates, generator=g, dtype=torch.float64)
    )
    return damage, size * bits, size[:, 0]


def brute(damage, costs_and_limits):
    """The least total damage over all combinations that keep within every limit, by walking through all of them."""
    layers, candidates = damage.shape
    combos = torch.tensor(list(itertools.product(range(candidates), repeat=layers)))
    total = damage.gather(1, combos.T).sum(0)
    for cost, most in costs_and_limits:
        total = torch.where(cost.gather(1, combos.T).sum(0) <= most * (1 + 1e-9), total, torch.inf)
    return float(total.min())


def of(table, choice):
    return float(table.gather(1, torch.tensor(choice)[:, None]).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", [4.5, 5.0, 7.0])
def test_optimum_of_twelve_layers_equals_brute_force(seed, average):
    damage, cost, size = instance(12, 3, seed)
    most = average * float(size.sum())
    choice = choose(damage, [Limit(cost, most)])
    assert of(cost, choice) <= most * (1 + 1e-9)
    assert of(damage, choice) == pytest.approx(brute(damage, [(cost, most)]), rel=1e-9)


def test_two_limits_and_missing_candidates_equal_brute_force():
    damage, cost, size = instance(6, 4, 9)
    damage[::2, 3] = torch.inf
    seconds = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    limits = [(cost, 6 * float(size.sum())), (seconds, 0.9 * float(seconds.mean()) * 6)]
    choice = choose(damage, [Limit(c, m) for c, m in limits])
    assert of(damage, choice) == pytest.approx(brute(damage, limits), rel=1e-9)
    assert all(damage[i, c] < torch.inf for i, c in enumerate(choice))


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_unit_of_damage_does_not_matter(unit):
    damage, cost, size = instance(12, 3, 1)
    limit = Limit(cost, 5 * float(size.sum()))
    assert choose(damage * unit, [limit]) == choose(damage, [limit])


def test_a_larger_budget_never_hurts():
    damage, cost, size = instance(12, 3, 2)
    got = [of(damage, choose(damage, [Limit(cost, b * float(size.sum()))])) for b in (4.3, 5, 6, 8, 12, 16)]
    assert got == sorted(got, reverse=True) and got[0] > got[-1]


def test_what_cannot_be_met_says_the_smallest_possible():
    damage, cost, size = instance(5, 3, 0)
    least = smallest(damage, cost)
    assert least == pytest.approx(3.25 * float(size.sum()))
    with pytest.raises(ValueError, match=f"cannot be met: the smallest possible is {least:.6g}"):
        choose(damage, [Limit(cost, 0.99 * least)])
    assert choose(damage, [Limit(cost, least)]) == [2] * 5


def test_limits_that_exclude_each_other():
    damage, cost, _ = instance(2, 2, 0)
    with pytest.raises(ValueError, match="cannot be met together"):
        choose(damage, [Limit(cost, smallest(damage, cost)), Limit(-cost, -cost.amax(1).sum() * 0.9)])


def test_damages_of_one_group_times_anything_change_no_mixture():
    """A single-metric allocation must change for most instances, or the test would say nothing."""
    single = 0
    for seed in range(40):
        damage, cost, size = instance(12, 3, seed)
        member = torch.arange(12) % 3 == 0
        limit = Limit(cost, 5 * float(size.sum()))
        scaled = torch.where(member[:, None], 1000 * damage, damage)
        plain, moved = (mixtures(damage, d, member, size, limit, FACTORS[::4]) for d in (damage, scaled))
        assert plain == moved
        single += choose(damage, [limit]) != choose(scaled, [limit])
    assert single >= 38  # card MixDQ, test 3


def test_mixtures_keep_within_the_budget_and_span_it():
    damage, cost, size = instance(12, 3, 3)
    limit = Limit(cost, 5 * float(size.sum()))
    found = mixtures(damage, damage, torch.arange(12) < 5, size, limit)
    assert len(found) > 1 and all(of(cost, choice) <= limit.most * (1 + 1e-6) for choice in found)
