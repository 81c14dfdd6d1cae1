"""CPU kernels against the reference on the same codes: every format, every extra, shapes that hurt."""

import pytest
import torch

from qgen import formats
from qgen.kernels import cpu_codes, cpu_compile, cpu_int8, cpu_native, reference
from qgen.kernels.ops import SLOTS
from qgen.kernels.registry import Ask, choose, explain, find, kernels

NAMES = ("cpu_dequant", "cpu_int8", "cpu_native", "cpu_native_bf16")
PAIRS = (
    *(("int4_s8_g64", "int8_row"), ("int4_s8_g32", "int8_row"), ("int4_s8_g128", "int8_row"), ("int8_row", "int8_row")),
    *(
        ("int4_g64", ""),
        ("int4_g64", "int4_g64"),
        ("int4_g64", "uint4_g64"),
        ("uint4_g128", ""),
        ("uint4_row", "uint4p_g32"),
    ),
    *(("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp8_e4m3_row", ""), ("int4_s8_g64", "")),
)
CASES = [
    (name, weight, act)
    for name in NAMES
    for weight, act in PAIRS
    if weight in (find("linear", name).needs.weights or (weight,))
    and act in (find("linear", name).needs.acts or (act,))
]


def layer(m, k, n, weight, act, dtype, rank=32, extras=("smooth", "shift", "bias")):
    """Input, canonical slots and the request of one random layer."""
    x = (torch.randn(m, k) * (3 * torch.rand(m, 1) + 0.1)).to(dtype)
    kp = formats.padded(k, weight, act)
    q = formats.get(weight).quantize(torch.nn.functional.pad(torch.randn(n, k), (0, kp - k)))
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero}
    if rank:
        slots |= {"down": (torch.randn(rank, k) / k**0.5).to(dtype), "up": (3 * torch.randn(n, rank)).to(dtype)}
    floats = {"smooth": torch.rand(k) + 0.2, "shift": torch.tensor(0.171875), "bias": torch.randn(n)}
    slots |= {name: floats[name].to(dtype) for name in extras}
    slots = {name: t for name, t in slots.items() if t is not None}
    traits = frozenset((*extras, "lowrank") if rank else extras)
    return x, slots, Ask("linear", "cpu", weight, act, dtype, n, k, rank, None, traits)


def run(name, x, slots, ask, hadamard=0):
    kernel = find("linear", name)
    packed = {slot: t.contiguous() for slot, t in kernel.pack(slots, ask).items()}
    return torch.ops.qgen.linear(x, *[packed.get(slot) for slot in SLOTS], ask.weight, ask.act, ask.n, hadamard, name)


def close(y, truth, limit):
    """Relative RMS within `limit` and no element off by more than five times that."""
    y, truth = y.float(), truth.float()
    rms = truth.square().mean().sqrt()
    assert ((y - truth).square().mean().sqrt() / rms).item() <= limit
    assert ((y - truth).abs() / torch.maximum(truth.abs(), rms)).max().item() <= 5 * limit


