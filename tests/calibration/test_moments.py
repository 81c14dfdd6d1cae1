"""Moments: sums that merge, and the best cut, against brute force."""

from itertools import combinations

import pytest
import torch

from qgen.calibration.base import Moment
from qgen.calibration.moments import Moments, _segments, fine_edges


def filled(parts):
    moments = Moments(fine_edges(range(8)))
    for t, x in parts:
        moments.update(x, Moment(0, t, float(t)))
    return moments


def parts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(t, torch.randn(5, 6, generator=generator) + (3.0 if t > 5 else 0)) for t in range(8)]


def test_two_halves_merge_into_the_whole_in_any_order():
    whole, p = filled(parts()), parts()
    for cut in (1, 4, 7):
        a, b = filled(p[:cut]), filled(p[cut:])
        b.merge(a)
        torch.testing.assert_close(b.total, whole.total)
        assert torch.equal(b.peak, whole.peak) and torch.equal(b.count, whole.count)
    other = Moments(fine_edges(range(3)))
    with pytest.raises(ValueError, match="cannot be merged"):
        whole.merge(other)


def test_means_are_those_of_the_rows():
    moments, p = filled(parts()), parts()
    edges = torch.tensor([2.5])
    low, high = (torch.cat([x for t, x in p if (t > 2) == late]).mean(0) for late in (False, True))
    want = torch.stack([low, high, torch.cat([x for _, x in p]).mean(0)])
    torch.testing.assert_close(moments.means(edges), want)
    torch.testing.assert_close(moments.shares(edges), torch.tensor([3 / 8, 5 / 8]))


def test_the_cut_lies_where_statistics_change():
    assert filled(parts()).cut(2).tolist() == [5.5]


def test_held_out_calls_and_calls_without_a_timestep_do_not_count():
    moments = Moments(fine_edges(range(8)))
    moments.update(torch.ones(2, 3), Moment(0, 0, 1.0, held=True))
    moments.update(torch.ones(2, 3), Moment())
    assert not moments.seen and moments.nbytes(3) == 12 * 3 * 8


@pytest.mark.parametrize("bins", [1, 2, 3, 5])
def test_segments_equal_brute_force(bins):
    generator = torch.Generator().manual_seed(bins)
    v, n = torch.randn(9, 4, generator=generator).double(), torch.randint(1, 6, (9,), generator=generator).double()

    def cost(ends):
        total, start = 0.0, 0
        for end in [*[e + 1 for e in ends], 9]:
            part, w = v[start:end], n[start:end, None]
            total += float((w * (part - (w * part).sum(0) / w.sum()).square()).sum())
            start = end
        return total

    best = min(combinations(range(8), bins - 1), key=cost)
    assert cost(_segments(v, n, bins).tolist()) == pytest.approx(cost(best))


def test_fewer_timesteps_than_bins_give_a_bin_each():
    moments = Moments(fine_edges((1.0, 2.0, 3.0)))
    for t in (1.0, 3.0):
        moments.update(torch.randn(4, 2), Moment(t=t))
    assert moments.cut(8).tolist() == [1.5]
    assert fine_edges((None, None)).numel() == 0
    assert len(fine_edges(range(500), most=32)) == 31
