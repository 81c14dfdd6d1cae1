"""The fused ops on plain torch: schemas, shapes under compile, and the reference against a float64 computation by hand."""

import pytest
import torch
from layers import arguments, make_layer
from torch.nn import functional as F

from qgen.kernels import fused_ops, fused_reference, reference
from qgen.kernels.fusion import GATED, Heads, Producer

K, MIDDLE, N = 64, 128, 48


def mlp_layers(activation):
    first = make_layer("int4_g64", "int4_g64", MIDDLE * (1 + (activation == GATED)), K, torch.float32, 8)
    return arguments(*first), arguments(*make_layer("int4_g64", "int4_g64", N, MIDDLE, torch.float32, 8))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "none", GATED])
def test_mlp_is_its_layers_one_by_one(activation):
    first, second = mlp_layers(activation)
    x = torch.randn(2, 5, K)
    y = reference.linear(F.layer_norm(x, (K,), eps=1e-5), first)
    if activation == GATED:
        y = F.silu(y[..., :MIDDLE]) * y[..., MIDDLE:]
    else:
        y = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu, "none": lambda t: t}[activation](y)
    got = fused_ops.mlp(x, first, second, Producer("layernorm", eps=1e-5), activation)
    assert torch.allclose(got, reference.linear(y, second), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_and_modulation(kind):
    x, scale, shift, gamma = torch.randn(2, 5, K), torch.randn(2, K), torch.randn(2, K), torch.rand(K)
    norm = F.layer_norm(x, (K,), gamma, None, 1e-6) if kind == "layernorm" else F.rms_norm(x, (K,), gamma, 1e-6)
    want = norm * (1 + scale[:, None]) + shift[:, None]
    got = fused_reference.produce(x, Producer(kind, gamma=gamma, scale=scale, shift=shift))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rotation_by_complex_numbers():
    """Pairs are complex numbers that turn; halves are the same on permuted columns."""
    dim, length = 8, 5
    y = torch.randn(3 * length, 3 * dim, dtype=torch.float64)
    angle = torch.randn(length, dim // 2, dtype=torch.float64)
    turned = torch.polar(torch.ones_like(angle), angle).repeat(3, 1)[:, None]
    q = y[:, : 2 * dim].view(-1, 2, dim)
    want = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous()) * turned).flatten(-2)
    heads = Heads(dim, 2 * dim, None, angle.cos(), angle.sin())
    got = fused_reference.apply_heads(y.float(), heads)
    assert torch.allclose(got[:, : 2 * dim].double(), want.flatten(1), atol=1e-5)
    assert torch.equal(got[:, 2 * dim :], y[:, 2 * dim :].float())
    swap = torch.arange(dim).view(-1, 2).T.flatten()
    halves = fused_reference.apply_heads(
        q[..., swap].flatten(1).float(), Heads(dim, 2 * dim, None, angle.cos(), angle.sin(), halves=True)
    )
    assert torch.allclose(halves.view_as(q).double(), want[..., swap], atol=1e-5)


def test_heads_norm():
    y, gamma = torch.randn(7, 24), torch.rand(16)
    got = fused_reference.apply_heads(y, Heads(8, 16, gamma, eps=1e-6))
    want = F.rms_norm(y[:, :16].view(7, 2, 8), (8,), eps=1e-6) * gamma.view(2, 8)
    assert torch.allclose(got[:, :16], want.flatten(1), atol=1e-6)


TESTS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


def test_opcheck():
    first, second = mlp_layers("silu")
    x = torch.randn(6, K)
    before = ("rmsnorm", torch.rand(K), None, None, None, None, 1e-6)
    torch.library.opcheck(
        torch.ops.qgen.mlp.default, (x, *first, *second, *before, "silu", "reference"), test_utils=TESTS
    )
    heads = (16, 32, torch.rand(32), torch.randn(6, 8), torch.randn(6, 8), False, 1e-6)
    torch.library.opcheck(
        torch.ops.qgen.fused_linear.default, (x, *first, *before, "none", *heads, "reference"), test_utils=TESTS
    )


def test_compiled_is_one_graph_and_the_same_numbers():
    first, second = mlp_layers("gelu_tanh")
    run = lambda x: fused_ops.mlp(fused_ops.fused_linear(x, second_to_k, activation="silu"), first, second)  # noqa: E731
    second_to_k = arguments(*make_layer("int4_g64", "", K, K, torch.float32))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for rows in (3, 7):
        x = torch.randn(2, rows, K)
        assert torch.equal(compiled(x), run(x))


def test_what_is_not_there_is_named():
    first, second = mlp_layers("silu")
    x = torch.randn(2, K)
    with pytest.raises(ValueError, match=r"unknown activation 'gelu_tahn' \(did you mean 'gelu_tanh'\?\)"):
        fused_ops.mlp(x, first, second, activation="gelu_tahn")
    with pytest.raises(ValueError, match="unknown activation 'silu_mul'"):
        fused_ops.fused_linear(x, first, activation=GATED)
    with pytest.raises(ValueError, match="unknown kernel of mlp 'referense'"):
        fused_ops.mlp(x, first, second, kernel="referense")
    with pytest.raises(ValueError, match="an even number of first outputs, found 127"):
        fused_ops.mlp(x, first._replace(n=127), second, activation=GATED)
    with pytest.raises(ValueError, match="a rotation needs both cos and sin"):
        Heads(8, 16, cos=torch.ones(1, 4))
    with pytest.raises(ValueError, match="whole heads of an even size, found 20 columns in heads of 8"):
        Heads(8, 20)
