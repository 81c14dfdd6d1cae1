"""Layers that read one input quantize it once: counted, and the same numbers as without."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import qgen
from qgen.errors import NoKernel
from qgen.kernels import registry
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.nn import kept
from qgen.nn.lora import append_rank, cut_rank
from qgen.nn.packed import Packed
from tests import tiny

FAMILIES = ("pixart", "flux", "sd3", "wan", "llama", "t5")
CONVOLUTIONS = tuple(qgen.Rule("*", None, kind=f"conv{d}d") for d in (1, 2, 3))
PLAIN = qgen.Recipe(qgen.Spec("int4_g64", "int4_g64"), CONVOLUTIONS, "plain")


def quantized(name, recipe=PLAIN, kernel=None):
    model = qgen.quantize(tiny.FAMILIES[name][0](), recipe, calibration=tiny.calls(name), progress=False)
    qgen.prepare(model, kernel)
    return model


def shared(run: Callable):
    with torch.no_grad():
        return run()


def unshared(run: Callable, monkeypatch):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("qgen.nn.packed.keeps", lambda x: False)
        return run()


@pytest.fixture
def counted(monkeypatch):
    """A list that grows by one with each activation that the reference kernel quantizes in its own half."""
    made = []
    kernel = registry.find("linear", "reference")

    def quantize(x, slots):
        made.append(x)
        return kernel.quantize(x, slots)

    monkeypatch.setitem(registry.kernels._items, "linear/reference", replace(kernel, quantize=quantize))
    return made


def inputs_of(model, call):
    """Distinct inputs (tensor object and version) of packed layers in one run, and how many layers there were."""
    seen, layers, hooks = [], [], []

    def look(layer, args, kwargs):
        x = args[0]
        layers.append(layer)
        if not any(x is y and x._version == version for y, version in seen):
            seen.append((x, x._version))  # kept alive, so that no other tensor can be taken for it

    for layer in model.modules():
        if isinstance(layer, Packed) and layer.act_format:
            hooks.append(layer.register_forward_pre_hook(look, with_kwargs=True))
    with torch.no_grad():
        call.run(model)
    for hook in hooks:
        hook.remove()
    return len(seen), len(layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_quantizations_as_inputs(name, counted):
    model, call = quantized(name, kernel="reference"), tiny.FAMILIES[name][1](7)
    distinct, layers = inputs_of(model, call)
    assert distinct < layers  # q, k and v at least
    counted.clear()
    with torch.no_grad():
        call.run(model)
    assert len(counted) == distinct


@pytest.mark.parametrize("kernel", ["reference", "cpu_dequant", None])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_bits_as_one_by_one(name, kernel, monkeypatch):
    model, call = quantized(name, kernel=kernel), tiny.FAMILIES[name][1](7)
    together = shared(lambda: tiny.first(call.run(model)))
    assert torch.equal(together, unshared(lambda: tiny.first(call.run(model)), monkeypatch))


def layers(spec, dtype, seed=0, n=(64, 96, 32), k=128):
    """Packed layers that smooth one input alike, with ranks of their own if the recipe has them."""
    torch.manual_seed(seed)

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(k, width) for width in n)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Three()])

        @property
        def parts(self):
            return (self.blocks[0].q, self.blocks[0].k, self.blocks[0].v)

        def forward(self, x):
            return self.blocks[0](x)

    model = Blocks().to(dtype).requires_grad_(False)
    scale = torch.exp(torch.randn(k))
    calls = [((torch.randn(1, 48, k) * scale).to(dtype),) for _ in range(6)]
    model = qgen.quantize(model, qgen.Recipe(spec), calibration=[c[0] for c in calls], progress=False)
    return model, calls[0][0]


SPECS = {
    "w4a8, native": ("int4_s8_g64", "int8_row", "cpu_native"),
    "w4a8, int8": ("int4_s8_g64", "int8_row", "cpu_int8"),
    "w8a8": ("int8_row", "int8_row", None),
    "w4a4": ("int4_g64", "uint4_g64", "cpu_native_bf16"),
    "w4a4, reference": ("int4_g64", "uint4_g64", "reference"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("share", [True, "smoothing"])
def test_common_smoothing_and_rank_to_rounding(case, dtype, share, monkeypatch):
    """Both ways to share leave equal `smooth` in all three layers; outputs differ by no more than sums in another order."""
    weight, act, kernel = SPECS[case]
    methods = (Smooth(), LowRank(16))
    model, x = layers(qgen.Spec(weight, act, methods, share=share), dtype)
    try:
        qgen.prepare(model, kernel)
    except NoKernel as error:
        pytest.skip(f"this processor does not run {kernel}: {error}")
    together = shared(lambda: model(x))
    apart = unshared(lambda: model(x), monkeypatch)
    assert len({part._quantizes_as(("smooth",)) for part in model.parts}) == 1
    relative = float((together - apart).float().norm() / apart.float().norm())
    assert relative < (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_three_layers_quantize_once_and_again_after_a_write(counted):
    methods = (Smooth(),)
    model, x = layers(qgen.Spec("int4_g64", "int4_g64", methods, share="smoothing"), torch.float32)
    qgen.prepare(model, "reference")
    with torch.no_grad():
        first = model(x)
        assert len(counted) == 1
        assert torch.equal(model(x), first) and len(counted) == 1  # x lives on, so do its codes
        x.mul_(2)  # another version
        doubled = model(x)
        assert len(counted) == 2 and not torch.equal(doubled, first)
        assert torch.equal(model(x.clone()), doubled) and len(counted) == 3
        model.parts[1](x)
        assert len(counted) == 3  # a clone does not carry codes, x still does


def test_another_smoothing_is_another_quantization(counted):
    methods = (Smooth(),)
    model, x = layers(qgen.Spec("int4_g64", "int4_g64", methods, share="smoothing"), torch.float32)
    qgen.prepare(model, "reference")
    layer = model.parts[1]
    slots = layer.canonical()
    layer.fill({**slots, "smooth": slots["smooth"] * 2})
    layer.prepare("reference")
    with torch.no_grad():
        model(x)
    assert len(counted) == 3  # first, another, and the third finds the second's


def test_nothing_is_kept_in_inference_mode_nor_for_gradients(counted):
    model, x = layers(qgen.Spec("int4_g64", "int4_g64"), torch.float32)
    qgen.prepare(model, "reference")
    with torch.inference_mode():
        made = model(torch.ones_like(x))
    wanted = x.clone().requires_grad_()
    model(wanted).sum().backward()
    assert not counted and made.isfinite().all() and wanted.grad.abs().sum() > 0
    assert not hasattr(x, kept._NAME) and not hasattr(wanted, kept._NAME)


def test_lora_on_one_of_the_layers_and_off_again(counted):
    model, x = layers(qgen.Spec("int4_g64", "int4_g64"), torch.float32)
    qgen.prepare(model, "reference")
    with torch.no_grad():
        before, others = model(x.clone()), copy.deepcopy(model)
        counted.clear()
        a, b = torch.randn(4, 128) / 12, torch.randn(96, 4)
        append_rank(model.parts[1], [(a, b)])
        got = model(y := x.clone())
        assert len(counted) == 1  # the branch sees the raw input
        change = (got - before)[..., 64:160]
        assert torch.allclose(change, y @ a.T @ b.T, atol=2e-2) and torch.equal(got[..., :64], before[..., :64])
        cut_rank(model.parts[1])
        assert torch.equal(model(x.clone()), before) and list(others.state_dict()) == list(model.state_dict())


def test_saved_and_loaded_layers_share_as_well(tmp_path, counted):
    model, call = quantized("wan", kernel="reference"), tiny.FAMILIES["wan"][1](7)
    distinct, _ = inputs_of(model, call)
    want = shared(lambda: tiny.first(call.run(model)))
    names = list(model.state_dict())
    qgen.save(model, tmp_path)
    loaded = qgen.load(tmp_path, into=tiny.FAMILIES["wan"][0]())
    qgen.prepare(loaded, "reference")
    counted.clear()
    assert torch.equal(shared(lambda: tiny.first(call.run(loaded))), want)
    assert len(counted) == distinct and list(loaded.state_dict()) == names


def test_compiled_without_keeping():
    model, call = quantized("pixart"), tiny.FAMILIES["pixart"][1](7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(tiny.first(call.run(compiled)), tiny.first(call.run(model)))
