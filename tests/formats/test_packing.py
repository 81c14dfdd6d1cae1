"""Canonical bytes: the address of every code by hand, the same bits by numpy, and there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen.formats import packing


def test_low_nibble_is_the_even_column():
    assert packing.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert packing.pack(torch.tensor([[3, 2, 1, 0]], dtype=torch.uint8), 2).tolist() == [[0b00_01_10_11]]
    assert packing.pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0x81]]


def test_three_bits_straddle_bytes_as_in_the_words_of_gptq():
    """The 96-bit stream that GPTQ and compressed-tensors keep in three words: k % 8 for k = 0 … 31."""
    codes = (torch.arange(32) % 8).to(torch.uint8)
    words = packing.pack(codes, 3).numpy().view("<u4")
    assert [f"{w:08X}" for w in words] == ["88FAC688", "C688FAC6", "FAC688FA"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_those_of_numpy(bits):
    """Each code to its bits, low bit first; all bits of a row to bytes, low bit first."""
    codes = torch.randint(0, 1 << bits, (5, 48), dtype=torch.uint8)
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits].reshape(5, -1)
    assert np.array_equal(packing.pack(codes, bits).numpy(), np.packbits(stream, axis=-1, bitorder="little"))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_there_and_back(bits, rows, units, seed):
    k = units * 8
    bytes_per_row = units * bits
    codes = torch.randint(0, 1 << bits, (rows, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    assert packed.shape == (rows, bytes_per_row) and torch.equal(packing.unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_back_and_there(bits):
    packed = torch.randint(0, 256, (3, 2, 105), dtype=torch.uint8)  # 105: whole groups of 3, 5 and 7 bytes
    assert torch.equal(packing.pack(packing.unpack(packed, bits), bits), packed)


def test_not_contiguous():
    codes = torch.randint(0, 16, (6, 8), dtype=torch.uint8).T
    assert torch.equal(packing.pack(codes, 4), packing.pack(codes.contiguous(), 4))


def test_refusals():
    with pytest.raises(ValueError, match="K divisible by 2, found K=5"):
        packing.pack(torch.zeros(1, 5, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="K divisible by 8, found K=12"):
        packing.pack(torch.zeros(1, 12, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="whole groups of 3 bytes, found 5"):
        packing.unpack(torch.zeros(1, 5, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="1 to 8 bits can be packed, found 9"):
        packing.unpack(torch.zeros(1, 5, dtype=torch.uint8), 9)
