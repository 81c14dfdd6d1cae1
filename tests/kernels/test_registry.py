"""Which kernel serves: priorities, refusals with every reason, forcing, exact pack/unpack of every registered kernel."""

import itertools

import pytest
import torch

from qgen import formats
from qgen.errors import NoKernel
from qgen.kernels import registry
from qgen.kernels.registry import Ask, Kernel, Needs

ASK = Ask("linear", "cpu", "int4_g64", "int4_g64", torch.bfloat16, 96, 256, 32)


@pytest.mark.parametrize(
    "needs, ask, words",
    [
        (Needs(devices=("cuda",)), ASK, "runs on cuda, not cpu"),
        (
            Needs(devices=("cuda",), capability=((10, 0), (12, 1))),
            Ask("linear", "cuda", capability=(8, 9)),
            "needs capability 10.0 to 12.1, found 8.9",
        ),
        (Needs(archs=("gfx942",)), Ask("linear", "hip", capability="gfx1100"), "serves gfx942, found gfx1100"),
        (Needs(weights=("nvfp4",)), ASK, "serves weights in nvfp4, asked int4_g64"),
        (Needs(acts=("", "int8_row")), ASK, "serves activations in float/int8_row, asked int4_g64"),
        (Needs(acts=("int8_row",)), Ask("linear", "cpu"), "asked float"),
        (Needs(dtypes=(torch.float16,)), ASK, "serves float16, asked bfloat16"),
        (Needs(k_multiple=512), ASK, "needs K divisible by 512, found 256"),
        (Needs(n_multiple=64), ASK, "needs N divisible by 64, found 96"),
        (Needs(rank_multiple=48), ASK, "needs rank divisible by 48, found 32"),
        (
            Needs(refuses=frozenset({"shift"})),
            Ask("linear", "cpu", traits=frozenset({"shift", "bias"})),
            "cannot do shift",
        ),
        (
            Needs(hadamards=(64, 128)),
            Ask("linear", "cpu", traits=frozenset({"hadamard"}), hadamard=512),
            "serves block transforms of 64/128, asked 512",
        ),
        (
            Needs(statics=()),
            Ask("linear", "cpu", static="tensor"),
            "of activations computed on the fly, asked one per tensor",
        ),
        (Needs(statics=("tensor",)), Ask("linear", "cpu", static="block"), "stored per tensor, asked one per block"),
        (
            Needs(package="no_such_package_here"),
            ASK,
            "needs the package 'no_such_package_here', which is not installed",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_refusal_one_reason(needs, ask, words):
    (why,) = needs.refusals(ask)
    assert words in why


def test_everything_is_served_by_no_needs():
    assert Needs().refusals(ASK) == [] and Needs(package="torch").refusals(ASK) == []


def test_extras_that_are_served_or_not_asked_for():
    needs = Needs(hadamards=(64,), statics=("tensor",))
    assert needs.refusals(ASK) == []
    assert needs.refusals(Ask("linear", "cpu", hadamard=64, static="tensor")) == []
    assert Needs().refusals(Ask("linear", "cpu", hadamard=4096, static="block")) == []


def test_an_ask_says_its_extras():
    text = str(Ask("linear", "cuda", "int4_g64", k=64, n=8, capability=(8, 0), hadamard=128, static="block"))
    assert text == "linear(int4_g64 x float, K=64, N=8, bfloat16, Hadamard 128, static scales per block) on cuda sm_80"


@pytest.fixture
def toys(monkeypatch):
    """An op of its own with three kernels, gone after the test."""
    monkeypatch.setattr(registry.kernels, "_items", dict(registry.kernels._items))
    for name, needs, priority in (
        ("slow", Needs(), -5),
        ("quick", Needs(k_multiple=64), 5),
        ("gpu", Needs(devices=("cuda",)), 50),
    ):
        registry.register(Kernel("toy", name, needs, run=len, priority=priority))


def toy(**changes):
    return Ask(**{"op": "toy", "device": "cpu", "weight": "int4_g64", "n": 64, "k": 128, **changes})


def test_highest_priority_that_can_serve(toys):
    assert registry.choose(toy()).name == "quick"
    assert registry.choose(toy(k=100)).name == "slow"
    assert registry.choose(toy(device="cuda", capability=(9, 0))).name == "gpu"


def test_prefer_and_use(toys):
    assert registry.choose(toy(), "slow").name == "slow"
    with registry.use("slow"):
        assert registry.choose(toy()).name == "slow"
        with registry.use("quick"):
            assert registry.choose(toy()).name == "quick"
        assert registry.choose(toy()).name == "slow"
    assert registry.choose(toy()).name == "quick"


def test_preferred_kernel_that_cannot_serve_says_why_and_lists_the_others(toys):
    with pytest.raises(NoKernel) as error:
        registry.choose(toy(), "gpu")
    text = str(error.value)
    assert "gpu was asked for, but runs on cuda, not cpu" in text
    assert "quick" in text and "available (priority 5)" in text


def test_no_kernel_lists_every_refusal(toys):
    registry.kernels._items.pop("toy/slow")
    with pytest.raises(NoKernel) as error:
        registry.choose(toy(k=100))
    lines = str(error.value).splitlines()
    assert lines[0] == "toy(int4_g64 x float, K=100, N=64, bfloat16) on cpu"
    assert "runs on cuda, not cpu" in lines[1] and "needs K divisible by 64, found 100" in lines[2]


def test_unknown_name_suggests(toys):
    with pytest.raises(
        ValueError, match=r"unknown kernel of toy 'quik' \(did you mean 'quick'\?\); known: gpu, quick, slow"
    ):
        registry.find("toy", "quik")


def test_a_name_is_taken_once(toys):
    with pytest.raises(ValueError, match="'toy/slow' is registered already"):
        registry.register(Kernel("toy", "slow", Needs(k_multiple=2), run=len))


def test_reference_serves_every_format_on_the_cpu():
    for name in formats.formats:
        assert "reference" in registry.explain(Ask("linear", "cpu", name, "", torch.float32, 7, 256))
        assert registry.choose(Ask("linear", "cpu", name, "", torch.float32, 7, 256), "reference").name == "reference"


PAIRS = [
    ("int4_g64", "int4_g64"), ("int4_g64", "uint4_g64"), ("nvfp4", "nvfp4_dynamic"), ("mxfp4", "mxfp4"), ("int4_s8_g64", "int8_row"),
    ("int4_g64", ""), ("int8_row", "int8_row"),
]  # fmt: skip
PLACES = (("cpu", None), ("cuda", (8, 9)), ("cuda", (10, 0)), ("hip", "gfx942"))


def served():
    """(kernel, ask) for everything that a registered kernel would serve here or as if on a GPU."""
    for key, kernel in registry.kernels.items():
        for (weight, act), (device, capability) in itertools.product(PAIRS, PLACES):
            ask = Ask("linear", device, weight, act, torch.bfloat16, 256, 512, 32, capability)
            if key.startswith("linear/") and not kernel.needs.refusals(ask):
                arch = "" if capability is None else f"-{capability}"
                yield pytest.param(kernel, ask, id=f"{kernel.name}-{weight}-{act or 'float'}-{device}{arch}")


@pytest.mark.parametrize("kernel, ask", list(served()))
def test_pack_and_unpack_are_exact_inverses(kernel, ask):
    """Layouts are bijections, also those of kernels that cannot run here."""
    weight = ask.weight
    q = formats.get(weight).quantize(torch.randn(256, 512))
    slots = {
        "codes": q.codes,
        "scales": q.scales,
        "global_scale": q.global_scale,
        "zero": q.zero,
        "smooth": torch.rand(512) + 0.5,
        "down": torch.randn(32, 512).bfloat16(),
        "up": torch.randn(256, 32).bfloat16(),
        "bias": torch.randn(256).bfloat16(),
    }
    slots = {n: t for n, t in slots.items() if t is not None}
    back = kernel.unpack(kernel.pack(dict(slots), ask), ask)
    assert set(back) == set(slots)
    for slot, t in slots.items():
        assert back[slot].dtype == t.dtype and torch.equal(
            back[slot].flatten().view(torch.uint8), t.flatten().view(torch.uint8)
        ), slot
