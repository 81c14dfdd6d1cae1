"""Twins: the packed layer's own numbers, gradients by the formulas, only declared tensors move, and back without a trace."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import qgen
from qgen import formats
from qgen.calibration.base import CalibrationSet
from qgen.kernels import reference
from qgen.methods.dither import Dither
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.methods.rotate import Rotate
from qgen.methods.smooth import Smooth
from qgen.methods.temporal import Center, Static, TemporalBias
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Spec
from qgen.train import fake
from qgen.train.full import open_weights
from qgen.train.student import Student
from tests.tiny import FAMILIES, first, net, net_calls, same, snapshot
from tests.train.calls import timed_calls

RECIPES = {
    "plain": Recipe(Spec("int4_g64", "int4_g64")),
    "three-bits": Recipe(Spec("uint3_g32", "uint4_g64")),
    "all-slots": Recipe(Spec("int4_g64", "uint4_g64", (Smooth(), LowRank(4), GPTQ()))),
    "rotated": Recipe(Spec("int4_g64", "int4_g64", (Rotate(),))),
    "floats": Recipe(Spec("nvfp4", "nvfp4_dynamic")),
    "sub-scales": Recipe(Spec("int4_s8_g64", "int8_row")),
    "timed": Recipe(Spec("int4_g64", "uint4_g64", (Center(), LowRank(4), TemporalBias()), bins=4)),
    "static": Recipe(Spec("int4_g64", "int8_row", (Center(), Static(), TemporalBias()), bins=4)),
    "curves": Recipe(Spec("int4_g64", "uint4_g64", (Center(curves=0), LowRank(4), TemporalBias(curves=1)), bins=8)),
    "dithered": Recipe(
        Spec("int4_g64", "uint4_g64", (Center(curves=0), LowRank(4), Dither(), TemporalBias(curves=0)), bins=8)
    ),
}
CURVED = ("curves", "dithered")


def still(calls):
    """Each sample's calls with the latents of its first one, so large that little else of the input counts: what dither is for."""
    first = {c.moment.sample: c.args[0] for c in reversed(calls.calls)}
    made = (replace(c, args=(100 * first[c.moment.sample],)) for c in calls.calls)
    return CalibrationSet(tuple(made))


@pytest.fixture(params=RECIPES)
def pair(request):
    teacher = net()
    calls = timed_calls(4, 8) if request.param in CURVED else timed_calls()
    if request.param == "dithered":
        calls = still(calls)
    student = qgen.quantize(copy.deepcopy(teacher), RECIPES[request.param], calibration=calls, progress=False)
    qgen.prepare(student, "reference")
    fc1 = student.blocks[0].fc1
    assert (fc1.t_edges is not None) == (RECIPES[request.param].default.bins > 1)
    assert (fc1.t_mix is not None) == (request.param in CURVED)
    return student, teacher


def answer(module, seed=3):
    return first(net_calls(seed + 1).calls[-1].run(module))


def open_all(student):
    for twin in open_weights(student, 0.02, 1e-3):
        for slot in ("down", "up", "bias", "t_bias"):
            twin.open_slot(slot, 1e-3)


def test_a_twin_answers_as_its_layer_bit_for_bit(pair):
    module, teacher = pair
    want, before = answer(module), snapshot(module)
    student = Student(module, teacher)
    open_all(student)
    student.wear()
    got = answer(module)
    assert got.requires_grad and torch.equal(got, want)
    student.close()
    assert same(module, before) and torch.equal(answer(module), want)
    assert all("forward" not in layer.__dict__ for layer in module.modules())


def test_untrained_leaves_pack_to_the_bytes_that_were_there(pair):
    module, teacher = pair
    student = Student(module, teacher)
    open_all(student)
    for path, slots in student.packed().items():
        before = module.get_submodule(path).canonical()
        assert slots.keys() == before.keys()
        for name, t in slots.items():
            assert t.dtype == before[name].dtype, name
            if name == "codes":  # -0 may have become 0
                element = formats.get(module.get_submodule(path).weight_format).element
                t, was = (element.decode(student.twins[path].format.unpack(c)) for c in (t, before[name]))
            else:
                t, was = (c.reshape(-1).view(torch.uint8) for c in (t, before[name]))
            assert torch.equal(t, was), name


