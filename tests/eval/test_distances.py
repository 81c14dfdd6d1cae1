"""Fréchet and kernel distances against direct computations, and their behaviour on known distributions."""

import numpy as np
import pytest
import torch

from qgen.eval.fid import few, frechet_distance
from qgen.eval.kid import kernel_distance


def features(n, K, seed=0, shift=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99)) / K**0.5
    return spread * torch.randn(n, K, generator=generator, dtype=torch.float32) @ mix + shift


@pytest.mark.parametrize(("n", "m", "K"), [(200, 150, 16), (40, 30, 64), (200, 30, 64), (65, 64, 64)])
def test_frechet_equals_the_matrix_square_root(n, m, K):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(n, K, 1), features(m, K, 2, shift=0.3, spread=1.5)
    a, b = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # sqrt(Cx) Cy sqrt(Cx) is symmetric, so its root is real also where the covariances have no full rank.
    values, vectors = np.linalg.eigh(ca)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.trace(linalg.sqrtm(half @ cb @ half + 1e-13 * np.eye(K))).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_frechet_of_gaussians_that_are_known():
    """Between N(0, 1) and N(s, t²) in one dimension it is s² + (t - 1)²."""
    x = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    y = 2 + 3 * torch.randn(400_000, 1, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(x, y) == pytest.approx(4 + 4, rel=0.01)


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = features(300, 8, 1), features(300, 8, 2, shift=0.2)
    expected = fid._compute_fid(*(t for z in (x.double(), y.double()) for t in (z.mean(0), z.T.cov())))
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_is_zero_for_equal_sets_and_symmetric():
    x, y = features(50, 80, 1), features(60, 80, 2)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(1, 4), torch.randn(5, 4), "first feature set must be"),
        (torch.randn(5, 4), torch.randn(1, 4), "second feature set must be"),
        (torch.randn(5, 4), torch.randn(5, 3), "same extractor"),
        (torch.full((5, 4), float("nan")), torch.randn(5, 4), "NaN"),
    ],
    ids=["one-picture", "one-real", "dimensions", "nan"],
)
def test_frechet_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


def test_few_pictures_are_flagged():
    assert "1280 feature dimensions" in few(100, 1280)[0]
    assert "< 2048" in few(1500, 1280)[0]
    assert few(2048, 2048) == []


def test_kernel_distance_equals_plain_loops():
    x, y = features(7, 5, 1).double().numpy(), features(6, 5, 2, shift=0.5).double().numpy()

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(6) for j in range(6) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found.mean == pytest.approx(xx + yy - 2 * xy, rel=1e-9)
    assert found.n == 6


def test_kernel_distance_interval_is_the_jackknife():
    x, y = features(9, 4, 1), features(8, 4, 2)
    drop = [kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y).mean for i in range(9)]
    drop_y = [kernel_distance(x, torch.cat([y[:i], y[i + 1 :]])).mean for i in range(8)]
    variance = 8 * np.var(drop) + 7 * np.var(drop_y)
    found = kernel_distance(x, y)
    assert found.high - found.mean == pytest.approx(1.96 * variance**0.5, rel=1e-6)


def test_kernel_distance_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(50, 8, 1), features(50, 8, 2, shift=0.2)
    assert kernel_distance(x, y).mean == pytest.approx(float(kid.poly_mmd(x.double(), y.double())), rel=1e-6)


def test_kernel_distance_is_unbiased_for_one_distribution():
    """Its mean over draws is zero within error, unlike the Fréchet distance, and most intervals cover zero."""
    found = [kernel_distance(features(40, 6, 2 * s), features(40, 6, 2 * s + 1)) for s in range(100)]
    means = np.array([f.mean for f in found])
    assert abs(means.mean()) < 3 * means.std() / 10
    assert np.mean([f.low <= 0 <= f.high for f in found]) > 0.85
    assert frechet_distance(features(40, 6, 0), features(40, 6, 1)) > 0.1


def test_kernel_distance_refuses_two_pictures():
    with pytest.raises(ValueError, match="n >= 3"):
        kernel_distance(torch.randn(2, 4), torch.randn(5, 4))


def test_kernel_distance_of_pairs_equals_plain_loops_and_its_interval_the_jackknife():
    x, y = features(7, 5, 1).double(), features(7, 5, 2, shift=0.5).double()

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    def plain(x, y):
        n = len(x)
        cells = [(i, j) for i in range(n) for j in range(n) if i != j]
        return np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in cells])

    found = kernel_distance(x, y, paired=True)
    assert found.mean == pytest.approx(plain(x, y), rel=1e-9)
    keep = [[j for j in range(7) if j != i] for i in range(7)]
    variance = 6 * np.var([plain(x[kept], y[kept]) for kept in keep])
    assert found.high - found.mean == pytest.approx(1.96 * variance**0.5, rel=1e-6)


def test_kernel_distance_of_pairs_that_are_alike_is_not_below_zero():
    """Each prompt's two pictures are nearly equal; taken for independent sets they would seem closer than equal ones."""
    x = features(12, 6, 3)
    y = x + 0.01 * features(12, 6, 4)
    assert kernel_distance(x, x, paired=True).mean == 0
    near, wrong = kernel_distance(x, y, paired=True), kernel_distance(x, y)
    assert near.low <= 0 <= near.high and wrong.mean < 100 * near.low
    with pytest.raises(ValueError, match="pairs wanted"):
        kernel_distance(x, y[:5], paired=True)
