"""Real pictures to score: 64 x 64 pieces of scikit-image's photographs."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def photos():
    """(8, 64, 64, 3) float32 in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    cat, astronaut = data.chelsea(), data.astronaut()
    pieces = [picture[y : y + 64, x : x + 64] for picture in (cat, astronaut) for y, x in CORNERS]
    return torch.from_numpy(np.stack(pieces)).float() / 255


CORNERS = ((60, 100), (100, 200), (150, 60), (20, 250))


@pytest.fixture(scope="session")
def noisy(photos):
    """A function: the photographs with Gaussian noise of standard deviation sigma, still in [0, 1]."""
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    return lambda sigma: (photos + sigma * noise).clamp(0, 1)