def served(name, ask):
    why = find("linear", name).needs.refusals(ask)
    if why:
        pytest.skip(f"{name} {'; '.join(why)}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "f32", "f16"])
@pytest.mark.parametrize(("name", "weight", "act"), CASES, ids=[f"{n}-{w}-{a or 'float'}" for n, w, a in CASES])
def test_matches_reference(name, weight, act, dtype):
    for m, k, n, rank in ((63, 200, 136, 32), (40, 1152, 70, 8), (1, 64, 10, 16), (7, 264, 64, 0)):
        x, slots, ask = layer(m, k, n, weight, act, dtype, rank)
        served(name, ask)
        limit = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]
        close(run(name, x, slots, ask), run("reference", x, slots, ask), limit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extras", [(), ("bias",), ("smooth",), ("shift",)], ids=["none", "bias", "smooth", "shift"])
def test_extras_alone(name, extras):
    x, slots, ask = layer(50, 192, 96, "int4_s8_g64", "int8_row", torch.float32, 0, extras)
    served(name, ask)
    close(run(name, x, slots, ask), run("reference", x, slots, ask), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shift_per_column_static_scale_and_low_rank_in_another_dtype(name):
    x, slots, ask = layer(34, 128, 80, "int4_s8_g64", "int8_row", torch.bfloat16, 16)
    served(name, ask)
    slots |= {"shift": torch.randn(128).bfloat16(), "act_scale": torch.tensor([0.03])}
    close(run(name, x, slots, ask), run("reference", x, slots, ask), 4e-3)
    close(run(name, x.float(), slots, ask), run("reference", x.float(), slots, ask), 1e-5)


@pytest.mark.parametrize("name", ["cpu_dequant", "cpu_int8", "cpu_native_bf16"])
def test_hadamard(name):
    x, slots, ask = layer(34, 128, 80, "int4_s8_g64", "int8_row", torch.float32)
    served(name, ask)
    close(run(name, x, slots, ask, 64), run("reference", x, slots, ask, 64), 1e-5)


@pytest.mark.parametrize("quantize", [cpu_int8.quantize, cpu_native.quantize], ids=["cpu_int8", "cpu_native"])
def test_int8_codes_are_the_references(quantize):
    if quantize is cpu_native.quantize and (why := cpu_compile.unavailable()):
        pytest.skip(f"cpu_native {why}")
    x = torch.randn(70, 200) * torch.logspace(-30, 30, 70)[:, None]
    x[3] = 0
    x[4, 7] = float("nan")
    x[5, 8] = float("inf")
    x[6] = torch.arange(200) - 63.5  # scale 136.5 / 127: no ties
    x[7] = (torch.arange(200) % 128 - 0.5).clamp(max=127)  # ties at every half
    x[7, 0] = 127
    x[8] = 1e-44
    truth = reference.quantize_act(x, "int8_row")
    codes, step = quantize(x)
    assert torch.equal(step, truth.scales)
    assert torch.equal(codes.view(torch.uint8), truth.codes)


def test_native_codes_after_smoothing_and_shift():
    if why := cpu_compile.unavailable():
        pytest.skip(f"cpu_native {why}")
    x, slots, _ = layer(33, 200, 8, "int4_s8_g64", "int8_row", torch.bfloat16)
    truth = reference.quantize_act(reference.transform_act(x, 256, slots["smooth"], slots["shift"], 0), "int8_row")
    codes, step = cpu_native.quantize(x, slots["smooth"], slots["shift"], kp=256)
    assert torch.equal(step, truth.scales)
    assert torch.equal(codes.view(torch.uint8), truth.codes)


@pytest.mark.parametrize("act", ["int4_g64", "uint4_g64", "uint4p_g32", "int8_row", "uint8_g128", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_fake_act_equals_the_references_codes(act, static):
    if static and act in ("nvfp4", "mxfp4"):
        pytest.skip("static scales of these formats are no plain floats")
    x = torch.randn(20, 256) * torch.logspace(-3, 3, 20)[:, None]
    x[2] = 0
    scale = torch.tensor(0.3) if static else None
    assert torch.equal(cpu_codes.fake_act(x, act, scale), reference.quantize_act(x, act, scale).dequantize())


def test_weight_by_table_is_exact_in_float32():
    for name, fmt in formats.formats.items():
        q = fmt.quantize(torch.randn(24, 256))
        args = (q.codes, q.scales, q.global_scale, q.zero, name)
        assert torch.equal(cpu_codes.weight(*args, torch.float32), reference.weight(*args)), name
        assert torch.equal(cpu_codes.weight(*args, torch.bfloat16), reference.weight(*args).bfloat16()), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("rank", [0, 8, 32])
@pytest.mark.parametrize("weight", ["int4_s8_g64", "int8_row"])
def test_pack_round_trip(name, weight, rank, dtype):
    _, slots, ask = layer(1, 192, 100, weight, "int8_row", dtype, rank)
    kernel = find("linear", name)
    back = kernel.unpack({slot: t.contiguous() for slot, t in kernel.pack(slots, ask).items()}, ask)
    assert back.keys() == slots.keys()
    assert all(torch.equal(back[slot], slots[slot]) for slot in slots)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_inputs_untouched(name):
    x, slots, ask = layer(65, 192, 100, "int4_s8_g64", "int8_row", torch.bfloat16)
    served(name, ask)
    before = {slot: t.clone() for slot, t in slots.items()}, x.clone()
    first, second = run(name, x, slots, ask), run(name, x, slots, ask)
    assert torch.equal(first, second)
    assert torch.equal(x, before[1]) and all(torch.equal(slots[slot], before[0][slot]) for slot in slots)


def test_native_does_not_depend_on_threads():
    x, slots, ask = layer(301, 192, 200, "int4_s8_g64", "int8_row", torch.bfloat16)
    served("cpu_native", ask)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu_native", x, slots, ask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_the_input(name):
    x, slots, ask = layer(48, 192, 100, "int4_s8_g64", "int8_row", torch.float32)
    served(name, ask)
    flat = run(name, x, slots, ask)
    assert torch.equal(run(name, x.view(2, 24, 192), slots, ask), flat.view(2, 24, 100))
    strided = torch.randn(192, 48).T.copy_(x)
    assert torch.equal(run(name, strided, slots, ask), flat)
    assert run(name, x[:0], slots, ask).shape == (0, 100)
    assert run(name, x[0], slots, ask).shape == (100,)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name):
    x, slots, ask = layer(20, 128, 64, "int4_s8_g64", "int8_row", torch.float32)
    served(name, ask)
    kernel = find("linear", name)
    packed = {slot: t.contiguous() for slot, t in kernel.pack(slots, ask).items()}

    def call(x):
        return torch.ops.qgen.linear(x, *[packed.get(s) for s in SLOTS], ask.weight, ask.act, ask.n, 0, name) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


def test_auto_takes_the_quickest_that_serves(monkeypatch):
    _, _, ask = layer(1, 192, 64, "int4_s8_g64", "int8_row", torch.bfloat16)
    monkeypatch.setattr(cpu_compile, "unavailable", lambda: "")
    assert choose(ask).name == "cpu_native"
    monkeypatch.setattr(
        cpu_compile, "unavailable", lambda: "needs a C++ compiler (c++, g++ or clang++ on the PATH), found none"
    )
    monkeypatch.setattr(cpu_codes, "has_int8", lambda: True)
    assert choose(ask).name == "cpu_int8"
    assert "needs a C++ compiler" in explain(ask)
    monkeypatch.setattr(cpu_codes, "has_int8", lambda: False)
    assert choose(ask).name == "cpu_dequant"
    assert "needs a processor with avx512_vnni" in explain(ask)


@pytest.fixture
def nothing_built():
    """Nothing is remembered of earlier builds, nor of those of the test."""
    remembered = (cpu_compile._load, cpu_compile.compiled)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def test_no_compiler_is_said_plainly(monkeypatch, nothing_built):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu_compile.shutil, "which", lambda name: None)
    library, why = cpu_compile._load()
    assert library is None
    assert "C++ compiler" in why or "Linux only" in why


def test_a_failed_build_is_said_plainly(monkeypatch, tmp_path, nothing_built):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\ntest \"$1\" = --version && exit 0\necho 'fatal: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library, why = cpu_compile._load()
    assert library is None
    assert "no such instruction" in why or "Linux only" in why


def test_cpu_kernels_refuse_other_devices():
    for _, kernel in kernels.items():
        if kernel.name in NAMES:
            assert kernel.needs.refusals(
                Ask("linear", "cuda", "int4_s8_g64", "int8_row", n=64, k=64, capability=(9, 0))
            )
