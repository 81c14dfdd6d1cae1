"""The integer linear kernels against the reference on the same codes, their layouts, their assembly, and who chooses
them."""

import interpreter
import numpy as np
import pytest
import torch
from layers import close, make_layer, packed, run_reference
from ptx import evaluate, lanes

interpreter.needed()

from torch import nn

from qgen import formats
from qgen.errors import NoKernel
from qgen.kernels import registry, triton_linear
from qgen.kernels.registry import Ask
from qgen.kernels.triton_act import quantize_act
from qgen.kernels.triton_linear import gemm

for text, outputs in (
    (triton_linear.SIGNED_ASM, 2),
    (triton_linear.UNSIGNED_ASM, 2),
    (triton_linear.SUBSCALE_ASM, 2),
):
    interpreter.register_asm(text, lanes(text, outputs))

MODES = {
    "w4s_a8": ("triton_w4s_a8", "int4_s8_g64", "int8_row"),
    "w4s128_a8": ("triton_w4s_a8", "int4_s8_g128", "int8_row"),
    "w4_a8": ("triton_w4a8", "int4_g64", "int8_row"),
    "w4_a4": ("triton_w4a4", "int4_g64", "int4_g64"),
    "w4_a4p": ("triton_w4a4", "int4_g64", "uint4p_g64"),
    "w4_a4z": ("triton_w4a4", "int4_g64", "uint4_g64"),
    "w4g128_a4": ("triton_w4a4", "int4_g128", "int4_g64"),
    "w8_a8": ("triton_w8a8", "int8_row", "int8_row"),
}
SHAPES = [(1, 64, 64), (63, 200, 200), (200, 130, 256), (333, 96, 72)]
DTYPES = [torch.bfloat16, torch.float16]


def kernel(name):
    return registry.find("linear", name)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}".format(*s))
@pytest.mark.parametrize("mode", MODES)
def test_equals_reference(mode, shape):
    m, n, k = shape
    name, weight, act = MODES[mode]
    for dtype in DTYPES if m < 300 else DTYPES[:1]:
        slots, ask = make_layer(weight, act, n, k, dtype, rank=20, shift="scalar")
        x = (torch.randn(m, k) + 0.5).to(dtype)
        x[m // 2] = 0
        before = x.clone()
        with interpreter.launches() as names:
            y = kernel(name).run(x, packed(kernel(name), slots, ask))
        assert len(names) == 2
        assert y.shape == (m, n) and y.dtype == dtype and torch.equal(x, before)
        close(y, run_reference(x, slots, ask))


@pytest.mark.parametrize("mode", MODES)
def test_float32_agrees_to_rounding(mode):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 130, 192, torch.float32, rank=16, shift="row")
    x = torch.randn(2, 31, 192)
    close(kernel(name).run(x, packed(kernel(name), slots, ask)), run_reference(x, slots, ask), 2e-6, 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_bare_layer(mode):
    """No smoothing, low rank or bias; rows that do not lie in one piece."""
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 64, 128, smooth=False, bias=False)
    x = torch.randn(3, 128, 21).bfloat16().transpose(1, 2)
    close(kernel(name).run(x, packed(kernel(name), slots, ask)), run_reference(x, slots, ask))


@pytest.mark.parametrize("value", [0.0, 1.25, 1e30])
@pytest.mark.parametrize("mode", MODES)
def test_equal_rows(mode, value):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 64, 128)
    x = torch.full((5, 128), value).bfloat16()
    close(kernel(name).run(x, packed(kernel(name), slots, ask)), run_reference(x, slots, ask))


@pytest.mark.parametrize("mode", MODES)
def test_large_values_and_groups_of_zeros(mode):
    """Row by row, so that none hides behind another's size."""
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 72, 192, rank=16)
    if weight != "int8_row":
        slots["codes"][3, :32] = slots["codes"][5, -32:] = 0x88 if "s8" in weight else 0  # groups of −8, or of zeros
    x = torch.randn(6, 192)
    x[0] *= 1e5
    x[1] = 0
    x[1, 7] = -1e5
    x[2, 64:128] = 0
    x[3] = 1e-5 * x[3]
    x[4, :64] = 1e5
    x = x.bfloat16()
    y, want = kernel(name).run(x, packed(kernel(name), slots, ask)), run_reference(x, slots, ask)
    for row in range(len(x)):
        close(y[row], want[row])


@pytest.mark.parametrize("rank", [1, 100, 256])
def test_ranks(rank):
    slots, ask = make_layer("int4_s8_g64", "int8_row", 64, 128, rank=rank)
    x = torch.randn(20, 128).bfloat16()
    run = kernel("triton_w4s_a8")
    close(run.run(x, packed(run, slots, ask)), run_reference(x, slots, ask))


