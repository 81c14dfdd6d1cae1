"""On the shipped pipeline the allocator beats random mixes and mixes by size of equal bits; `demos/budget.py` does it at length."""

import pytest

pytest.importorskip("diffusers")

from demos.budget import compare
from qgen import recipes


@pytest.mark.slow
def test_allocation_beats_chance_and_size_at_equal_bits():
    found = {
        name: float(values.mean())
        for name, values in compare(recipes.get("rtn-int4"), draws=3, n=12, samples=32).items()
    }
    best = found.pop("allocated")
    assert len(found) == 5 and all(best > other for other in found.values()), (best, found)
