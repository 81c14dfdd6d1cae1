"""Small modules, quantized with and without calibration."""

import pytest
import torch
from torch import nn

from qgen.engine import quantize
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.recipe import Recipe, Spec


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Tiny(nn.Module):
    """Two blocks between an embedder and a head, and a parameter in no layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(16, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def calibrated(tiny):
    recipe = Recipe(Spec("int4_g64", "int8_row", (Smooth(), LowRank(4))), name="small").skip(
        "embed", "head", why="ends stay float"
    )
    return quantize(tiny, recipe, calibration=[torch.randn(4, 20, 16) for _ in range(5)], progress=False)


@pytest.fixture
def datafree(tiny):
    return quantize(tiny, "rtn-int4", progress=False)
