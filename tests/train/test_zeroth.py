"""QZO's card: clipping, codes untouched, the estimate against autograd, no drift, seeds, memory of inference."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qgen
from qgen import formats
from qgen.calibration.base import CalibrationSet
from qgen.recipe import Recipe, Spec
from qgen.train.distill import Lessons
from qgen.train.qzo import QZO
from qgen.train.student import Student
from qgen.train.zeroth import Probe, descend, slope
from tests.tiny import first, net, net_calls


class Peak(TorchDispatchMode):
    """Bytes of tensors that were made under it and are alive, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    size = storage.nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, size)
        return made

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def layer_and_target():
    """16 x 32 int4 weights; the target is the same weights with rows rescaled."""
    g = torch.Generator().manual_seed(0)
    q = formats.get("int4_row").quantize(torch.randn(16, 32, generator=g))
    rows = torch.exp(0.3 * torch.randn(16, 1, generator=g))
    x = torch.randn(64, 32, generator=g)
    return q, x, x @ (q.dequantize() * rows).T


def learn(clip, steps=3000, rate=3e-4, spikes=True, seed=0):
    q, x, want = layer_and_target()
    leaves, probe = {"scale": torch.zeros(16, 1)}, Probe()

    def loss(factor=1.0):
        w = q.dequantize() * probe("scale", leaves["scale"]).exp()
        return factor * (x @ w.T - want).square().mean()

    first_loss = float(loss())
    for step in range(steps):
        factor = 1e4 if spikes and step % 100 == 99 else 1.0
        d, _ = slope(lambda f=factor: loss(f), probe, seed * 100_003 + step, 1e-3)
        descend(leaves, probe, seed * 100_003 + step, d, {"scale": rate}, clip)
    return float(loss()) / first_loss, leaves["scale"]


def test_clipping_survives_spikes_and_nothing_else_does():
    kept, scale = learn(clip=5.0)
    assert kept <= 0.05, kept
    assert bool((scale.exp() > 0).all())
    lost, _ = learn(clip=0.0, steps=400)
    assert not lost < 1e3, lost  # NaN counts as exploded


def test_the_slope_is_the_directional_derivative():
    leaves, probe = {"a": torch.randn(7, 3, dtype=torch.float64), "b": torch.randn(5, dtype=torch.float64)}, Probe()

    def loss():
        a, b = probe("a", leaves["a"]), probe("b", leaves["b"])
        return (a.sin().sum() * b.square().sum()).exp().log() + a.pow(3).mean()

    d, _ = slope(loss, probe, 11, 1e-5)
    for t in leaves.values():
        t.requires_grad_()
    loss().backward()
    wanted = sum(float((t.grad * probe.noise(name, t)).sum()) for name, t in leaves.items())
    assert abs(d - wanted) <= 1e-6 * max(1, abs(wanted)), (d, wanted)


def test_looking_does_not_drift_and_a_seed_is_a_result():
    leaves, probe = {"scale": torch.randn(40, 8)}, Probe()
    before = leaves["scale"].clone()
    for seed in range(2000):
        slope(lambda: probe("scale", leaves["scale"]).sum(), probe, seed, 1e-3)
        descend(leaves, probe, seed, 1.0, {"scale": 0.0}, 5.0)
    assert torch.equal(leaves["scale"], before)
    runs = [learn(clip=5.0, steps=50, spikes=False, seed=s)[1] for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_no_noise_is_alive_between_two_looks():
    alive = []

    class Watched(Probe):
        def noise(self, name, like):
            z = super().noise(name, like)
            alive.append(weakref.ref(z))
            return z

    probe, leaf = Watched(), torch.zeros(300, 300)

    def loss():
        gc.collect()
        assert all(z() is None for z in alive)
        return probe("leaf", leaf).sum()

    slope(loss, probe, 1, 1e-3)
    assert len(alive) == 2 and all(z() is None for z in alive)


@pytest.fixture(scope="module")
def wide():
    teacher = net(width=256)
    student = qgen.quantize(
        copy.deepcopy(teacher), Recipe(Spec("int4_g64", "int4_g64")), calibration=net_calls(), progress=False
    )
    qgen.prepare(student, "reference")
    return student, teacher


def test_memory_is_that_of_inference(wide):
    """Peak of bytes made in a step, against that of a call without gradients and of a step with a backward pass."""
    module, teacher = wide
    call = net_calls(1).calls[0]

    def peak(run):
        with Peak() as seen:
            run()
        return seen.most

    with torch.no_grad():
        call.run(module)  # fills tables of number formats
        inference = peak(lambda: call.run(module))
    method, student = QZO(share="row"), Student(module, teacher)
    lessons = Lessons(CalibrationSet((call,)), teacher)
    lessons.want(0)
    method.open(student, lessons)
    student.wear()
    scales = sum(leaf.nbytes for leaf in student.leaves().values())

    def loss():
        return lessons.loss(module, 0, method.distance)

    method.step(student, loss, 0, 1.0)
    zeroth = peak(lambda: method.step(student, loss, 1, 1.0))
    backward = peak(lambda: loss().backward())
    student.close()
    assert zeroth <= 1.05 * inference + scales, (zeroth, inference, scales)
    assert backward > 2 * zeroth, (backward, zeroth)


def test_codes_stay_and_scales_are_positive(wide):
    module, teacher = copy.deepcopy(wide[0]), wide[1]
    for layer in module.modules():
        if hasattr(layer, "canonical"):
            layer.scales.mul_(1.15)
    layers = {p: m.canonical() for p, m in module.named_modules() if hasattr(m, "canonical")}
    qgen.finetune(module, teacher, QZO(rate=0.05), steps=60, calibration=net_calls(), progress=False)
    told = module.qgen_tuning
    assert told["held"][told["best"]] < 0.7 * told["held"][0], told["held"]
    moved = False
    for path, before in layers.items():
        now = module.get_submodule(path).canonical()
        assert torch.equal(now["codes"], before["codes"]) and bool((now["scales"] > 0).all())
        moved |= not torch.equal(now["scales"], before["scales"])
    assert moved


def test_a_layer_without_float_scales_is_left_alone():
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    student = qgen.quantize(copy.deepcopy(module), Recipe(Spec("vq2_d4")), progress=False)
    with pytest.raises(ValueError, match="scale that is a float"):
        qgen.finetune(student, module, "qzo", steps=1, calibration=[torch.randn(4, 64)] * 4, progress=False)
    first(student(torch.randn(2, 64)))
