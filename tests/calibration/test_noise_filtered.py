"""Noise-filtered diverse sampling: corrupted scenes are found, good ones stay, every kind is represented."""

import math

import pytest
import torch
from torch import nn

from qgen.calibration.noise_filtered import kmeans, noise_filtered, outliers


def facts(seed):
    """Statistics of 100 scenes of 5 kinds in 12 numbers, ten of them corrupted."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 12, generator=g)
    bad = torch.randperm(100, generator=g)[:10]
    x[bad] += 8 * torch.randn(10, 12, generator=g)
    return x, set(bad.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_outliers_are_found(seed):
    x, bad = facts(seed)
    _, dropped = outliers(x)
    found = set(dropped.nonzero().flatten().tolist())
    assert bad <= found and len(found - bad) <= 2


def test_kmeans_finds_planted_clusters():
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(5, 3, generator=g)
    truth = torch.arange(5).repeat_interleave(20)
    label = kmeans(centres[truth] + 0.1 * torch.randn(100, 3, generator=g), 5)
    assert len({tuple(label[truth == j].unique().tolist()) for j in range(5)}) == 5
    assert torch.equal(kmeans(centres[truth], 5, seed=3), kmeans(centres[truth], 5, seed=3))


class Deep(nn.Module):
    """Rows of frames through two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def scenes():
    """100 scenes of 4 frames, 6 rows each: 5 kinds by how far frames turn away from the first; every tenth is corrupted."""
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(100):
        first, other = torch.randn(1, 6, 8, generator=g), torch.randn(1, 6, 8, generator=g)
        turn = torch.linspace(0, math.acos(1 - 0.45 * (i % 5)), 4).reshape(4, 1, 1)
        x = turn.cos() * first + turn.sin() * other
        made.append((x + (30 * torch.randn(4, 6, 8, generator=g) if i % 10 == 7 else 0)).flatten(0, 1))
    return made


def test_no_corrupted_scene_and_every_kind():
    torch.manual_seed(0)
    model = Deep().eval()
    found = noise_filtered(model, scenes(), ["layers.0", "layers.1"], count=20, clusters=5, frames=4)
    assert len(found.chosen) == len(found.calls.calls) == 20
    assert not any(i % 10 == 7 for i in found.chosen)
    bad = {i for i in range(100) if i % 10 == 7}
    assert bad <= set(found.dropped) and len(set(found.dropped) - bad) <= 2
    assert {i % 5 for i in found.chosen} == set(range(5))


def test_refusals():
    model = Deep().eval()
    with pytest.raises(ValueError, match="scenes"):
        noise_filtered(model, scenes()[:3], ["layers.0"], count=4)
    with pytest.raises(ValueError, match="frames"):
        noise_filtered(model, scenes(), ["layers.0"], count=4, frames=7)
    assert not model.layers[0]._forward_hooks
