"""Pixels of the grid and of differences, against arithmetic done by hand."""

import numpy as np
import pytest
import torch

from qgen.show.pictures import difference, enlarge, grid, pixels

image = pytest.importorskip("PIL.Image")


def test_floats_become_the_nearest_of_256_values():
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, -1.0, 0.001961]).reshape(1, 2, 3)
    assert pixels(x).reshape(-1).tolist() == [0, 128, 255, 255, 0, 1]


def test_pil_arrays_and_tensors_agree():
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert all(np.array_equal(pixels(given), x) for given in (x, torch.from_numpy(x), image.fromarray(x)))


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4)), np.zeros((0, 4, 3)), np.full((2, 2, 3), np.nan), np.zeros((2, 2, 3), int)]
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="picture"):
        pixels(bad)


def test_difference_is_absolute_and_amplified():
    a, b = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 90, np.uint8)
    assert np.array_equal(difference(a, b), np.full((2, 2, 3), 40)) and np.array_equal(
        difference(b, a), difference(a, b)
    )
    assert not difference(a, a).any()


def test_enlarging_repeats_pixels():
    x = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert enlarge(x, 5).shape == (6, 6, 3) and np.array_equal(enlarge(x, 5)[::3, ::3], x)


def test_the_grid_holds_every_picture_unchanged():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (10, 60, 110, 160)]
    made = np.asarray(
        grid(
            [("one\ntwo", pictures[:2]), ("three", pictures[2:])],
            ["short", "a caption of many words, cut"],
            "Title",
            40,
        )
    )
    for value in (10, 60, 110, 160):
        where = np.argwhere((made == value).all(-1))
        (top, left), (bottom, right) = where.min(0), where.max(0)
        assert (made[top : bottom + 1, left : right + 1] == value).all()
        assert bottom - top + 1 == right - left + 1 == 40


def test_rows_and_captions_must_fit():
    with pytest.raises(ValueError, match="one picture per caption"):
        grid([("a", [np.zeros((4, 4, 3))])], ["x", "y"])
