"""Layouts against the address of every element written out by hand, and there and back, bit for bit."""

import pytest
import torch

from qgen import formats
from qgen.formats import packing
from qgen.kernels import layouts

ROWS = [1, 5, 64, 130]
DEPTHS = [64, 192]


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_there_and_back(bits, rows, k):
    codes = torch.randint(0, 256, (rows, k * bits // 8), dtype=torch.uint8)
    groups = layouts.codes_to_groups(codes, bits)
    assert groups.shape == (k // 64, rows, 8 * bits) and groups.is_contiguous()
    assert torch.equal(layouts.codes_from_groups(groups, bits), codes)


def test_half_split_addresses():
    rows, k = 3, 128
    values = torch.randint(0, 16, (rows, k), dtype=torch.uint8)
    groups = layouts.codes_to_groups(packing.pack(values, 4), 4)
    for row in range(rows):
        for column in range(k):
            group, j = divmod(column, 64)
            byte = groups[group, row, j % 32]
            assert (byte >> 4 if j >= 32 else byte & 15) == values[row, column]


def test_codes_need_whole_groups():
    with pytest.raises(ValueError, match="divisible by 64, found K=96"):
        layouts.codes_to_groups(torch.zeros(2, 48, dtype=torch.uint8), 4)


def test_offset_binary_adds_eight_and_undoes_itself():
    codes = torch.arange(256, dtype=torch.uint8)
    offset = layouts.offset_binary(codes)
    assert torch.equal(
        packing.unpack(offset, 4).float(),
        formats.get("int4_g64").element.decode(packing.unpack(codes, 4)).nan_to_num(-8) + 8,
    )
    assert torch.equal(layouts.offset_binary(offset), codes)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_scales_there_and_back(block, dtype):
    scales = (torch.rand(5, 4) * 100).to(dtype)
    grouped = layouts.grouped_scales(scales, block)
    assert grouped.shape == (4 * block // 64, 5)
    assert torch.equal(grouped[block // 64], scales[:, 1])
    assert torch.equal(layouts.scales_from_groups(grouped, block), scales)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (200, 6), (256, 12)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_swizzle_there_and_back(rows, groups, dtype):
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8).view(dtype)
    tiles = layouts.swizzle_scales(scales)
    assert tiles.shape == (-(-rows // 128), -(-groups // 4), 32, 4, 4) and tiles.dtype == dtype
    back = layouts.unswizzle_scales(tiles, rows, groups)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_swizzle_addresses():
    rows, groups = 200, 6
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    flat = layouts.swizzle_scales(scales).flatten()
    for row in range(rows):
        for group in range(groups):
            tile = (row // 128) * 2 + group // 4
            assert flat[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4] == scales[row, group]
    assert flat.long().sum() == scales.long().sum()  # what is padded is zero


def test_pad_rows():
    t = torch.ones(3, 2)
    assert torch.equal(layouts.pad_rows(t, 4), torch.tensor([[1.0, 1], [1, 1], [1, 1], [0, 0]]))
    assert layouts.pad_rows(t, 3) is t
