"""PSNR and SSIM against scikit-image; SQNR against numpy."""

import itertools
import math

import numpy as np
import pytest
import torch

from qgen.eval.psnr import psnr
from qgen.eval.sqnr import sqnr_db
from qgen.eval.ssim import ssim

measure = pytest.importorskip("skimage.metrics")


def test_psnr_equals_scikit_image(photos, noisy):
    found = psnr(noisy(0.1), photos)
    expected = [
        measure.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1.0)
        for x, y in zip(photos, noisy(0.1), strict=True)
    ]
    assert found.shape == (8,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_ssim_equals_scikit_image(photos, noisy):
    """scikit-image leaves out a border of the window's radius, 5; of mirrored pictures it keeps all positions."""
    found = ssim(noisy(0.1), photos, batch_size=3)
    mirror = [(5, 5), (5, 5), (0, 0)]
    expected = [
        measure.structural_similarity(
            np.pad(x.numpy().astype(np.float64), mirror, mode="reflect"),
            np.pad(y.numpy().astype(np.float64), mirror, mode="reflect"),
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(photos, noisy(0.1), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_sqnr_equals_numpy(photos, noisy):
    x, y = photos.numpy().astype(np.float64), noisy(0.2).numpy().astype(np.float64)
    assert sqnr_db(photos, noisy(0.2)) == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=1e-9)


def test_sqnr_sees_a_wrong_scale_that_cosine_does_not(photos):
    assert sqnr_db(photos, 1.2 * photos) == pytest.approx(-20 * math.log10(0.2), abs=1e-4)


def test_equal_pictures_are_perfect(photos):
    assert bool(psnr(photos, photos).isinf().all())
    assert torch.allclose(ssim(photos, photos), torch.ones(8))
    assert sqnr_db(photos, photos) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@pytest.mark.parametrize("metric", [psnr, ssim], ids=["psnr", "ssim"])
def test_more_noise_scores_lower(photos, noisy, metric):
    values = [metric(noisy(sigma), photos) for sigma in (0.02, 0.05, 0.1, 0.2)]
    for less, more in itertools.pairwise(values):
        assert bool((more < less).all())


@pytest.mark.parametrize("metric", [psnr, ssim], ids=["psnr", "ssim"])
def test_one_picture_works(photos, noisy, metric):
    assert metric(noisy(0.1)[:1], photos[:1]).shape == (1,)


@pytest.mark.parametrize("metric", [psnr, ssim], ids=["psnr", "ssim"])
def test_pictures_that_do_not_fit_are_refused(photos, metric):
    with pytest.raises(ValueError, match="32 x 64 and the reference's 64 x 64"):
        metric(photos[:, :32], photos)
    with pytest.raises(ValueError, match="7 pictures cannot be compared with 8"):
        metric(photos[:7], photos)
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\)"):
        metric(photos.movedim(-1, 1), photos)


def test_ssim_needs_room_for_its_window(photos):
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(photos[:, :10], photos[:, :10])


def test_sqnr_refuses_other_shapes(photos):
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(photos, photos[:4])
