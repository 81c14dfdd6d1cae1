"""QVGen's card: the branch helps at first, fades without a jump, leaves nothing, and buckets of timesteps agree in training and use."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import qgen
from qgen.methods.temporal import Center, Static
from qgen.recipe import Recipe, Spec
from qgen.train.adam import Adam
from qgen.train.distill import Lessons
from qgen.train.full import Full
from qgen.train.qvgen import QVGen
from qgen.train.student import Student
from tests.tiny import net
from tests.train.calls import timed_calls

W3 = Recipe(Spec("int3_row"))


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval().requires_grad_(False)


def rows(seed, count=40):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 32, generator=g) for _ in range(count)]


def opened(method, recipe=W3, seed=0):
    teacher = mlp(seed)
    module = qgen.quantize(copy.deepcopy(teacher), recipe, calibration=rows(1, 4), progress=False)
    qgen.prepare(module, "reference")
    student = Student(module, teacher)
    method.open(student, None)
    student.wear()
    return module, teacher, student


def loss(module, teacher):
    x = torch.cat(rows(7))
    with torch.no_grad():
        return float((module(x) - teacher(x)).square().mean())


def test_the_branch_takes_most_of_the_error_at_the_start():
    for seed in range(3):
        module, teacher, student = opened(QVGen(rank=8), seed=seed)
        with_branch = loss(module, teacher)
        student.close()
        assert with_branch <= 0.7 * loss(module, teacher)


def test_with_full_rank_nothing_is_lost():
    module, teacher, student = opened(QVGen(rank=32))
    assert loss(module, teacher) < 1e-10
    student.close()


def test_phases_end_without_a_jump_and_the_last_without_a_branch():
    method, steps = QVGen(rank=8, fading=0.8), 100
    module, _, student = opened(method)
    adam, x, shapes = Adam(), torch.cat(rows(7)), []
    length = int(0.8 * steps / 4)
    for step in range(steps):
        if step and step % length == 0 and "0:aux_l" in student.leaves():
            at_zero = module(x).detach()  # gates of the last step of a phase are exactly 0
            method.before(student, step, steps, adam)
            saved = {p: t.gate for p, t in student.twins.items()}
            for twin in student.twins.values():
                twin.gate = None
            assert float((module(x).detach() - at_zero).abs().max()) < 1e-5
            for path, gate in saved.items():
                student.twins[path].gate = gate
        else:
            method.before(student, step, steps, adam)
        leaf = student.leaves().get("0:aux_l")
        shapes.append(0 if leaf is None else leaf.shape[1])
    assert list(dict.fromkeys(shapes)) == [8, 4, 2, 1, 0] and shapes.index(0) == 4 * length
    assert not any("aux" in name for name in student.leaves())
    trained = module(x).detach()
    packed = student.packed()
    student.close()
    for path, slots in packed.items():
        layer = module.get_submodule(path)
        layer.fill(slots)
        layer.prepare("reference")
    assert torch.equal(module(x), trained), "what is left is the plain quantized layer"


def test_half_a_phase_that_was_deleted_would_jump():
    """The clause above can fail: dropping ranks whose gates are still 1 moves the output."""
    method = QVGen(rank=8)
    module, _, student = opened(method)
    x = torch.cat(rows(7))
    before = module(x).detach()
    for twin in student.twins.values():
        method._shrink(twin, 4)
    assert float((module(x).detach() - before).abs().max()) > 1e-3
    student.close()


@pytest.mark.slow
def test_it_ends_no_worse_than_training_without_the_branch():
    """Mean over four seeds, 600 steps each, 3-bit weights."""
    finals = []
    plain = replace(Full(), rate=0.01)
    for method in (QVGen(rank=8, rate=0.01), plain):
        total = 0.0
        for seed in range(4):
            teacher = mlp(seed)
            student = qgen.quantize(copy.deepcopy(teacher), W3, calibration=rows(1, 4), progress=False)
            before = loss(student, teacher)
            qgen.finetune(student, teacher, method, steps=600, calibration=rows(2, 60), progress=False)
            total += loss(student, teacher) / before
        finals.append(total / 4)
    assert finals[0] < 0.8 and finals[0] <= finals[1], finals


@pytest.mark.parametrize("count", [20, 30, 50])
def test_buckets_agree_in_training_and_use(count):
    recipe = Recipe(Spec("int4_g64", "int8_row", (Center(), Static()), bins=4))
    module = qgen.quantize(net(), recipe, calibration=timed_calls(), progress=False)
    qgen.prepare(module, "reference")
    layer = module.blocks[0].fc1
    student = Student(module, net())
    QVGen(rank=2).open(student, Lessons(timed_calls().hold_out(), net()))
    for twin in student.twins.values():
        twin.hide()
    x = torch.randn(count, 24, 32)
    t = torch.linspace(1.2, -0.2, count)  # beyond what was calibrated too
    with torch.no_grad():
        want = module(x, timestep=t)
        student.wear()
        got = module(x, timestep=t)
        each = torch.cat([module(x[i : i + 1], timestep=t[i : i + 1]) for i in range(count)])
    student.close()
    assert layer.t_scale is not None and torch.equal(got, want)
    assert torch.allclose(each, want, atol=1e-5), "a batch of mixed timesteps is its samples one by one"
