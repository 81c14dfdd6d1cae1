"""Bit streams against whole Python numbers, and which format a peer's numbers become."""

import pytest
import torch

from qgen import formats
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.layers import Whole, bits_to_words, emit, words_to_bits

GOLDEN = {2: 0xE4E4E4E4, 3: (0x88FAC688, 0xC688FAC6, 0xFAC688FA), 4: 0x76543210}


def stream_of(row, bits):
    """The words of one row by arithmetic on one long whole number."""
    whole = sum(int(code) << (bits * i) for i, code in enumerate(row))
    return [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", (1, 31, 32, 37, 100))
def test_streams(bits, count):
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    words = bits_to_words(codes, bits)
    assert [[w & 0xFFFFFFFF for w in row] for row in words.tolist()] == [stream_of(row, bits) for row in codes.tolist()]
    assert torch.equal(words_to_bits(words, bits, count), codes)


def test_goldens():
    assert bits_to_words((torch.arange(16, dtype=torch.uint8) % 4)[None], 2).tolist()[0][0] & 0xFFFFFFFF == GOLDEN[2]
    assert [
        w & 0xFFFFFFFF for w in bits_to_words((torch.arange(32, dtype=torch.uint8) % 8)[None], 3)[0].tolist()
    ] == list(GOLDEN[3])
    assert bits_to_words(torch.arange(8, dtype=torch.uint8)[None], 4).tolist() == [[GOLDEN[4]]]


def whole(signed=True, bits=4, block=32, dtype=torch.float16, zero=False, offset=False, n=6, k=128):
    groups = -(-k // block)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = torch.randint(low, high, (n, k)).to(torch.int8 if signed else torch.uint8)
    codes[0, :2] = torch.tensor([low, high - 1]).to(codes.dtype)
    return Whole(
        codes,
        bits,
        block,
        (torch.rand(n, groups) + 0.1).to(dtype),
        torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8) if zero else None,
        torch.randn(n, groups).to(dtype) if offset else None,
    )


CASES = [
    ({}, "int4_g32_f16"),
    ({"dtype": torch.bfloat16}, "int4_g32"),
    ({"dtype": torch.float32, "block": 128, "k": 256}, "int4_g128_f32"),
    ({"block": 128, "k": 128}, "int4_row"),
    ({"bits": 8, "block": 64}, "int8_g64_f16"),
    ({"signed": False, "zero": True}, "uint4z_g32_f16"),
    ({"signed": False, "zero": True, "block": 128}, "uint4z_row"),
    ({"signed": False, "offset": True}, "uint4_g32_f16"),
    ({"offset": True, "dtype": torch.bfloat16}, "int4o_g32"),
    ({"signed": False, "offset": True, "bits": 8, "block": 16, "dtype": torch.float32}, "uint8_g16_f32"),
    ({"k": 100, "block": 32}, "int4_g32_f16"),
    ({"k": 37, "block": 64}, "int4_row"),
]


@pytest.mark.parametrize(("made", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_values_do_not_change(made, name):
    one = whole(**made)
    bias = ("x.bias", torch.randn(6))
    (part,) = emit("x", one, bias=bias, said="test")
    assert isinstance(part, Layer) and part.layout.weight == name and part.note == "test"
    assert torch.equal(part.slots["bias"], bias[1]) and set(part.layout.slots) == set(part.slots) - {"codes", "scales"}
    slots = part.slots
    fmt = formats.get(name)
    values = fmt.dequantize(formats.QTensor(slots["codes"], slots["scales"], None, slots.get("zero"), name))
    n, k = one.codes.shape
    assert values.shape[1] == formats.padded(k, name)
    by_hand = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            group = column // one.block
            value = torch.tensor(float(one.codes[row, column]))
            if one.zero is not None:
                value = value - one.zero[row, group]
            value = value * one.scales[row, group].float()
            by_hand[row, column] = value if one.offset is None else value + one.offset[row, group].float()
    assert torch.equal(values[:, :k], by_hand)
    assert torch.equal(one.dequantize(), by_hand)
    if k == fmt.block or k % 8 == 0:
        empty = part.layout.empty(n, k, torch.float32)
        assert {s: (t.shape, t.dtype) for s, t in empty.items()} == {s: (t.shape, t.dtype) for s, t in slots.items()}


@pytest.mark.parametrize("made", [{"block": 48, "k": 96}, {"block": 8}], ids=("48", "8"))
def test_blocks_without_a_format_become_floats(made):
    one = whole(**made)
    weight, bias = emit("x", one, bias=("x.bias", torch.ones(6)))
    assert (
        isinstance(weight, Plain)
        and weight.name == "x.weight"
        and weight.note.startswith("dequantized: 4-bit codes in blocks of")
    )
    assert torch.equal(weight.tensor, one.dequantize()) and bias.name == "x.bias"
