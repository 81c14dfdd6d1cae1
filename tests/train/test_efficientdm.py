"""EfficientDM's card: merged updates, rates in proportion to steps, learned steps over timesteps; QuEST's: few layers, held-out gain."""

import copy

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.methods.temporal import Static
from qgen.recipe import Recipe, Spec
from qgen.train.adam import Adam
from qgen.train.distill import Lessons
from qgen.train.efficientdm import EfficientDM
from qgen.train.full import Full
from qgen.train.quest import QuEST, sensitivity
from qgen.train.student import Student
from tests.tiny import first, net, net_calls, same, snapshot
from tests.train.calls import apart, watching
from tests.train.test_finetune import Stops


def moved(method, per_layer=True):
    """Mean change of the unrounded weight in mean steps after one step, for layers whose weights differ by a hundred."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).eval().requires_grad_(False)
    teacher[0].weight.normal_(0, 2.0)
    teacher[1].weight.normal_(0, 0.02)
    module = qgen.quantize(copy.deepcopy(teacher), Recipe(Spec("int4_row", "int8_row")), progress=False)
    student, x = Student(module, teacher), torch.randn(64, 64)
    method.open(student, None)
    student.wear()
    before = {p: t._unrounded().detach().clone() for p, t in student.twins.items()}
    (module(x) - teacher(x) * 1.1).square().mean().backward()
    leaves = student.leaves()
    grads = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    rates = student.rates() if per_layer else dict.fromkeys(leaves, 1e-3)
    Adam().step(leaves, grads, rates)
    found = [float((t._unrounded() - before[p]).detach().abs().mean() / t.mean_step) for p, t in student.twins.items()]
    student.close()
    return max(found) / min(found)


@pytest.mark.parametrize("method", [EfficientDM(), Full()], ids=["efficientdm", "full"])
def test_layers_of_any_scale_change_equally_many_codes(method):
    assert moved(method) <= 1.5
    assert moved(method, per_layer=False) > 30, "one rate for all would not"


class Timed(nn.Module):
    """A layer whose input grows along the trajectory, as a denoiser's does."""

    def __init__(self, layers=1):
        super().__init__()
        torch.manual_seed(0)
        gelu = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)]
        self.layers = nn.Sequential(*(gelu if layers == 2 else [nn.Linear(64, 64, bias=False)]))

    def forward(self, x, timestep):
        return self.layers(x * torch.exp(timestep)[:, None, None])


