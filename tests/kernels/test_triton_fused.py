"""The fused kernels against the fused reference, and bit for bit against the unfused kernels; how many launches they are."""

import interpreter
import pytest
import torch
from layers import arguments, close, make_layer, packed
from ptx import lanes

interpreter.needed()

from qgen.kernels import fused_ops, fused_reference, reference, registry, triton_linear, triton_mlp, tuning
from qgen.kernels.fusion import GATED, Heads, Producer
from qgen.kernels.triton_act import quantize_act
from qgen.kernels.tuning import Launch

for text in (triton_linear.SIGNED_ASM, triton_linear.UNSIGNED_ASM, triton_linear.SUBSCALE_ASM):
    interpreter.register_asm(text, lanes(text, 2))

MODES = {
    "w4s_a8": ("triton_w4s_a8", "int4_s8_g64", "int8_row"),
    "w4_a4": ("triton_w4a4", "int4_g64", "int4_g64"),
    "w4_a4z": ("triton_w4a4", "int4_g64", "uint4_g64"),
    "w8_a8": ("triton_w8a8", "int8_row", "int8_row"),
}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several bands of rows and tiles of columns even for small layers."""
    monkeypatch.setitem(tuning.TABLE, ("mlp", "any"), ((tuning.LARGE, Launch(32, 64, warps=4)),))


def two_layers(mode, k, middle, n, activation, dtype=torch.bfloat16, rank=20, **extras):
    """(kernel's name, (slots, ask) of the first layer, of the second)."""
    name, weight, act = MODES[mode]
    first = make_layer(weight, act, 2 * middle if activation == GATED else middle, k, dtype, rank)
    return name, first, make_layer(weight, act, n, middle, dtype, rank, **extras)


# -- MLP ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["gelu_tanh", GATED])
@pytest.mark.parametrize("mode", MODES)
def test_mlp_is_three_launches_and_the_reference(mode, activation, small_tiles):
    for dtype in DTYPES:
        name, first, second = two_layers(mode, 128, 136, 72, activation, dtype, shift="scalar")
        x = torch.randn(3, 25, 128).to(dtype)
        x[1, 7] = 0
        before = x.clone()
        kernel = registry.find("mlp", name)
        with interpreter.launches() as names:
            y = fused_ops.mlp(x, packed(kernel, *first), packed(kernel, *second), activation=activation, kernel=name)
        assert names == ["_quantize_rows" if "a8" in mode else "_quantize_blocks", "_gemm_requantize", "_gemm"]
        assert torch.equal(x, before) and y.shape == (3, 25, 72) and y.dtype == dtype
        close(y, unfused(x, packed(kernel, *first), packed(kernel, *second), activation, name))
        # Against the reference a last bit of what lies between may turn a code: 1 / 127 or 1 / 7 of the largest value.
        rms, worst = (1e-2, 0.1) if "a8" in mode else (8e-2, 0.8)
        close(y, fused_reference.mlp(x, arguments(*first), arguments(*second), Producer(), activation), rms, worst)


def unfused(x, first, second, activation, kernel):
    """The same layers and kernels in four launches."""
    if activation != GATED:
        return fused_ops.fused_linear(
            fused_ops.fused_linear(x, first, None, activation, kernel=kernel), second, kernel=kernel
        )
    gate, value = fused_ops.fused_linear(x, first, kernel=kernel).chunk(2, -1)
    return fused_ops.fused_linear(gate, second, Producer("silu_mul", gate=value), kernel=kernel)


@pytest.mark.parametrize(("activation", "hadamard"), [("none", 0), ("gelu_tanh", 0), ("silu", 0), ("silu", 128)])
@pytest.mark.parametrize("mode", MODES)
def test_requantized_codes_are_those_of_the_unfused_layers(mode, activation, hadamard, small_tiles):
    """Whoever comes last, the second launch leaves what the activation kernel would have made of the stored output."""
    name, first, second = two_layers(mode, 128, 200, 72, activation, hadamard=hadamard, shift="row")
    a1, a2 = packed(registry.find("linear", name), *first), packed(registry.find("linear", name), *second, hadamard)
    x = torch.randn(75, 128).bfloat16()
    quantized = quantize_act(x, a1.act, 128, a1.smooth, a1.shift, a1.down, clear=True)
    assert not quantized.counters.any()
    got = triton_mlp.requantized(quantized, a1, a2, activation, torch.bfloat16)
    middle = triton_linear.gemm(
        quantized,
        a1.codes,
        a1.scales,
        a1.global_scale,
        a1.up,
        a1.bias,
        a1.weight,
        a1.act,
        200,
        torch.bfloat16,
        activation,
    )
    want = quantize_act(middle, a2.act, 256, a2.smooth, a2.shift, a2.down, hadamard)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert (got.zeros is None) == (want.zeros is None) and (want.zeros is None or torch.equal(got.zeros, want.zeros))
    close(got.h, want.h.float(), 1e-3, 1e-2)


@pytest.mark.parametrize("m", [0, 1, 16, 40])
def test_mlp_of_few_rows(m):
    name, first, second = two_layers("w4s_a8", 64, 64, 64, "silu")
    kernel, x = registry.find("mlp", name), torch.randn(m, 64).bfloat16()
    y = fused_ops.mlp(x, packed(kernel, *first), packed(kernel, *second), activation="silu", kernel=name)
    assert y.shape == (m, 64)
    if m:
        close(y, fused_reference.mlp(x, arguments(*first), arguments(*second), Producer(), "silu"), 1e-2, 0.1)


def test_assembly_equals_plain_operations(small_tiles):
    name, first, second = two_layers("w4s_a8", 128, 128, 72, "none")
    a1, a2 = packed(registry.find("linear", name), *first), packed(registry.find("linear", name), *second)
    codes = []
    for asm in (False, True):
        a = quantize_act(torch.ones(40, 128).cumsum(0).bfloat16(), a1.act, 128, a1.smooth, None, a1.down, clear=True)
        codes.append(triton_mlp.requantized(a, a1, a2, "none", torch.bfloat16, asm).codes)
    assert torch.equal(*codes)


def test_layers_that_do_not_fit_each_other():
    name, first, _ = two_layers("w4s_a8", 64, 64, 64, "silu")
    _, _, second = two_layers("w4s_a8", 64, 512, 64, "silu")
    kernel = registry.find("mlp", name)
    with pytest.raises(ValueError, match="the first layer gives 64 values, the second takes 512"):
        fused_ops.mlp(torch.randn(2, 64).bfloat16(), packed(kernel, *first), packed(kernel, *second), kernel=name)


# -- producers and activations -----------------------------------------------------------------------------------------
PRODUCERS = {
    "layernorm": lambda k: Producer("layernorm", scale=torch.randn(3, k) / 4, shift=torch.randn(3, k) / 4),
    "layernorm_affine": lambda k: Producer("layernorm", gamma=torch.rand(k) + 0.5, beta=torch.randn(k)),
    "rmsnorm": lambda k: Producer("rmsnorm", gamma=torch.rand(k) + 0.5, scale=torch.randn(3, k) / 4),
    "gelu_tanh": lambda k: Producer("gelu_tanh"),
    "silu": lambda k: Producer("silu"),
    "silu_mul": lambda k: Producer("silu_mul", gate=torch.randn(3, 21, k).bfloat16()),
}


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("mode", ["w4s_a8", "w4_a4z"])
def test_producer_and_activation_cost_no_launch(mode, kind, activation):
    name, weight, act = MODES[mode]
    slots, ask = make_layer(weight, act, 96, 128, rank=16)
    producer, x = PRODUCERS[kind](128), torch.randn(3, 21, 128).bfloat16()
    layer = packed(registry.find("fused_linear", name), slots, ask)
    with interpreter.launches() as names:
        y = fused_ops.fused_linear(x, layer, producer, activation, kernel=name)
    assert len(names) == 2
    want = fused_reference.fused_linear(x, arguments(slots, ask), producer, activation, None)
    close(y, want, *((1e-2, 0.1) if "a8" in mode else (8e-2, 0.8)))  # a norm's last bit may turn a code at its tie


# -- queries and keys --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_heads_are_normed_and_rotated_in_the_epilogue(dim, halves):
    name, weight, act = MODES["w4s_a8"]
    n, length = 3 * 128, 33
    slots, ask = make_layer(weight, act, n, 128, rank=16)
    angle = torch.outer(torch.arange(length).float(), 1 / 100 ** (torch.arange(dim // 2) / dim))
    for gamma, turned in ((True, True), (True, False), (False, True)):
        heads = Heads(
            dim, 256, torch.rand(256) + 0.5 if gamma else None, angle.cos() if turned else None,
            angle.sin() if turned else None, halves,
        )  # fmt: skip
        x = torch.randn(2, length, 128).bfloat16()
        layer = packed(registry.find("fused_linear", name), slots, ask)
        with interpreter.launches() as names:
            y = fused_ops.fused_linear(x, layer, heads=heads, kernel=name)
        assert len(names) == 2
        plain = reference.product(x, arguments(slots, ask))
        close(y, fused_reference.apply_heads(plain, heads))
        assert not torch.allclose(y[..., :256].float(), plain[..., :256], atol=0.1)
        close(y[..., 256:], plain[..., 256:])


def test_heads_that_do_not_fit_are_refused():
    slots, ask = make_layer("int4_s8_g64", "int8_row", 192, 64)
    layer = packed(registry.find("fused_linear", "triton_w4s_a8"), slots, ask)
    x = torch.randn(4, 64).bfloat16()
    with pytest.raises(ValueError, match="heads of a power of two, up to 128; found 96"):
        fused_ops.fused_linear(x, layer, heads=Heads(96, 192, torch.ones(192)), kernel="triton_w4s_a8")
    with pytest.raises(ValueError, match="heads cover 256 columns, the layer has 192"):
        fused_ops.fused_linear(x, layer, heads=Heads(64, 256, torch.ones(256)), kernel="triton_w4s_a8")


# -- stores by descriptor ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [72, 200])
def test_descriptor_and_pointer_store_the_same(n):
    slots, ask = make_layer("int4_s8_g64", "int8_row", n, 128, rank=16)
    s = packed(registry.find("linear", "triton_w4s_a8"), slots, ask)
    a = quantize_act(torch.randn(150, 128).bfloat16(), s.act, 128, s.smooth, None, s.down)
    ys = [
        triton_linear.gemm(
            a, s.codes, s.scales, s.global_scale, s.up, s.bias, s.weight, s.act, n, torch.bfloat16, tma=tma
        )
        for tma in (False, True)
    ]
    assert torch.equal(*ys)
