"""AWQ files by a packer written here from the format's description."""

import pytest
import torch

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import importers
from qgen.io.peers.floats import dequantized

N, K = 64, 256
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes):
    """(rows, N) whole numbers to (rows, N/8): nibble t of word c is output 8c + ORDER[t]."""
    out = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for c in range(out.shape[1]):
        out[:, c] = sum(codes[:, 8 * c + ORDER[t]].long() << (4 * t) for t in range(8))
    return torch.where(out >= 2**31, out - 2**32, out).int()


def made(block=64, symmetric=False):
    codes = torch.randint(0, 16, (K, N))
    zero = torch.full((K // block, N), 8) if symmetric else torch.randint(0, 16, (K // block, N))
    scales = (torch.rand(K // block, N) + 0.1).half()
    index = torch.arange(K) // block
    tensors = {"a.b.qweight": words(codes), "a.b.qzeros": words(zero), "a.b.scales": scales}
    return tensors, (scales.float()[index] * (codes - zero[index])).T


def config(**more):
    return {
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 64,
            "version": "gemm",
            "zero_point": True,
            **more,
        }
    }


def parts(source):
    assert importers["awq"].recognizes(source)
    return list(importers["awq"].parts(source))


def test_golden():
    assert words(torch.arange(8)[None]).tolist() == [[0x75316420]]


@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "zeros"))
@pytest.mark.parametrize("block", (32, 64, 128, K))
def test_values(block, symmetric, dict_source):
    tensors, values = made(block, symmetric)
    bias = torch.randn(N).half()
    for said in (config(group_size=block if block < K else -1), {}):
        layer, plain = parts(dict_source(tensors | {"a.b.bias": bias, "n.weight": torch.ones(2)}, config=said))
        where = "row" if block == K else f"g{block}_f16"
        assert layer.layout.weight == (f"int4_{where}" if symmetric else f"uint4z_{where}")
        assert (
            torch.equal(dequantized(layer)[0], values)
            and torch.equal(layer.slots["bias"], bias)
            and plain.name == "n.weight"
        )


WRONG = {
    "no zero points": ({"a.b.qzeros": None}, {}, "a.b.qzeros"),
    "no scales": ({"a.b.scales": None}, {}, "a.b.scales"),
    "NaN scales": ({"a.b.scales": torch.full((4, N), torch.inf).half()}, {}, "a.b.scales"),
    "scales of another width": ({"a.b.scales": torch.ones(4, N + 1).half()}, {}, "a.b.qweight"),
    "scales of three sizes": ({"a.b.scales": torch.ones(4, N, 1).half()}, {}, "a.b.qweight"),
    "zero points of another size": ({"a.b.qzeros": torch.zeros(3, 8, dtype=torch.int32)}, {}, "a.b.qzeros"),
    "bytes": ({"a.b.qweight": torch.zeros(K, 8, dtype=torch.uint8)}, {}, "a.b.qweight"),
    "nothing": ({"a.b.qweight": torch.zeros(0, 8, dtype=torch.int32)}, {}, "a.b.qweight"),
    "other groups": ({}, {"group_size": 32}, "a.b.scales"),
}


@pytest.mark.parametrize("why", WRONG)
def test_strangers(why, dict_source):
    changed, said, name = WRONG[why]
    tensors = {key: t for key, t in (made()[0] | changed).items() if t is not None}
    with pytest.raises(BadCheckpoint, match=f"memory.safetensors: '{name}'"):
        parts(dict_source(tensors, config=config(**said)))


@pytest.mark.parametrize("said", [{"version": "gemv"}, {"bits": 3}], ids=("gemv", "bits"))
def test_other_layouts_are_refused_by_name(said, dict_source):
    with pytest.raises(BadCheckpoint, match="qgen reads gemm with 4"):
        parts(dict_source(made()[0], config=config(**said)))
