"""Compiled rounding by columns against plain loops in float64."""

import pytest
import torch

from qgen import formats
from qgen.kernels import cpu_columns

why = cpu_columns.lacking()
pytestmark = pytest.mark.skipif(bool(why), reason=why or "runs")
C, N = 37, 600


def case(low=-7.0, high=7.0):
    g = torch.Generator().manual_seed(0)
    back = torch.randn(C, N, generator=g) * 3
    lost = torch.randn(C, N, generator=g) * 3
    step = torch.rand(C, N, generator=g) + 0.2
    step[:, 5] = 0
    feed = (torch.randn(C, C, generator=g) * 0.1).tril(-1)
    return back, lost, torch.full((C, N), float("nan")), step, feed, low, high


def by_hand(back, lost, step, feed, nearest):
    back, lost, step, feed = (t.double() for t in (back, lost, step, feed))
    values = torch.zeros_like(back)
    for i in range(C - 1, -1, -1):
        units = torch.where(step[i] > 0, back[i] / step[i], 0.0)
        values[i] = nearest(units)
        lost[i] -= values[i] * step[i]
        for j in range(i):
            back[j] += feed[i, j] * lost[i]
    return values, lost


@pytest.mark.parametrize(
    ("kind", "bounds"), [("integer", (-7.0, 7.0)), ("integer", (0.0, 15.0)), ("e2m1", (-6.0, 6.0))]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_like_plain_loops(kind, bounds, threads):
    back, lost, values, step, feed, low, high = case(*bounds)
    e2m1 = formats.get("nvfp4").element
    nearest = (lambda u: u.round().clamp(low, high)) if kind == "integer" else (lambda u: e2m1.round(u).double())
    want, rest = by_hand(back, lost, step, feed, nearest)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu_columns.round_columns(back, lost, values, step, feed, kind, low, high)
    finally:
        torch.set_num_threads(before)
    same = (values.double() == want).all(0)
    assert same.float().mean() > 0.97, "a code at a tie may differ, and what follows in its row"
    assert torch.allclose(lost[:, same].double(), rest[:, same], atol=1e-4)
    assert (values[:, 5] == max(0.0, low)).all()


def test_number_of_threads_does_not_change_a_bit():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            back, lost, values, step, feed, low, high = case()
            cpu_columns.round_columns(back, lost, values, step, feed, "integer", low, high)
            results.append((values, lost))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(v, results[0][0]) and torch.equal(e, results[0][1]) for v, e in results[1:])


def test_every_value_of_e2m1_and_its_ties():
    element = formats.get("nvfp4").element
    x = torch.linspace(-8, 8, 16 * 64 + 1)[None].contiguous()
    lost, values = x.clone(), torch.empty_like(x)
    cpu_columns.round_columns(x.clone(), lost, values, torch.ones_like(x), torch.zeros(1, 1), "e2m1", -6.0, 6.0)
    assert torch.equal(values, element.round(x))


def test_wrong_arguments_are_refused():
    back, lost, values, step, feed, low, high = case()
    with pytest.raises(ValueError, match="contiguous float32"):
        cpu_columns.round_columns(back.T, lost, values, step, feed, "integer", low, high)
    with pytest.raises(ValueError, match="do not belong together"):
        cpu_columns.round_columns(back, lost, values, step, feed[1:, 1:].contiguous(), "integer", low, high)
