"""Canonical bytes: the address of every code by hand, and there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen.formats import packing


def test_low_nibble_is_the_even_column():
    assert packing.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert packing.pack(torch.tensor([[3, 2, 1, 0]], dtype=torch.uint8), 2).tolist() == [[0b00_01_10_11]]
    assert packing.pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0x81]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_there_and_back(bits, rows, bytes_per_row, seed):
    k = bytes_per_row * 8 // bits
    codes = torch.randint(0, 1 << bits, (rows, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    assert packed.shape == (rows, bytes_per_row) and torch.equal(packing.unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_back_and_there(bits):
    packed = torch.randint(0, 256, (3, 2, 7), dtype=torch.uint8)
    assert torch.equal(packing.pack(packing.unpack(packed, bits), bits), packed)


def test_not_contiguous():
    codes = torch.randint(0, 16, (6, 8), dtype=torch.uint8).T
    assert torch.equal(packing.pack(codes, 4), packing.pack(codes.contiguous(), 4))


def test_refusals():
    with pytest.raises(ValueError, match="K divisible by 2, found K=5"):
        packing.pack(torch.zeros(1, 5, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bits can be packed, found 3"):
        packing.unpack(torch.zeros(1, 5, dtype=torch.uint8), 3)
