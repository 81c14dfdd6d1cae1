"""bitsandbytes against the library's own quantizers and dequantizers on the CPU."""

import json

import pytest
import torch

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, importers
from qgen.io.peers.floats import dequantized


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="the truth is the library itself").functional


def saved(bnb, weight, kind, nested=False, block=64, name="a.b.weight"):
    """Tensors as transformers saves them."""
    raw, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)
    tensors = {name: raw} | {f"{name}.{key}": t for key, t in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(raw, state)


def parts(source):
    assert importers["bitsandbytes"].recognizes(source)
    return list(importers["bitsandbytes"].parts(source))


@pytest.mark.parametrize("kind", ("nf4", "fp4"))
@pytest.mark.parametrize("block", (64, 128, 256))
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
def test_a_million_values(kind, block, nested, bnb, dict_source):
    weight = torch.randn(1024, 1024)
    weight[0] = 0
    weight[1, :3] = torch.tensor([1e30, -1e-30, 1e-38]) if not nested else torch.tensor([8.0, -1e-30, 1e-38])
    tensors, values = saved(bnb, weight, kind, nested, block)
    bias = torch.randn(1024)
    layer, plain = parts(dict_source(tensors | {"a.b.bias": bias, "n.weight": torch.ones(2)}))
    name = f"{'nf4' if kind == 'nf4' else 'bnb_fp4'}_g{block}"
    double = nested and kind == "nf4" and block in (64, 128)
    assert layer.layout.weight == (name + "_dq" if double else name)
    assert layer.dtype == torch.float32 and torch.equal(layer.slots["bias"], bias) and plain.name == "n.weight"
    assert torch.equal(dequantized(layer)[0], values)
    shapes = formats.get(layer.layout.weight).shapes(1024, 1024)
    assert {s: (tuple(t.shape), t.dtype) for s, t in layer.slots.items() if s != "bias"} == shapes


def test_half_precision_rounds_once(bnb, dict_source):
    tensors, values = saved(bnb, torch.randn(64, 256).bfloat16(), "nf4")
    (layer,) = parts(dict_source(tensors))
    assert layer.dtype == torch.bfloat16 and torch.equal(dequantized(layer)[0].bfloat16(), values)


@pytest.mark.parametrize(
    ("shape", "block", "name"),
    [
        ((10, 100), 64, "a.weight"),
        ((64, 4096), 4096, "a.weight"),
        ((8, 4, 3, 3), 64, "c.weight"),
        ((8, 64), 64, "table"),
    ],
)
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
def test_what_no_format_holds_is_dequantized(shape, block, name, nested, bnb, dict_source):
    tensors, values = saved(bnb, torch.randn(shape), "nf4", nested, block, name)
    (part,) = parts(dict_source(tensors))
    assert isinstance(part, Plain) and part.name == name and part.note.startswith("dequantized: bitsandbytes NF4")
    assert torch.equal(part.tensor, values)


def test_another_table_is_used_as_it_is(bnb, dict_source):
    tensors, _ = saved(bnb, torch.randn(8, 64), "nf4")
    tensors["a.b.weight.quant_map"] = torch.linspace(-1, 1, 16)
    (part,) = parts(dict_source(tensors))
    assert isinstance(part, Plain)
    codes = (part.tensor / tensors["a.b.weight.absmax"][:, None] * 7.5 + 7.5).round()
    raw = tensors["a.b.weight"].view(8, 32)
    assert torch.equal(codes[:, 0::2], (raw >> 4).float()) and torch.equal(codes[:, 1::2], (raw & 15).float())


def test_llm_int8(bnb, dict_source):
    """q · SCB / 127: the library multiplies by SCB and then by 1/127, which may differ in the last bit of float32."""
    weight = torch.randn(256, 512).half()
    codes, stats, _ = bnb.int8_vectorwise_quant(weight)
    tensors = {
        "x.weight": codes,
        "x.SCB": stats,
        "x.weight_format": torch.tensor(0, dtype=torch.uint8),
        "x.bias": torch.ones(256).half(),
    }
    (layer,) = parts(dict_source(tensors))
    values, want = dequantized(layer)[0], bnb.int8_vectorwise_dequant(codes, stats)
    assert layer.layout.weight == "int8_row" and torch.equal(layer.slots["codes"].view(torch.int8), codes)
    assert ((values - want).abs() <= 2 * torch.finfo(torch.float32).eps * want.abs()).all()
    tensors["x.weight_format"] += 1
    with pytest.raises(BadCheckpoint, match=r"x\.weight_format"):
        parts(dict_source(tensors))


def state(**changes):
    """The state's JSON as bytes, changed."""
    base = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64]}
    return torch.tensor(list(json.dumps({**base, **changes}).encode()), dtype=torch.uint8)


