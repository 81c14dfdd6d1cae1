"""Streaming statistics against the whole data at once, in any order, in any number of parts."""

import itertools

import pytest
import torch

from qgen.calibration.base import Moment
from qgen.calibration.observers import AbsMax, Gram, Reservoir

K = 24


def batches(count=6, rows=40):
    """[(rows, moment)]: the last third is held out."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows + i, K, generator=g), Moment(sample=i, held=i >= count * 2 // 3)) for i in range(count)]


def fed(observer, parts):
    for x, moment in parts:
        observer.update(x, moment)
    return observer


def fitted(parts):
    return torch.cat([x for x, m in parts if not m.held])


MAKE = {"absmax": AbsMax, "gram": Gram, "rows": lambda: Reservoir(64, seed=3)}


def values(observer):
    if isinstance(observer, AbsMax):
        return [observer.absmax, observer.mean]
    return [observer.mean] if isinstance(observer, Gram) else [observer.result(False), observer.result(True)]


def test_statistics_are_those_of_all_fitted_rows():
    parts = batches()
    x = fitted(parts).double()
    absmax, gram = fed(AbsMax(), parts), fed(Gram(), parts)
    assert torch.equal(absmax.absmax.double(), x.abs().amax(0)) and torch.allclose(
        absmax.mean.double(), x.abs().mean(0)
    )
    assert torch.allclose(gram.mean.double(), x.T @ x / len(x), atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_any_order_and_any_split_give_the_same(name):
    parts, make = batches(), MAKE[name]
    whole = values(fed(make(), parts))
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        shuffled = [parts[i] for i in order]
        left, right = fed(make(), shuffled[:2]), fed(make(), shuffled[2:])
        right.merge(left)
        for a, b in zip(whole, values(right), strict=True):
            assert torch.equal(a, b)  # to the bit, sums too: they are float64 and rounded once


@pytest.mark.parametrize("name", MAKE)
def test_merging_with_an_empty_one_changes_nothing(name):
    parts, make = batches(), MAKE[name]
    full, empty = fed(make(), parts), make()
    before = values(full)
    full.merge(make())
    empty.merge(full)
    for a, b, c in zip(before, values(full), values(empty), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", MAKE)
def test_empty_until_a_fitted_row_comes(name):
    observer = MAKE[name]()
    assert observer.empty
    observer.update(torch.randn(5, K), Moment(held=True))
    assert observer.empty
    observer.update(torch.randn(5, K), Moment(sample=1))
    assert not observer.empty


def test_a_large_sample_is_the_same_in_any_order():
    """Twenty thousand rows, so that keys of 24 bits would collide: no two rows may ever share one."""
    g = torch.Generator().manual_seed(0)
    parts = [(torch.randn(4000, 4, generator=g), Moment(i)) for i in range(5)]
    a, b = fed(Reservoir(15_000), parts), fed(Reservoir(15_000), parts[::-1])
    assert torch.equal(a.result(), b.result())
    keys = a._kept[False][0]
    assert len(keys.unique()) == len(keys) == 15_000


def test_the_reservoir_is_a_uniform_sample():
    x = torch.arange(4000.0)[:, None].expand(4000, 2)
    kept = fed(Reservoir(1000), [(x[i : i + 400], Moment(sample=i)) for i in range(0, 4000, 400)]).result()[:, 0]
    assert len(kept.unique()) == 1000
    per_part = torch.histc(kept, 10, 0, 4000)
    assert per_part.min() > 60 and per_part.max() < 140  # 100 expected, deviation 9
    assert abs(float(kept.mean()) - 2000) < 120


def test_held_out_rows_are_a_quarter_and_apart():
    parts = [(torch.full((300, 2), float(i)), Moment(i, held=i % 2 == 1)) for i in range(4)]
    reservoir = fed(Reservoir(100), parts)
    assert reservoir.result(False).shape == (100, 2) and reservoir.result(True).shape == (25, 2)
    assert set(reservoir.result(False).unique().tolist()) == {0, 2} and set(
        reservoir.result(True).unique().tolist()
    ) == {1, 3}


def test_the_sample_depends_on_the_seed():
    parts = batches(rows=200)
    assert torch.equal(fed(Reservoir(64, 1), parts).result(), fed(Reservoir(64, 1), parts).result())
    assert not torch.equal(fed(Reservoir(64, 1), parts).result(), fed(Reservoir(64, 2), parts).result())


@pytest.mark.parametrize("name", MAKE)
def test_nbytes_covers_what_is_held(name):
    observer = fed(MAKE[name](), batches(rows=200))
    held = {
        "absmax": lambda o: o.absmax.nbytes + o.total.nbytes,
        "gram": lambda o: sum(t.nbytes for t in o.total),
        "rows": lambda o: sum(t.nbytes for kept in o._kept.values() for t in kept),
    }[name](observer)
    assert held <= observer.nbytes(K) <= 1.1 * held


@pytest.mark.parametrize("rows", [60, 200, 2000])
def test_gram_of_few_rows_keeps_them_and_gives_the_same(rows):
    """Fewer rows than expected, as many, and more; the caller's memory is used again in between."""
    g, expected = torch.Generator().manual_seed(0), 200
    lazy, plain, buffer = Gram(expected, 2), Gram(), torch.empty(20, 256, dtype=torch.bfloat16)
    for _ in range(rows // 20):
        buffer.copy_(torch.randn(20, 256, generator=g))
        lazy.update(buffer, Moment())
        plain.update(buffer, Moment())
    held = sum(x.nbytes for x in (lazy.total or lazy._waiting))
    assert lazy.nbytes(256) == expected * 2 * 256 < plain.nbytes(256)
    assert rows > expected or held <= lazy.nbytes(256)
    assert torch.allclose(lazy.mean, plain.mean, atol=1e-5) and torch.equal(lazy.mean, lazy.mean)
    other = Gram(expected, 2)
    other.update(buffer, Moment())
    other.merge(lazy)
    assert other.count == rows + 20 and not other.empty


def test_rows_are_kept_as_they_come():
    reservoir = Reservoir(50, itemsize=2)
    x = torch.randn(40, K).bfloat16()
    reservoir.update(x, Moment())
    want = x.float().sum(1).sort().values
    x.zero_()
    kept = reservoir._kept[False]
    assert kept[1].dtype == torch.bfloat16 and kept[0].nbytes + kept[1].nbytes <= reservoir.nbytes(K)
    assert reservoir.result().dtype == torch.float32
    assert torch.allclose(reservoir.result().sum(1).sort().values, want)


def test_half_precision_rows_are_summed_in_float32():
    x = torch.full((3000, 2), 0.1, dtype=torch.bfloat16)
    gram, absmax = fed(Gram(), [(x, Moment())]), fed(AbsMax(), [(x, Moment())])
    assert torch.allclose(gram.mean, x[0, 0].float() ** 2 * torch.ones(2, 2), rtol=1e-4)
    assert torch.allclose(absmax.mean, x[0].float(), rtol=1e-6)