def calls(edge, count, samples=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    times = torch.linspace(-edge, edge, count)
    return CalibrationSet(
        tuple(
            Call((torch.randn(4, 16, 64, generator=g),), {"timestep": t.expand(4).clone()}, Moment(s, i, float(t)))
            for s in range(samples)
            for i, t in enumerate(times)
        )
    )


def errors(module, teacher, given):
    """Relative error at each timestep, over calls of another seed."""
    lost = {}
    with torch.no_grad():
        for call in given.calls:
            want = first(call.run(teacher))
            lost.setdefault(call.moment.step, []).append(
                float((first(call.run(module)) - want).square().sum() / want.square().sum())
            )
    return torch.tensor([sum(found) / len(found) for found in lost.values()])


def test_steps_learned_for_each_timestep_beat_a_shared_one():
    """Amplitudes e^-1.5 … e^1.5 over ten timesteps, all starting from one calibrated step."""
    teacher, seen = Timed().eval().requires_grad_(False), calls(1.5, 10)
    means = []
    for bins in (10, 1):
        recipe = Recipe(Spec("int8_row", "int4_row", (Static(),), bins=bins))
        module = qgen.quantize(copy.deepcopy(teacher), recipe, calibration=seen, progress=False)
        layer = module.layers[0]
        if bins > 1:
            layer.t_scale.copy_(layer.t_scale[-1:].expand_as(layer.t_scale).clone())
        start = errors(module, teacher, calls(1.5, 10, 2, seed=9)).mean()
        learned = EfficientDM(rate=0.0, scale_rate=0.0, step_rate=0.03)
        qgen.finetune(module, teacher, learned, steps=400, calibration=seen, progress=False)
        means.append(errors(module, teacher, calls(1.5, 10, 2, seed=9)).mean())
        assert means[-1] <= start
    assert means[0] <= 0.3 * means[1], means


def test_guidance_in_two_passes_and_in_one_batch_choose_the_same_steps():
    recipe = Recipe(Spec("int4_g64", "int8_row", (Static(),), bins=4))
    seen = calls(1.5, 10)
    module = qgen.quantize(Timed(2).eval().requires_grad_(False), recipe, calibration=seen, progress=False)
    qgen.prepare(module, "reference")
    student = Student(module)
    EfficientDM().open(student, Lessons(seen.hold_out(), Timed(2).eval()))
    student.wear()
    call = seen.calls[3]
    x, t = call.args[0], call.kwargs["timestep"]
    with torch.no_grad():
        whole = module(torch.cat([x, -x]), torch.cat([t, t]))
        halves = torch.cat([module(x, t), module(-x, t)])
    student.close()
    assert torch.equal(whole, halves)


def test_quest_trains_what_it_names_and_the_gain_is_on_unseen_calls():
    """Eight timesteps, amplitudes e^-0.7 … e^0.7, W4A4: the second layer and its steps alone."""
    teacher, seen = Timed(2).eval().requires_grad_(False), calls(0.7, 8)
    recipe = Recipe(Spec("int4_row", "int4_row", (Static(),), bins=8))
    module = qgen.quantize(copy.deepcopy(teacher), recipe, calibration=seen, progress=False)
    fitted, unseen = errors(module, teacher, seen).mean(), errors(module, teacher, calls(0.7, 8, 4, seed=9)).mean()
    before = {n: t.clone() for n, t in module.layers[0].canonical().items()}
    qgen.finetune(module, teacher, QuEST(layers=("layers.2",)), steps=300, calibration=seen, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in module.layers[0].canonical().items())
    assert errors(module, teacher, seen).mean() <= 0.95 * fitted
    assert errors(module, teacher, calls(0.7, 8, 4, seed=9)).mean() <= 0.97 * unseen


def test_quest_finds_time_layers_by_what_they_see_and_the_sensitive_by_measuring():
    teacher = net()
    given = net_calls().hold_out()
    recipe = Recipe(Spec("int4_g64", "int8_row")).set("*fc2", act="int4_row")
    module = qgen.quantize(net(), recipe, calibration=given, progress=False)
    student = Student(module, teacher)
    scores, timed = sensitivity(module, student.twins, Lessons(given, teacher))
    assert timed == {"time"} and len(scores) == len(student.twins)
    assert set(sorted(scores, key=scores.get)[-2:]) == {"blocks.0.fc2", "blocks.1.fc2"}
    QuEST(share=2 / 13).open(student, Lessons(given, teacher))
    assert {p for p, t in student.twins.items() if t.leaves} == {"time", "blocks.0.fc2", "blocks.1.fc2"}
    student.close()
    with pytest.raises(ValueError, match="matches"):
        qgen.finetune(module, teacher, QuEST(layers=("nothing*",)), steps=1, calibration=given, progress=False)


def opened(method, teacher, given):
    """A student of W4A8 whose leaves the method has opened, and what it adds to the loss."""
    module = qgen.quantize(net(), Recipe(Spec("int4_g64", "int8_row")), calibration=given, progress=False)
    student, told = Student(module, teacher), Lessons(given.hold_out(), teacher)
    method.open(student, told)
    student.wear()
    return student, told, method.added(student, told)


def test_quest_trains_time_layers_first_then_the_others_each_by_its_own_outputs_too():
    teacher, given = net(), net_calls()
    method = QuEST(share=2 / 13, local=0.5)
    student, told, (term,) = opened(method, teacher, given)
    stages, number = student.stages, told.fit[0]
    assert sorted(stages.values()) == [0, 1, 1] and stages["time"] == 0
    for step, stage in ((0, 0), (49, 0), (50, 1), (99, 1)):
        method.before(student, step, 100, Adam())
        assert all(t.requires_grad == (stages[p] == stage) for p in stages for t in student.twins[p].leaves.values())
        with watching((student.module, teacher), list(stages)) as seen:
            told.calls[number].run(student.module)
            told.calls[number].run(teacher)
        lost = term.loss(number, step / 100)
        by_hand = [
            (seen[0, p] - seen[1, p]).square().sum() / seen[1, p].square().sum() for p in stages if stages[p] == stage
        ]
        assert float(lost.detach()) == pytest.approx(0.5 * float(sum(by_hand)), rel=1e-4)
        assert lost.requires_grad
    term.close()
    student.close()
    assert QuEST(local=0.0).added(student, told) == []


def test_quest_with_its_local_loss_brings_the_trained_layers_nearer_to_the_teachers():
    """Outputs of the trained layers on unseen calls, with and without the local loss; the model's own error falls with both."""
    teacher, inside, errors_ = net(), [], []
    for local in (0.0, 1.0):
        module = qgen.quantize(net(), Recipe(Spec("int3_g64", "int8_row")), calibration=net_calls(), progress=False)
        method = QuEST(layers=("blocks.*.fc2", "blocks.*.o"), local=local)
        qgen.finetune(module, teacher, method, steps=60, calibration=net_calls(8, 4), progress=False)
        told = module.qgen_tuning
        errors_.append(told["held"][told["best"]] / told["held"][0])
        paths = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("fc2", "o")]
        inside.append(apart(module, teacher, paths, net_calls(12, 2).calls[16:]))
    assert inside[1] < inside[0], inside
    assert max(errors_) < 0.95, errors_


def test_quest_goes_on_after_an_interruption_in_either_stage(tmp_path):
    def tune(folder, progress=False):
        module = qgen.quantize(net(), Recipe(Spec("int3_g64", "int8_row")), calibration=net_calls(), progress=False)
        options = {"steps": 8, "every": 2, "checkpoint": folder, "progress": progress}
        qgen.finetune(module, net(), QuEST(layers=()), calibration=net_calls(6, 2), **options)
        return module

    whole = tune(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "b", Stops(KeyboardInterrupt()))
    assert same(tune(tmp_path / "b"), snapshot(whole))