def test_too_long_a_rank_is_refused_while_packing():
    slots, ask = make_layer("int4_s8_g64", "int8_row", 64, 128, rank=300)
    with pytest.raises(ValueError, match="up to rank 256, found 300"):
        kernel("triton_w4s_a8").pack(slots, ask)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("mode", ["w4s_a8", "w4_a4", "w8_a8"])
def test_hadamard(mode, size):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 64, 200, hadamard=size)
    x = torch.randn(40, 200).bfloat16()
    close(kernel(name).run(x, packed(kernel(name), slots, ask, size)), run_reference(x, slots, ask, size))


@pytest.mark.parametrize("mode", MODES)
def test_pack_there_and_back(mode):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 50, 200, rank=20, shift="scalar")
    tiny = slots["scales"].clone()
    if tiny.dtype == torch.bfloat16:  # scales whose power of two goes below float32's normal numbers
        tiny[0] = torch.finfo(torch.bfloat16).tiny
        slots["scales"] = tiny
    back = kernel(name).unpack(kernel(name).pack(dict(slots), ask), ask)
    assert back.keys() == slots.keys()
    for slot, t in slots.items():
        assert back[slot].dtype == t.dtype and torch.equal(back[slot], t), slot


@pytest.mark.parametrize("mode", MODES)
def test_codes_that_are_never_written_can_be_read(mode):
    """−8 and the sub-scale 16 may come from other people's files."""
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 32, 128, bias=False)
    if weight != "int8_row":
        slots["codes"] = torch.full_like(slots["codes"], 0x88)
    else:
        slots["codes"] = torch.full_like(slots["codes"], 0x80)
    if "s8" in weight:
        slots["scales"] = torch.full_like(slots["scales"], 16)
    x = torch.randn(16, 128).bfloat16()
    close(kernel(name).run(x, packed(kernel(name), slots, ask)), run_reference(x, slots, ask))


@pytest.mark.parametrize("mode", ["w4s_a8", "w4_a8", "w4_a4", "w4_a4p", "w4_a4z"])
def test_assembly_equals_plain_operations(mode):
    """The assembly runs as the PTX manual reads (ptx.py), not as somebody meant it."""
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 130, 192, rank=16)
    args = packed(kernel(name), slots, ask)
    codes, scales, global_scale, _, smooth, down, up, bias = args[:8]
    a = quantize_act(torch.randn(70, 192).bfloat16(), act, 192, smooth, None, down)
    ys = [
        gemm(a, codes, scales, global_scale, up, bias, weight, act, 130, torch.float32, asm=asm)
        for asm in (False, True)
    ]
    assert torch.equal(*ys)


@pytest.mark.parametrize("s", range(1, 17))
def test_subscale_words_do_not_carry(s):
    """Four bytes share one multiplication: every byte of random words against its own."""
    words = np.random.default_rng(s).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    outs = evaluate(triton_linear.SUBSCALE_ASM, words, *[np.full_like(words, s)] * 4, outputs=2)
    nibbles = words.view(np.uint8).astype(np.int32)
    for out, u in zip(outs, (nibbles & 15, nibbles >> 4), strict=True):
        assert np.array_equal(out.view(np.int8), (u - 8) * s)


@pytest.mark.parametrize(("text", "factor", "signed"), [("SIGNED_ASM", 16, True), ("UNSIGNED_ASM", 8, False)])
def test_nibble_words(text, factor, signed):
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    outs = evaluate(getattr(triton_linear, text), words, outputs=2)
    nibbles = words.view(np.uint8).astype(np.int32)
    for out, u in zip(outs, (nibbles & 15, nibbles >> 4), strict=True):
        q = (u ^ 8) - 8 if signed else u
        assert np.array_equal(out.view(np.int8), factor * q)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("mode", ["w4s_a8", "w4_a4z"])
def test_activation_of_the_epilogue(mode, activation):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 96, 128, rank=16)
    args = packed(kernel(name), slots, ask)
    codes, scales, global_scale, _, smooth, down, up, bias = args[:8]
    x = torch.randn(40, 128).bfloat16()
    a = quantize_act(x, act, 128, smooth, None, down)
    y = gemm(a, codes, scales, global_scale, up, bias, weight, act, 96, torch.bfloat16, activation)
    want = run_reference(x, slots, ask)
    close(y, nn.functional.gelu(want, approximate="tanh") if activation == "gelu_tanh" else nn.functional.silu(want))
    with pytest.raises(ValueError, match="none, gelu_tanh, silu, found 'relu'"):
        gemm(a, codes, scales, global_scale, up, bias, weight, act, 96, torch.bfloat16, "relu")