STATE, NAME = "a.b.weight.quant_state.bitsandbytes__nf4", "a.b.weight"
WRONG = {
    "no JSON": ({STATE: torch.tensor([255, 0], dtype=torch.uint8)}, ""),
    "deep JSON": ({STATE: torch.full((4000,), ord("["), dtype=torch.uint8)}, ""),
    "a list": ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, ""),
    "a long text": ({STATE: torch.full((1 << 20,), 32, dtype=torch.uint8)}, STATE),
    "a state of floats": ({STATE: torch.ones(3)}, STATE),
    "another kind": ({STATE: state(quant_type="nf3")}, STATE),
    "a block of 63": ({STATE: state(blocksize=63)}, STATE),
    "a block that is no number": ({STATE: state(blocksize="64")}, STATE),
    "a negative size": ({STATE: state(shape=[-8, -64])}, STATE),
    "a size of 2^62": ({STATE: state(shape=[2**62, 2])}, STATE),
    "sizes whose product is huge": ({STATE: state(shape=[2**32, 2**32])}, NAME),
    "no sizes": ({STATE: state(shape=[])}, STATE),
    "a float as size": ({STATE: state(shape=[8.0, 64])}, STATE),
    "another size": ({STATE: state(shape=[8, 128])}, NAME),
    "another dtype": ({STATE: state(dtype="int8")}, STATE),
    "no weight": ({NAME: None}, NAME),
    "no absmax": ({f"{NAME}.absmax": None}, f"{NAME}.absmax"),
    "short absmax": ({f"{NAME}.absmax": torch.ones(7)}, f"{NAME}.absmax"),
    "NaN absmax": ({f"{NAME}.absmax": torch.full((8,), torch.nan)}, f"{NAME}.absmax"),
    "a short table": ({f"{NAME}.quant_map": torch.ones(15)}, f"{NAME}.quant_map"),
    "a table of NaN": ({f"{NAME}.quant_map": torch.full((16,), torch.nan)}, f"{NAME}.quant_map"),
    "nested without a state": (
        {f"{NAME}.nested_absmax": torch.ones(1), f"{NAME}.absmax": torch.zeros(8, dtype=torch.uint8)},
        NAME,
    ),
    "nested by 0": (
        {
            f"{NAME}.nested_absmax": torch.ones(1),
            f"{NAME}.absmax": torch.zeros(8, dtype=torch.uint8),
            STATE: state(nested_blocksize=0, nested_offset=0),
        },
        NAME,
    ),
    "a short bias": ({"a.b.bias": torch.ones(7)}, "a.b.bias"),
    "a list as kind": ({STATE: state(quant_type=[])}, STATE),
    "a list as dtype": ({STATE: state(dtype=[1])}, STATE),
    "an offset beyond all numbers": (
        {
            f"{NAME}.nested_absmax": torch.ones(1),
            f"{NAME}.absmax": torch.zeros(8, dtype=torch.uint8),
            STATE: state(nested_blocksize=256, nested_offset=10**400),
        },
        NAME,
    ),
}


@pytest.mark.parametrize("why", WRONG)
def test_strangers(why, dict_source):
    changed, name = WRONG[why]
    table = torch.linspace(-1, 1, 16)
    good = {
        NAME: torch.zeros(256, 1, dtype=torch.uint8),
        f"{NAME}.absmax": torch.ones(8),
        f"{NAME}.quant_map": table,
        STATE: state(),
    }
    tensors = {key: t for key, t in (good | changed).items() if t is not None}
    with pytest.raises(BadCheckpoint, match=f"memory.safetensors.*{name}"):
        parts(dict_source(tensors))


def test_a_good_stranger(dict_source):
    good = {
        NAME: torch.zeros(256, 1, dtype=torch.uint8),
        f"{NAME}.absmax": torch.ones(8),
        f"{NAME}.quant_map": torch.linspace(-1, 1, 16),
        STATE: state(),
    }
    assert [type(part) for part in parts(dict_source(good))] == [Plain]
    assert not any(isinstance(part, Layer) for part in parts(dict_source(good)))
