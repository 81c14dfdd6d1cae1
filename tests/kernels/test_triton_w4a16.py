"""The weight-only kernel against the reference; splits of K, assembly, layouts, and when it is chosen."""

import interpreter
import numpy as np
import pytest
import torch
from layers import close, make_layer, packed, run_reference
from ptx import evaluate, lanes

interpreter.needed()

from qgen.kernels import registry, triton_w4a16
from qgen.kernels.registry import Ask

interpreter.register_asm(triton_w4a16.BF16_ASM, lanes(triton_w4a16.BF16_ASM, 2, words=2, dtype=np.uint16))
interpreter.register_asm(triton_w4a16.FP16_ASM, lanes(triton_w4a16.FP16_ASM, 2, words=2, dtype=np.float16))

SHAPES = [(1, 64, 64), (5, 130, 200), (63, 96, 256), (200, 150, 136)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def kernel():
    return registry.find("linear", "triton_w4a16")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}".format(*s))
@pytest.mark.parametrize("weight", triton_w4a16.WEIGHTS)
def test_equals_reference(kernel, weight, shape):
    m, n, k = shape
    for dtype in DTYPES:
        slots, ask = make_layer(weight, "", n, k, dtype, rank=20, shift="scalar")
        x = torch.randn(m, k).to(dtype)
        x[m // 2] = 0
        before = x.clone()
        y = kernel.run(x, packed(kernel, slots, ask))
        assert y.shape == (m, n) and y.dtype == dtype and torch.equal(x, before)
        close(y, run_reference(x, slots, ask))


@pytest.mark.parametrize("weight", ["int4_g64", "uint4_g128"])
def test_float32_agrees_to_rounding(kernel, weight):
    slots, ask = make_layer(weight, "", 96, 192, torch.float32, rank=16, shift="row")
    x = torch.randn(2, 15, 192)
    close(kernel.run(x, packed(kernel, slots, ask)), run_reference(x, slots, ask), 2e-6, 1e-4)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_of_k_agree_and_repeat(kernel, splits):
    slots, ask = make_layer("int4_g64", "", 96, 320, torch.float32, rank=16)
    x, args = torch.randn(7, 320), packed(kernel, slots, ask)
    with interpreter.launches() as names:
        y = triton_w4a16.linear(x, args, splits=splits)
    assert names == ["_quantize_blocks", "_gemm16", *(["_sum_parts"] if splits > 1 else [])]
    close(y, run_reference(x, slots, ask), 2e-6, 1e-4)
    assert torch.equal(y, triton_w4a16.linear(x, args, splits=splits))


def test_bare_layer_is_one_launch(kernel):
    slots, ask = make_layer("int4_g64", "", 64, 64, smooth=False, bias=False)
    x = torch.randn(3, 64, 4).bfloat16().transpose(1, 2)
    with interpreter.launches() as names:
        y = kernel.run(x, packed(kernel, slots, ask))
    assert names == ["_gemm16"]
    close(y, run_reference(x, slots, ask))


def test_number_of_splits():
    assert triton_w4a16.splits_for(tiles=144, groups=48, processors=108) == 1
    assert triton_w4a16.splits_for(tiles=48, groups=48, processors=108) == 4
    assert triton_w4a16.splits_for(tiles=2, groups=48, processors=108) == 12  # four groups each
    assert triton_w4a16.splits_for(tiles=1, groups=2, processors=108) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assembly_equals_plain_operations(kernel, dtype):
    slots, ask = make_layer("int4_g64", "", 96, 192, dtype)
    x, args = torch.randn(20, 192).to(dtype), packed(kernel, slots, ask)
    assert torch.equal(*[triton_w4a16.linear(x, args, asm=asm) for asm in (False, True)])


@pytest.mark.parametrize(("text", "dtype"), [("BF16_ASM", torch.bfloat16), ("FP16_ASM", torch.float16)])
def test_nibble_words(text, dtype):
    """All four bytes of random words, in the order in which a tensor's elements lie in registers."""
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    outs = evaluate(getattr(triton_w4a16, text), words, outputs=4)
    nibbles = words.view(np.uint8).astype(np.int32).reshape(-1, 4)
    for pair, u in zip((outs[:2], outs[2:]), (nibbles & 15, nibbles >> 4), strict=True):
        halves = np.stack(pair, -1).view(np.int16).reshape(-1, 4)
        assert np.array_equal(torch.from_numpy(halves.copy()).view(dtype).float().numpy(), u - 8)


@pytest.mark.parametrize("weight", triton_w4a16.WEIGHTS)
def test_pack_there_and_back(kernel, weight):
    slots, ask = make_layer(weight, "", 50, 200, rank=20)
    back = kernel.unpack(kernel.pack(dict(slots), ask), ask)
    assert back.keys() == slots.keys()
    assert all(back[s].dtype == t.dtype and torch.equal(back[s], t) for s, t in slots.items())


def test_needs(kernel):
    ask = Ask("linear", "cuda", "int4_g64", "", torch.bfloat16, 64, 64, capability=(8, 6))
    assert not kernel.needs.refusals(ask)
    assert kernel.needs.refusals(Ask("linear", "cuda", "int4_g64", "int8_row", torch.bfloat16, 64, 64, 0, (8, 6)))
    rotated = Ask("linear", "cuda", "int4_g64", "", torch.bfloat16, 64, 64, 0, (8, 6), frozenset({"hadamard"}))
    assert kernel.needs.refusals(rotated) == ["cannot do hadamard"]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_equal_rows(kernel, value):
    slots, ask = make_layer("int4_g64", "", 64, 128)
    x = torch.full((5, 128), value).bfloat16()
    close(kernel.run(x, packed(kernel, slots, ask)), run_reference(x, slots, ask))
