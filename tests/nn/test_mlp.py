"""Two layers and the GELU between them as one op: what is fused, what is not, and that nobody gets wrong values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgen
from qgen.kernels import fused_ops, registry
from qgen.nn import QuantLinear, mlp
from qgen.recipe import Recipe, Spec


class Feed(nn.Module):
    """A transformer's MLP, written as diffusers writes it: the activation holds the first layer."""

    def __init__(self, approximate="tanh", between=None):
        super().__init__()
        self.first, self.rest, self.second = nn.Linear(64, 128), nn.Dropout(0.1), nn.Linear(128, 64)
        self.act, self.between = nn.GELU(approximate="tanh"), between
        self.act.forward = lambda y: F.gelu(y, approximate=approximate)

    def forward(self, x):
        y = self.first(x)
        y = y if self.between is None else self.between(y)
        return self.second(self.rest(self.act(y)))


@pytest.fixture
def counted(monkeypatch):
    """How often the fused op ran."""
    calls = []
    op = fused_ops.mlp

    def counting(*args, **kwargs):
        calls.append(kwargs["kernel"])
        return op(*args, **kwargs)

    monkeypatch.setattr(fused_ops, "mlp", counting)
    return calls


def quantized(act="int8_row", fuse=True, **options):
    torch.manual_seed(0)
    model = Feed(**options).eval().requires_grad_(False)
    qgen.quantize(model, Recipe(Spec("int4_s8_g64", act)), calibration=[torch.randn(2, 9, 64)], progress=False)
    qgen.prepare(model, "reference", fuse_mlp=fuse)
    return model


def error(x, want):
    return float((x - want).norm() / want.norm())


def test_a_pair_is_one_op_and_nearly_the_same_numbers(counted):
    model, x = quantized(), torch.randn(2, 9, 64)
    one_by_one = quantized(fuse=False)
    assert isinstance(model.first, QuantLinear) and model.first.defers and not one_by_one.first.defers
    with torch.no_grad():
        got, want = model(x), one_by_one(x)
    assert counted == ["reference"] and type(got) is torch.Tensor
    assert error(got, want) < 1e-2 and model.first.defers and not model.second.defers
    with torch.inference_mode():
        assert torch.equal(model(x), got) and len(counted) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"approximate": "none"},
        {"between": lambda y: y + 1},
        {"between": lambda y: y.chunk(2, -1)[0].repeat(1, 1, 2)},
        {"between": lambda y: F.gelu(y, approximate="tanh")},
        {"between": lambda y: torch.cat([y[:1], y[1:]])},
    ],
    ids=["another-gelu", "something-added", "gated", "two-gelus", "cut"],
)
def test_other_uses_get_the_layers_own_values_and_are_not_tried_again(options, counted):
    model, x = quantized(**options), torch.randn(2, 9, 64)
    want = quantized(fuse=False, **options)(x)
    assert torch.equal(model(x), want)
    assert not model.first.defers and counted == []
    assert torch.equal(model(x), want)


def test_a_hook_that_looks_sees_values(counted):
    model, x, seen = quantized(), torch.randn(2, 9, 64), []
    want = quantized(fuse=False)
    model.first.register_forward_hook(lambda layer, inputs, y: seen.append(y.float().clone()))
    assert torch.equal(model(x), want(x)) and len(seen) == 2  # the hook's look runs the layer, and its hook, again
    assert all(torch.equal(y, want.first(x)) and type(y) is torch.Tensor for y in seen)


def test_training_runs_the_layers_one_by_one(counted):
    model = quantized()
    x = torch.randn(2, 9, 64, requires_grad=True)
    model(x).sum().backward()
    assert counted == [] and x.grad.abs().sum() > 0 and model.first.defers


def test_a_layer_with_lent_weights_does_not_defer(counted):
    model, x = quantized(), torch.randn(2, 9, 64)
    model.first.lent = True
    assert torch.equal(model(x), quantized(fuse=False)(x)) and counted == [] and model.first.defers


def test_only_pairs_defer():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "ff": Feed(),
            "exact": nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)),
            "out": nn.Linear(64, 64),
        }
    )
    model.forward = lambda x: model["out"](model["exact"](model["ff"](x)))
    model.eval().requires_grad_(False)
    calls = [torch.randn(2, 9, 64)]
    qgen.quantize(model, Recipe(Spec("int4_s8_g64", "int8_row")), calibration=calls, progress=False)
    qgen.prepare(model, "reference")
    assert mlp.mark(model, True) == 1
    assert [name for name, m in model.named_modules() if getattr(m, "defers", False)] == ["ff.first"]
    assert mlp.mark(model, False) == 0 and not model["ff"].first.defers


def test_a_compiled_graph_has_no_promise(counted):
    model, x = quantized(), torch.randn(2, 9, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), quantized(fuse=False)(x)) and counted == []


def test_kernels_without_the_op_and_layers_that_differ_are_left_alone(counted):
    model = quantized()
    assert "mlp/cpu_int8" not in registry.kernels
    qgen.prepare(model, "cpu_int8", fuse_mlp=True)
    assert not model.first.defers
    model = quantized()
    model.second.prepare("cpu_int8")
    x = torch.randn(2, 9, 64)
    want = model.second(F.gelu(quantized(fuse=False).first(x), approximate="tanh"))
    assert torch.equal(model(x), want) and counted == [] and not model.first.defers
    float_acts = quantized(act=None)
    assert not mlp.able(float_acts.first) and not float_acts.first.defers


def test_copies_and_moves_keep_it(counted):
    model, x = quantized(), torch.randn(2, 9, 64)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want) and len(counted) == 2
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert error(half(x.bfloat16()).float(), want) < 3e-2