def test_every_leaf_gets_a_finite_gradient_and_nothing_else_does(pair):
    module, teacher = pair
    student = Student(module, teacher)
    open_all(student)
    student.wear()
    answer(module).square().mean().backward()
    blind = {"t_bias"}  # rows of bins that the call is not in get zeros
    for name, leaf in student.leaves().items():
        assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()), name
        assert bool(leaf.grad.any()) or name.rpartition(":")[2] in blind, name
    assert all(p.grad is None for p in module.parameters())
    student.close()


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(8, 32, 3, padding=1), nn.Conv1d(32, 32, 3, padding=1), nn.Conv3d(8, 32, (3, 1, 1))]
)
def test_convolutions(conv):
    shape = {nn.Conv2d: (2, 8, 6, 6), nn.Conv1d: (2, 32, 9), nn.Conv3d: (2, 8, 4, 5, 5)}[type(conv)]
    teacher = nn.Sequential(conv, nn.GELU()).eval()
    x = torch.randn(shape)
    module = qgen.quantize(
        copy.deepcopy(teacher), Recipe(Spec("int4_g32", "int4_g32")), calibration=[x], progress=False
    )
    qgen.prepare(module, "reference")
    with torch.no_grad():
        want = module(x)
    student = Student(module, teacher)
    open_all(student)
    student.wear()
    got = module(x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert student.leaves()["0:master"].grad.abs().sum() > 0
    student.close()


def test_gradients_are_those_of_learned_steps():
    fmt = formats.get("int4_row")
    w = torch.tensor([[0.4, -1.2, 9.0, -7.4, 2.5, 3.49, 0.0, -20.0]], requires_grad=True)
    s = torch.tensor([[1.0]], requires_grad=True)
    y = fake.weights(fmt, w, s, None, None)
    assert y.tolist() == [[0.0, -1.0, 7.0, -7.0, 2.0, 3.0, 0.0, -7.0]]
    grad = torch.arange(1.0, 9.0)[None]
    y.backward(grad)
    inside = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0]])
    assert torch.equal(w.grad, grad * inside)
    slope = torch.where(inside.bool(), y.detach() - w.detach(), y.detach())  # q − w / s inside, q outside
    assert torch.allclose(s.grad, (grad * slope).sum()[None, None])


@pytest.mark.parametrize(
    "act, static", [("int4_g64", True), ("int4_g64", False), ("uint4_g64", False), ("int8_row", True)]
)
def test_fake_activations_are_the_reference(act, static):
    x = torch.randn(5, 128, requires_grad=True)
    scale = None
    if static:
        groups = 128 // (formats.get(act).block or 128)
        scale = torch.full((groups,), 0.3 if act.startswith("int4") else 0.01, requires_grad=True)
    y = fake.activations(x, act, scale)
    assert torch.equal(y, reference.fake_act(x.detach(), act, None if scale is None else scale.detach()))
    y.sum().backward()
    if static:  # what lies beyond the range has no gradient, and the scale has one
        step = scale.detach().repeat_interleave(128 // len(scale))
        assert torch.equal(x.grad, (x.detach().abs() <= step * formats.get(act).element.max).float())
        assert bool(scale.grad.any())
    else:
        assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", ["int4_g64", "uint3_g32", "int2_g32", "nvfp4", "nf4_g64", "fp4_e2m1_g32", "mxfp4"])
def test_an_anchor_keeps_codes_and_moves_towards_the_wanted_weight(name):
    fmt = formats.get(name)
    w = torch.randn(16, 128)
    q = fmt.quantize(w + 0.3 * torch.randn_like(w))  # codes that are not the nearest, as GPTQ's are not
    held = fake.anchor(q, w)
    assert torch.equal(fmt.quantize(held, like=q).dequantize(), q.dequantize())
    middle = fake.anchor(q, None)
    assert torch.equal(middle, q.dequantize())
    assert (held - w).abs().mean() < 0.7 * (middle - w).abs().mean()


def test_only_declared_tensors_move(pair):
    module, teacher = pair
    before = snapshot(module)
    path = next(path for path, layer in module.named_modules() if isinstance(layer, Packed) and "fc1" in path)
    student = Student(module, teacher)
    twin = student.twins[path]
    twin.open_master(0.02)
    student.wear()
    answer(module).square().mean().backward()
    with torch.no_grad():
        twin.leaves["master"].add_(twin.leaves["master"].grad.sign(), alpha=twin.mean_step)
    packed = student.packed()
    student.close()
    assert list(packed) == [path] and same(module, before)
    assert [name for name, t in packed[path].items() if not torch.equal(t, before[f"{path}.{name}"])] == ["codes"]


def test_a_bf16_model_is_trained_in_float32_and_answers_in_bf16():
    teacher = FAMILIES["plain"][0]().bfloat16()
    x = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    module = qgen.quantize(copy.deepcopy(teacher), RECIPES["plain"], calibration=[x], progress=False)
    qgen.prepare(module, "reference")
    want = module(x)
    student = Student(module, teacher)
    open_all(student)
    student.wear()
    got = module(x)
    student.close()
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
