"""Every usual form of pictures becomes one; every wrong one is named."""

import numpy as np
import pytest
import torch

from qgen.errors import BadData
from qgen.eval.images import as_images, batches, load_folder

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def bytes_(photos):
    return (photos * 255).round().to(torch.uint8)


@pytest.mark.parametrize("form", ["uint8", "numpy", "pil", "arrays", "float64"])
def test_forms_agree(photos, bytes_, form):
    pictures = {
        "uint8": bytes_,
        "numpy": bytes_.numpy(),
        "pil": [Image.fromarray(x.numpy()) for x in bytes_],
        "arrays": list(bytes_.numpy()),
        "float64": photos.double().numpy(),
    }[form]
    found = as_images(pictures)
    assert found.dtype == torch.float32
    assert torch.equal(found, photos)


def test_grey_becomes_colour_and_transparent_becomes_white():
    grey, clear = Image.new("L", (12, 12), 128), Image.new("RGBA", (12, 12), (255, 0, 0, 0))
    found = as_images([grey, clear])
    assert torch.allclose(found[0], torch.tensor(128 / 255))
    assert bool((found[1] == 1).all())


def test_folder_in_order_of_names(bytes_, tmp_path, photos):
    for i in (2, 0, 1):
        Image.fromarray(bytes_[i].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert torch.equal(as_images(tmp_path), photos[:3])
    Image.fromarray(bytes_[0, :32].numpy()).save(tmp_path / "9.png")
    assert [tuple(x.shape[:2]) for x in load_folder(tmp_path)] == [(64, 64)] * 3 + [(32, 64)]
    with pytest.raises(ValueError, match="one size, found 32 x 64, 64 x 64"):
        as_images(tmp_path)


def test_batches_break_where_sizes_change(photos):
    mixed = [photos[0], photos[1], photos[2, :32], photos[3]]
    assert [tuple(b.shape[:2]) for b in batches(mixed, 8)] == [(2, 64), (1, 32), (1, 64)]
    assert [len(b) for b in batches(photos, 3)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8), ValueError, "height, width, 3"),
        (torch.rand(0, 8, 8, 3), ValueError, "found \\(0, 8, 8, 3\\)"),
        (torch.rand(2, 8, 8, 3) * 255, ValueError, "values in \\[0, 1\\]"),
        (torch.rand(2, 8, 8, 3) - 0.5, ValueError, "values in \\[0, 1\\]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int32), ValueError, "int32"),
        (torch.full((2, 8, 8, 3), torch.nan), BadData, "NaN"),
        ([], ValueError, "found no picture"),
        ([np.zeros((8, 8), np.uint8)], ValueError, "one picture must have shape"),
        ("/no/such/folder", ValueError, "no folder"),
    ],
    ids=["channels-first", "empty", "0-255", "negative", "int32", "nan", "no-pictures", "grey-array", "no-folder"],
)
def test_refuses(pictures, error, message):
    with pytest.raises(error, match=message):
        as_images(pictures)


def test_refuses_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        load_folder(tmp_path)
