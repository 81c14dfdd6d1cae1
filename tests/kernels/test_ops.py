"""The op: schema, shapes under compile, the same numbers compiled, and its gradient against autograd."""

import pytest
import torch
from torch import nn

from qgen.kernels import ops, reference
from qgen.nn import QuantLinear
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K = 48, 100  # K is padded to 128


def layer(
    weight="int4_g64", act="int4_g64", rank=8, smooth=True, hadamard=0, shift=False, bias=True, dtype=torch.float32
):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(N, K, generator=g)
    extra = {}
    if rank:
        extra |= {"down": torch.randn(rank, K, generator=g) / 10, "up": torch.randn(N, rank, generator=g) / 10}
    if smooth:
        extra["smooth"] = torch.rand(K, generator=g) + 0.5
    if shift:
        extra["shift"] = torch.tensor(0.125)
    b = torch.randn(N, generator=g) if bias else None
    draft = Draft(
        (Site("l", "linear", "", 0, "x", (N, K)),),
        Spec(weight, act or None),
        w,
        b,
        hadamard=hadamard,
        dtype=torch.float32,
        **extra,
    )
    made = QuantLinear.from_draft(draft, dtype=dtype)
    made.prepare("reference")
    return made


CASES = {
    "w4a4": {},
    "bare": {"rank": 0, "smooth": False, "bias": False},
    "w4a16": {"act": ""},
    "nvfp4": {"weight": "nvfp4", "act": "nvfp4_dynamic"},
    "zero-points": {"weight": "uint4_g64", "act": "uint4_g64"},
    "rows": {"weight": "int4_s8_g64", "act": "int8_row"},
    "hadamard": {"hadamard": 32},
    "shift": {"act": "uint4p_g64", "shift": True},
}


def arguments(made, x):
    return (
        x,
        *[getattr(made, slot) for slot in ops.SLOTS],
        made.weight_format,
        made.act_format,
        made.n,
        made.hadamard,
        "reference",
    )


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    x = torch.randn(6, K, requires_grad=True)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if case == "nvfp4":
        tests.remove("test_schema")  # it compares arguments by arithmetic that torch lacks for float8
    torch.library.opcheck(torch.ops.qgen.linear.default, arguments(layer(**CASES[case]), x), test_utils=tests)


def test_opcheck_of_the_gradient():
    made = layer()
    slots = [getattr(made, s) for s in ("codes", "scales", "global_scale", "zero", "smooth", "down", "up")]
    torch.library.opcheck(
        torch.ops.qgen.linear_grad.default, (torch.randn(6, N), *slots, K, made.weight_format, 0, "reference")
    )


@pytest.mark.parametrize("case", ["w4a4", "w4a16", "nvfp4", "hadamard"])
def test_compiled_is_one_graph_and_the_same_numbers(case):
    made, graphs = layer(**CASES[case]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Sequential(nn.LayerNorm(K), made, nn.GELU()), backend=backend, fullgraph=True)
    eager = nn.Sequential(nn.LayerNorm(K), made, nn.GELU())
    for rows in (3, 7):
        x = torch.randn(2, rows, K)
        with torch.no_grad():
            assert torch.equal(compiled(x), eager(x))
    assert graphs and any("qgen" in str(node.target) for node in graphs[0].graph.nodes)


def test_compiled_through_autograd_traces_the_op():
    """aot_eager runs shape functions and the joint graph of forward and backward."""
    made = layer()
    x = torch.randn(5, K, requires_grad=True)
    torch.compile(made, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    compiled, x.grad = x.grad, None
    made(x).square().sum().backward()
    assert torch.allclose(compiled, x.grad, rtol=1e-5, atol=1e-5)


def floating(made, x):
    """The same layer with the dequantized weight, in plain float operations that autograd knows."""
    slots = made.canonical()
    w = reference.weight(
        slots["codes"], slots["scales"], slots.get("global_scale"), slots.get("zero"), made.weight_format
    )
    xh = reference.transform_act(x, w.shape[1], slots.get("smooth"), slots.get("shift"), made.hadamard)
    y = xh @ w.T
    if made.rank:
        y = y + x @ slots["down"].T @ slots["up"].T
    return y if made.bias is None else y + slots["bias"]


@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_autograd_through_the_dequantized_layer(case):
    """Straight through the rounding of activations: d y / d x is that of the layer without it."""
    made = layer(**CASES[case])
    x = torch.randn(4, 3, K, requires_grad=True)
    dy = torch.randn(4, 3, N)
    (mine,) = torch.autograd.grad(made(x), x, dy)
    (wanted,) = torch.autograd.grad(floating(made, x), x, dy)
    assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4)


def test_gradient_keeps_the_dtype():
    x = torch.randn(4, K, dtype=torch.bfloat16, requires_grad=True)
    layer(dtype=torch.bfloat16)(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


@pytest.mark.parametrize("case", ["w4a4", "w4a16"])
def test_autocast_changes_nothing(case):
    """Kernels choose their own precision: a caller's autocast must neither change their numbers nor break them."""
    made, x = layer(**CASES[case]), torch.randn(5, K)
    best = layer(**CASES[case])
    best.prepare()
    wanted = made(x), best(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(x), wanted[0]) and torch.equal(best(x), wanted[1])


def test_unknown_kernel_is_named():
    made = layer()
    with pytest.raises(ValueError, match=r"unknown kernel of linear 'referense' \(did you mean 'reference'\?\)"):
        torch.ops.qgen.linear(*arguments(made, torch.randn(2, K))[:-1], "referense")