# -- who is chosen
# ------------------------------------------------------------------------------------------------------
def test_the_interpreter_serves_the_cpu_by_name_only():
    ask = Ask("linear", "cpu", "int4_s8_g64", "int8_row", torch.bfloat16, 64, 64)
    assert not registry.choose(ask).name.startswith("triton")
    assert registry.choose(ask, "triton_w4s_a8").name == "triton_w4s_a8"


@pytest.mark.parametrize("mode", MODES)
def test_needs(mode):
    name, weight, act = MODES[mode]
    needs = kernel(name).needs
    ask = lambda **facts: Ask(  # noqa: E731
        **{
            "op": "linear",
            "device": "cuda",
            "weight": weight,
            "act": act,
            "capability": (8, 9),
            "n": 64,
            "k": 128,
            **facts,
        }
    )
    assert not needs.refusals(ask())
    assert all(not needs.refusals(ask(capability=c)) for c in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (12, 1)))
    assert needs.refusals(ask(capability=(7, 5))) == ["needs capability 8.0 to 12.1, found 7.5"]
    assert "serves activations in" in needs.refusals(ask(act="mxfp4"))[0]
    assert "serves weights in" in needs.refusals(ask(weight="nvfp4"))[0]
    assert not needs.refusals(ask(static="tensor", traits=frozenset({"static_act"})))
    per_block = ["serves scales of activations stored per tensor, asked one per block"] if act == "int8_row" else []
    assert needs.refusals(ask(static="block")) == per_block
    assert all(not needs.refusals(ask(device="hip", capability=arch)) for arch in ("gfx942", "gfx1100", "gfx1201"))
    assert needs.refusals(ask(hadamard=512)) == ["serves block transforms of 16/32/64/128/256, asked 512"]
    assert needs.refusals(ask(device="hip", capability="gfx1030"))


@pytest.mark.parametrize("mode", ["w4s_a8", "w4_a4z", "w8_a8"])
def test_layer_runs_saves_and_moves_back(mode):
    """A QuantLinear that is forced onto the kernel: output, canonical state_dict, gradient, return to the reference."""
    from qgen.nn.linear import QuantLinear
    from qgen.nn.packed import Layout

    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 48, 200, rank=16)
    layout = Layout(weight, act, 16, 0, tuple(s for s in slots if s not in ("codes", "scales")))
    layer = QuantLinear(200, 48, layout, torch.bfloat16)
    layer.fill({key: t.clone() for key, t in slots.items()})
    with pytest.raises(NoKernel, match="was asked for"):
        layer.prepare("triton_w8a8" if mode != "w8_a8" else "triton_w4a4")
    assert layer.prepare(name) == name
    x = torch.randn(2, 9, 200).bfloat16().requires_grad_()
    y = layer(x)
    close(y.detach(), run_reference(x.detach(), slots, ask))
    y.float().sum().backward()
    saved = layer.state_dict()
    assert all(torch.equal(saved[key], t) for key, t in slots.items())
    gradient = x.grad.clone()
    layer.prepare("reference")
    x.grad = None
    layer(x).float().sum().backward()
    assert torch.equal(gradient, x.grad)


@pytest.mark.parametrize("mode", MODES)
def test_stored_activation_scales(mode):
    """Two launches; the reference's numbers, where rows exceed the scale too."""
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 72, 192, rank=16, shift="scalar")
    per_group = act != "int8_row"
    slots["act_scale"] = (
        torch.rand(formats.padded(192, weight, act) // 64).add(0.2) if per_group else torch.tensor([0.02])
    )
    x = torch.randn(63, 192).bfloat16()
    x[5] *= 100
    with interpreter.launches() as names:
        y = kernel(name).run(x, packed(kernel(name), slots, ask))
    assert len(names) == 2
    want = run_reference(x, slots, ask)
    for rows in (slice(0, 5), slice(5, 6), slice(6, None)):
        close(y[rows], want[rows])
    measured = run_reference(x, {key: t for key, t in slots.items() if key != "act_scale"}, ask)
    assert (want - measured).norm() > 0.05 * want.norm()


def test_zero_points_beat_symmetric_codes_on_skewed_input():
    x = torch.nn.functional.gelu(torch.randn(64, 256) * 2).bfloat16()
    errors = {}
    for mode in ("w4_a4", "w4_a4z"):
        name, weight, act = MODES[mode]
        torch.manual_seed(1)
        slots, ask = make_layer(weight, act, 64, 256, smooth=False, bias=False)
        y = kernel(name).run(x, packed(kernel(name), slots, ask)).float()
        q = formats.get(weight).dequantize(formats.QTensor(slots["codes"], slots["scales"], None, None, weight))
        errors[mode] = (y - x.float() @ q.T).norm()
    assert errors["w4_a4z"] < 0.75 * errors["w4_a4"]
