"""Low-rank mimicking: the basis is over channels and fixed from the first batch; the term is on, and reaches what is trained."""

import copy

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.recipe import Recipe, Spec
from qgen.train.distill import Lessons
from qgen.train.full import Full, open_weights
from qgen.train.mimic import LowRankMimic, channels, principal
from qgen.train.student import Student
from tests.tiny import first, net, net_calls, same, snapshot
from tests.train.calls import apart, watching
from tests.train.test_finetune import ROUNDED, Stops, lessons, quantized, unseen


def residual(rows, basis):
    """Share of the energy around the mean that lies outside the basis."""
    rows = rows - rows.mean(0)
    return float((rows - rows @ basis @ basis.T).square().sum() / rows.square().sum())


@pytest.mark.parametrize("shape", [(8, 16, 12, 16), (8, 192, 16), (4, 16, 3, 8, 16)])
def test_the_basis_holds_features_that_vary_in_few_directions_of_their_channels(shape):
    """The card's line: 4 of 16 directions. Seen over the width, which is as wide here, a basis of that size leaves most of it."""
    g = torch.Generator().manual_seed(0)
    axis = 1 if len(shape) > 3 else -1
    places = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    mix = torch.linalg.qr(torch.randn(16, 16, generator=g))[0][:4]
    f = (torch.randn(*places, 4, generator=g) @ mix + 0.02 * torch.randn(*places, 16, generator=g) + 1.0).movedim(
        -1, axis
    )
    rows = channels(f).flatten(0, -2)
    basis = principal(rows, 0.25)
    assert basis.shape == (16, 4) and torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-5)
    assert residual(rows, basis) <= 0.01
    if len(shape) > 3:
        wrong = f.flatten(0, -2)
        assert residual(wrong, principal(wrong, 0.25)) > 0.5


def mimic(student, teacher, weight=1e-4):
    given = Lessons(lessons(6, 2).hold_out(), teacher)
    return LowRankMimic(weight).begin(student, given), given


def test_the_term_is_the_distance_in_the_basis_and_reaches_the_layers_before_it():
    teacher, module = net(2), quantized(ROUNDED, 2)
    student = Student(module, teacher)
    open_weights(student, 0.01, 0.0)
    student.wear()
    term, given = mimic(student, teacher, 2.0)
    number = given.fit[1]
    with watching((module, teacher), ("blocks.0", "blocks.1")) as seen:
        given.calls[number].run(module)
        lost = term.loss(number, 0.0)
    by_hand = 0.0
    for i in (0, 1):
        basis = term.basis[f"blocks.{i}", 0]
        assert basis.shape == (64, 16)
        gap = (seen[0, f"blocks.{i}"] - seen[1, f"blocks.{i}"]) @ basis
        by_hand += 2.0 * float(gap.detach().square().sum()) / 2  # two samples in the call
    assert float(lost.detach()) == pytest.approx(by_hand, rel=1e-5)
    lost.backward()
    reached = {
        p
        for p, t in student.twins.items()
        if t.leaves["master"].grad is not None and bool(t.leaves["master"].grad.any())
    }
    assert reached == set(student.twins) - {"head"}
    term.close()
    student.close()
    assert not any(m._forward_hooks for m in (*module.modules(), *teacher.modules()))


def test_the_basis_is_fixed_from_the_first_batch():
    teacher = net(1)
    bases = []
    for worse in (False, True):
        module = quantized(ROUNDED)
        if worse:
            module.blocks[0].fc1.scales.mul_(3)
        student = Student(module, teacher)
        term, _ = mimic(student, teacher)
        bases.append(term.basis["blocks.0", 0])
        term.close()
    assert torch.equal(*bases), "the student has no say in it"


def test_training_with_the_term_changes_the_result_and_draws_features_together():
    teacher, inside, errors, states = net(1), [], [], []
    for terms in ((), (LowRankMimic(),), (LowRankMimic(1e-2),)):
        student = quantized(ROUNDED)
        before = unseen(student, teacher)
        qgen.finetune(student, teacher, Full(terms=terms), steps=40, calibration=lessons(6, 2), progress=False)
        inside.append(apart(student, teacher, ["blocks.0"], net_calls(8, 2).calls))
        errors.append(unseen(student, teacher) / before)
        states.append(snapshot(student))
        assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    assert inside[2] < inside[0], inside
    assert max(errors) < 0.9, errors
    assert any(not torch.equal(t, states[1][n]) for n, t in states[0].items()), "the card's weight changes the result"


def test_a_run_with_the_term_goes_on_after_an_interruption(tmp_path):
    def tune(folder, progress=False, weight=1e-3):
        student, method = quantized(ROUNDED), Full(terms=(LowRankMimic(weight),))
        qgen.finetune(
            student, net(1), method, steps=6, every=2, calibration=lessons(6, 2), checkpoint=folder, progress=progress
        )
        return student

    whole = tune(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "b", Stops(KeyboardInterrupt()))
    assert same(tune(tmp_path / "b"), snapshot(whole))
    with pytest.raises(qgen.errors.BadCheckpoint, match="method"):
        tune(tmp_path / "b", weight=1e-4)


def test_what_has_no_features_is_refused():
    teacher = net(1)
    with torch.no_grad():
        told = [Call(c.args, c.kwargs, c.moment, first(c.run(teacher))) for c in lessons(6, 2).calls]
    method = Full(terms=(LowRankMimic(),))
    with pytest.raises(ValueError, match="pass the teacher"):
        qgen.finetune(quantized(ROUNDED), None, method, calibration=CalibrationSet(tuple(told)), progress=False)
    single = nn.Sequential(nn.Linear(64, 64)).eval()
    calls = CalibrationSet(tuple(Call((torch.randn(2, 8, 64),), {}, Moment(s)) for s in range(4)))
    student = qgen.quantize(copy.deepcopy(single), Recipe(Spec("int4_g64")), calibration=calls, progress=False)
    with pytest.raises(ValueError, match="two quantized layers"):
        qgen.finetune(student, single, method, calibration=calls, progress=False)
    with pytest.raises(ValueError, match="share"):
        LowRankMimic(share=0.0)
