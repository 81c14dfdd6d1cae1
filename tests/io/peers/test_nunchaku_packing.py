"""Nunchaku's byte order: bijections, equal to a packer that was written on its own from the description of the tiles."""

import pytest
import torch

from qgen.formats import packing as canonical
from qgen.io.peers import nunchaku_packing as packing
from tests.io.peers import nunchaku_writer as writer

SIZES = [(128, 128), (256, 128), (128, 384), (384, 512)]
named = pytest.mark.parametrize(("n", "k"), SIZES, ids=[f"N{n}-K{k}" for n, k in SIZES])


def same(a, b):
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def random(shape, dtype):
    """Any bits at all, NaN and infinity among them."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


@named
@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_codes(n, k, kind):
    """The same order for both: only the meaning of a nibble differs."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    stored = writer.codes_to_file(codes)
    assert same(packing.unpack_codes(stored), canonical.pack(codes, 4))
    assert same(packing.pack_codes(canonical.pack(codes, 4)), stored)
    anything = random((n, k // 2), torch.int8)
    assert same(packing.pack_codes(packing.unpack_codes(anything)), anything)


@named
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_scales_of_64(n, k, dtype):
    scales = random((n, k // 64), dtype)
    stored = writer.scales_to_file(scales)
    assert same(packing.unpack_scales(stored), scales) and same(packing.pack_scales(scales), stored)


@named
def test_scales_of_16(n, k):
    scales = random((n, k // 16), torch.float8_e4m3fn)
    stored = writer.micro_to_file(scales)
    assert same(packing.unpack_micro(stored), scales) and same(packing.pack_micro(scales), stored)


@named
def test_vectors(n, k):
    for size in (n, k):
        vector = random((size,), torch.bfloat16)
        stored = writer.vector_to_file(vector)
        assert same(packing.unpack_vector(stored), vector) and same(packing.pack_vector(vector), stored)


@named
@pytest.mark.parametrize("rank", [16, 48, 128], ids=lambda r: f"R{r}")
def test_low_rank(n, k, rank):
    down, up = random((rank, k), torch.bfloat16), random((n, rank), torch.bfloat16)
    assert same(packing.unpack_down(writer.down_to_file(down)), down)
    assert same(packing.pack_down(down), writer.down_to_file(down))
    assert same(packing.unpack_up(writer.up_to_file(up)), up)
    assert same(packing.pack_up(up), writer.up_to_file(up))


@pytest.mark.parametrize(("n", "k"), [(4, 64), (8, 128), (96, 192)], ids=["N4-K64", "N8-K128", "N96-K192"])
def test_awq_words(n, k):
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    stored = writer.awq_to_file(codes)
    assert same(packing.unpack_awq(stored), canonical.pack(codes, 4))
    assert same(packing.pack_awq(canonical.pack(codes, 4)), stored)
    anything = random((n // 4, k // 2), torch.int32)
    assert same(packing.pack_awq(packing.unpack_awq(anything)), anything)


@pytest.mark.parametrize("turns", [3, 6])
def test_rows_that_take_turns(turns):
    """Row i of the file is row i // turns of part i % turns."""
    stored = torch.arange(turns * 5)[:, None] * torch.ones(1, 2, dtype=torch.long)
    parts = packing.deinterleave(stored, turns).reshape(turns, 5, 2)
    assert all(bool((parts[i % turns, i // turns] == i).all()) for i in range(turns * 5))
    assert same(packing.interleave(packing.deinterleave(stored, turns), turns), stored)
