"""GPTQ files by a packer written here from the format's description, weight by weight."""

import pytest
import torch

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, importers
from qgen.io.peers.floats import dequantized

N, K = 64, 256


def words(codes, bits):
    """Whole numbers of each row as one long number, cut into signed words."""
    out = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        cut = [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
        out.append([w - (1 << 32) if w >> 31 else w for w in cut])
    return torch.tensor(out, dtype=torch.int32)


def packed(codes, zero, scales, bits, index, minus_one=True):
    """codes (K, N), zero (G, N) and scales (G, N) as AutoGPTQ writes them."""
    stored = (zero - 1) % (1 << bits) if minus_one else zero
    return {
        "qweight": words(codes.T, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scales,
        "g_idx": index.int(),
    }


def made(bits=4, block=64, symmetric=False, order=None, **more):
    groups = K // block
    codes = torch.randint(0, 1 << bits, (K, N))
    zero = torch.full((groups, N), 1 << bits - 1) if symmetric else torch.randint(0, 1 << bits, (groups, N))
    scales = (torch.rand(groups, N) + 0.1).half()
    index = torch.arange(K) // block if order is None else order
    values = (scales.float()[index] * (codes - zero[index])).T
    return {f"a.b.{leaf}": t for leaf, t in packed(codes, zero, scales, bits, index, **more).items()}, values


def config(bits=4, block=64, **more):
    return {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": block, **more}}


def parts(source):
    assert importers["gptq"].recognizes(source)
    return list(importers["gptq"].parts(source))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "zeros"))
@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
def test_values(bits, symmetric, version, dict_source):
    tensors, values = made(bits, 64, symmetric, minus_one=version == "gptq")
    bias = torch.randn(N).half()
    source = dict_source(
        tensors | {"a.b.bias": bias, "n.weight": torch.ones(2)}, config=config(bits, checkpoint_format=version)
    )
    layer, plain = parts(source)
    assert layer.layout.weight == (f"int{bits}_g64_f16" if symmetric else f"uint{bits}z_g64_f16")
    assert layer.path == "a.b" and torch.equal(layer.slots["bias"], bias) and plain.name == "n.weight"
    assert torch.equal(dequantized(layer)[0], values)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_without_a_config(bits, dict_source):
    tensors, values = made(bits)
    assert torch.equal(dequantized(parts(dict_source(tensors))[0])[0], values)
    del tensors["a.b.g_idx"]
    assert torch.equal(dequantized(parts(dict_source(tensors))[0])[0], values)


@pytest.mark.parametrize("block", (K, 32, 128))
def test_groups(block, dict_source):
    tensors, values = made(block=block)
    (layer,) = parts(dict_source(tensors, config=config(block=block if block < K else -1)))
    assert layer.layout.weight == ("uint4z_row" if block == K else f"uint4z_g{block}_f16")
    assert torch.equal(dequantized(layer)[0], values)


def test_reordered_columns_are_dequantized(dict_source):
    tensors, values = made(order=torch.randperm(K) % 4)
    weight, bias = parts(dict_source(tensors | {"a.b.bias": torch.ones(N).half()}, config=config(desc_act=True)))
    assert (
        isinstance(weight, Plain)
        and weight.name == "a.b.weight"
        and "reordered" in weight.note
        and bias.name == "a.b.bias"
    )
    assert torch.equal(weight.tensor, values)


def test_golden(dict_source):
    """One column of codes 0 … 7, zero 8 stored as 7: the word is 0x76543210."""
    tensors = {
        "x.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "x.qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "x.scales": torch.full((1, 8), 2.0).half(),
        "x.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    (layer,) = parts(dict_source(tensors))
    assert isinstance(layer, Layer) and torch.equal(dequantized(layer)[0], (2.0 * (torch.arange(8) - 8)).expand(8, 8))


WRONG = {
    "no zero points": ({"a.b.qzeros": None}, {}, "a.b.qzeros"),
    "no scales": ({"a.b.scales": None}, {}, "a.b.scales"),
    "whole scales": ({"a.b.scales": torch.ones(4, N, dtype=torch.int32)}, {}, "a.b.scales"),
    "NaN scales": ({"a.b.scales": torch.full((4, N), torch.nan).half()}, {}, "a.b.scales"),
    "scales of another width": ({"a.b.scales": torch.ones(4, N + 1).half()}, {}, "a.b.qweight"),
    "no groups": ({"a.b.scales": torch.ones(0, N).half()}, {}, "a.b.qweight"),
    "zero points of another size": ({"a.b.qzeros": torch.zeros(4, 9, dtype=torch.int32)}, {}, "a.b.qzeros"),
    "bytes": ({"a.b.qweight": torch.zeros(32, N, dtype=torch.int8)}, {}, "a.b.qweight"),
    "groups beyond the end": ({"a.b.g_idx": torch.full((K,), 4, dtype=torch.int32)}, {}, "a.b.g_idx"),
    "groups below 0": ({"a.b.g_idx": torch.full((K,), -1, dtype=torch.int32)}, {}, "a.b.g_idx"),
    "a short g_idx": ({"a.b.g_idx": torch.zeros(9, dtype=torch.int32)}, {}, "a.b.qweight"),
    "other bits": ({}, {"bits": 8}, "a.b.qweight"),
    "bits of no kind": ({}, {"bits": "4"}, "a.b.qweight"),
    "other groups": ({}, {"group_size": 32}, "a.b.scales"),
    "a bias of another size": ({"a.b.bias": torch.zeros(9)}, {}, "a.b.bias"),
}


@pytest.mark.parametrize("why", WRONG)
def test_strangers(why, dict_source):
    changed, said, name = WRONG[why]
    tensors = {key: t for key, t in (made()[0] | changed).items() if t is not None}
    with pytest.raises(BadCheckpoint, match=f"memory.safetensors: '{name}'"):
        parts(dict_source(tensors, config={"quantization_config": config()["quantization_config"] | said}))


def test_other_layouts_are_refused_by_name(dict_source):
    with pytest.raises(BadCheckpoint, match="'marlin'"):
        parts(dict_source(made()[0], config=config(checkpoint_format="marlin")))
