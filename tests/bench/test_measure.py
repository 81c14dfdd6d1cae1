"""Paired times and the rise of memory, on things whose answer is known."""

import sys
import time

import pytest
import torch

from qgen.bench.measure import Rise, paired


def test_pairs_alternate_and_give_the_known_ratio():
    order = []

    def wait(name, seconds):
        order.append(name)
        time.sleep(seconds)

    found = paired(lambda: wait("a", 0.01), lambda: wait("b", 0.03), pairs=4, warm=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert 1.5 < found.low <= found.ratio <= found.high and found.pairs == 4
    assert found.first < found.second
    with pytest.raises(ValueError, match="at least one pair"):
        paired(list, list, pairs=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_rise_is_seen_though_it_is_given_back():
    with Rise() as rise:
        block = torch.ones(30 * 2**20 // 4)
        time.sleep(0.05)
        del block
    assert 25 * 2**20 < rise.nbytes < 60 * 2**20
    with Rise() as rise:
        pass
    assert rise.nbytes < 5 * 2**20
