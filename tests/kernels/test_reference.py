"""The reference's algebra against a float64 computation by hand, term by term."""

import pytest
import torch

from qgen import formats
from qgen.kernels import reference
from qgen.kernels.slots import Slots

N, K, R, M = 48, 128, 8, 20


def packed(name, w):
    q = formats.get(name).quantize(w)
    return q.codes, q.scales, q.global_scale, q.zero


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {
        "x": randn(M, K), "w": randn(N, K), "smooth": torch.rand(K, generator=g) + 0.5, "down": randn(R, K), "up": randn(N, R),
        "bias": randn(N), "shift": torch.tensor(0.171875),
    }  # fmt: skip


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def by_hand(c, weight, on, act=None):
    """float64: each term as the docstring's formula has it."""
    x, w = c["x"].double(), formats.get(weight).fake(c["w"]).double()
    xh = x + c["shift"].double() if "shift" in on else x
    xh = xh / c["smooth"].double() if "smooth" in on else xh
    if "hadamard" in on:
        h = torch.tensor([[1.0]], dtype=torch.float64)
        while len(h) < 64:
            h = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), h)
        xh = (xh.unflatten(-1, (-1, 64)) @ (h / 8)).flatten(-2)
    if act:
        xh = formats.get(act).fake(xh.float()).double()
    y = xh @ w.T
    if "lowrank" in on:
        y = y + x @ c["down"].double().T @ c["up"].double().T  # the raw input
    return y + c["bias"].double() if "bias" in on else y


def run(c, weight, on, act="", x=None):
    pick = lambda name, key=None: c[name] if (key or name) in on else None  # noqa: E731
    slots = Slots(
        *packed(weight, c["w"]), pick("smooth"), pick("down", "lowrank"), pick("up", "lowrank"), pick("bias"), pick("shift"),
        weight=weight, act=act, n=N, hadamard=64 if "hadamard" in on else 0,
    )  # fmt: skip
    return reference.linear(c["x"] if x is None else x, slots)


EXTRAS = [
    (), ("bias",), ("smooth",), ("shift",), ("lowrank",), ("hadamard",), ("smooth", "shift"), ("smooth", "lowrank", "bias"),
    ("smooth", "shift", "hadamard", "lowrank", "bias"),
]  # fmt: skip


@pytest.mark.parametrize("on", EXTRAS, ids="+".join)
@pytest.mark.parametrize(
    "weight", ["int4_g64", "uint4_g32", "nvfp4", "mxfp4", "int8_row", "int4_s8_g64", "fp8_e4m3_row"]
)
def test_float_activations(weight, on):
    c = case()
    assert relative(run(c, weight, on), by_hand(c, weight, on)) < 2e-6


@pytest.mark.parametrize("act", ["int4_g64", "uint4_g64", "nvfp4_dynamic", "int8_row", "mxfp4"])
def test_quantized_activations(act):
    """Reciprocals may move a code that lies on a tie, nothing else."""
    c, on = case(), ("smooth", "lowrank", "bias")
    assert relative(run(c, "int4_g64", on, act), by_hand(c, "int4_g64", on, act)) < 5e-3
    assert relative(run(c, "int4_g64", on, act), by_hand(c, "int4_g64", on)) > 2e-3, (
        "the rounding of activations was left out"
    )


def test_unsigned_codes_after_a_shift():
    c = case()
    c["x"] = torch.nn.functional.gelu(c["x"])
    y = run(c, "int4_g64", ("shift",), "uint4p_g64")
    assert relative(y, by_hand(c, "int4_g64", ("shift",), "uint4p_g64")) < 5e-3


def test_shift_by_column_and_smooth_in_half_precision():
    c = case()
    c["shift"], c["smooth"] = torch.linspace(0, 1, K), c["smooth"].half()
    assert relative(run(c, "int4_g64", ("shift", "smooth")), by_hand(c, "int4_g64", ("shift", "smooth"))) < 2e-6


def test_k_is_padded_with_zeros():
    c = case()
    w = c["w"][:, :100]
    wide = torch.nn.functional.pad(w, (0, 28))
    y = reference.linear(c["x"][:, :100], Slots(*packed("int4_g64", wide), weight="int4_g64", n=N))
    assert relative(y, c["x"][:, :100].double() @ formats.get("int4_g64").fake(wide).double()[:, :100].T) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K)], ids=str)
def test_dtype_and_leading_axes(dtype, shape):
    c = case()
    y = run(c, "int4_g64", ("smooth", "bias"), "int4_g64", torch.randn(shape).to(dtype))
    assert y.dtype == dtype and y.shape == (*shape[:-1], N)


def test_rows_do_not_see_each_other():
    c = case()
    assert torch.allclose(
        run(c, "int4_g64", ("smooth",), "int4_g64")[3:4],
        run(c, "int4_g64", ("smooth",), "int4_g64", c["x"][3:4]),
        atol=1e-4,
    )


def test_static_activation_scales():
    x = torch.randn(5, K)
    scale = torch.tensor([0.25, 0.5])
    want = (x.unflatten(-1, (2, 64)) / scale[:, None]).round().clamp(-7, 7) * scale[:, None]
    assert torch.equal(reference.fake_act(x, "int4_g64", scale), want.flatten(-2))


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthonormal_symmetric_and_of_one_magnitude(size):
    h = reference.hadamard_blocks(torch.eye(size, dtype=torch.float64), size)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(h, h.T) and torch.allclose(h.abs(), torch.full_like(h, size**-0.5))


def test_hadamard_is_applied_block_by_block():
    x = torch.randn(3, 64, dtype=torch.float64)
    y = reference.hadamard_blocks(x, 16)
    assert torch.allclose(y[:, 16:32], reference.hadamard_blocks(x[:, 16:32].contiguous(), 16))
    assert torch.allclose(reference.hadamard_blocks(y, 16), x)


@pytest.mark.parametrize("size, k", [(12, 48), (16, 40)])
def test_hadamard_refuses(size, k):
    with pytest.raises(ValueError, match=f"power of two that divides K, found {size} for K={k}"):
        reference.hadamard_blocks(torch.zeros(1, k), size)
