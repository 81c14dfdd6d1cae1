"""ConvRot's regular Hadamard matrix and qgen's Sylvester one: the identity that lets one layer stand for the other."""

import pytest
import torch

from qgen.io.peers import comfy_rotation as rotation
from qgen.kernels import reference

SIZES = (4, 16, 64, 256, 1024)


def regular(size):
    """The matrix from its definition, entry by entry."""
    found = torch.empty(size, size)
    for i in range(size):
        for j in range(size):
            sign, a, b, rest = 1, i, j, size
            while rest > 1:
                sign *= -1 if a % 4 + b % 4 == 3 else 1
                a, b, rest = a // 4, b // 4, rest // 4
            found[i, j] = sign
    return found / size**0.5


@pytest.mark.parametrize("size", SIZES[:4])
def test_the_matrix(size):
    r = rotation.matrix(size)
    assert torch.equal(r, regular(size)) and torch.equal(r, r.T)
    assert torch.allclose(r @ r, torch.eye(size), atol=1e-6)
    assert torch.allclose(r.sum(0), torch.ones(size), atol=1e-4)  # regular: all columns have the same sum


@pytest.mark.parametrize("size", SIZES)
def test_the_identity(size):
    """x R = ((x D) H) P D, on powers of two, whose sums are exact."""
    x = 2.0 ** torch.randint(0, 4, (8, size)).float()
    d, p = rotation.signs(size), rotation.swapped(size)
    there = reference.hadamard_blocks(x * d, size)[:, p] * d
    assert torch.equal(there, x @ rotation.matrix(size))
    assert torch.equal(p[p], torch.arange(size)) and torch.equal(d[p], d)


@pytest.mark.parametrize("format, width", [("int4_row", 2), ("int8_row", 1)])
def test_codes_come_back(format, width):
    """Every code but the least, and the least where its sign stays."""
    codes = torch.randint(0, 256, (32, 512 // width), dtype=torch.uint8)
    turned = rotation._turned(codes, format, 256)
    again = rotation._turned(turned, format, 256)
    same = again == codes
    least = (codes == 128) if width == 1 else (codes & 15 == 8) | (codes >> 4 == 8)
    assert bool(same[~least].all()) and not torch.equal(turned, codes)
    assert not rotation._reversible(codes, format, 256)


def test_against_comfy_kitchen():
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4", reason="the truth is comfy-kitchen's")
    for size in SIZES:
        assert torch.equal(rotation.matrix(size), kitchen._build_hadamard(size))
