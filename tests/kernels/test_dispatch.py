"""Which kernel a layer gets, for capabilities that need not be here: the table that the README's promises rest on."""

from dataclasses import replace

import pytest
import torch

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, doctor, registry
from qgen.kernels.registry import Ask, choose

pytest.importorskip("triton", reason="most kernels are written in Triton, which is not installed")

VOLTA = [(7, 5)]
AMPERE = [(8, 0), (8, 6), (8, 7)]
ADA, HOPPER = [(8, 9)], [(9, 0)]
BLACKWELL = [(10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
CUDA = VOLTA + AMPERE + ADA + HOPPER + BLACKWELL
NEWER = AMPERE + ADA + HOPPER + BLACKWELL  # what Triton compiles for

# (weight, activations) -> {capabilities: kernel}; what is not listed gets the reference.
TABLE = {
    ("int4_s8_g64", "int8_row"): ("triton_w4s_a8", NEWER),
    ("int8_row", "int8_row"): ("triton_w8a8", NEWER),
    ("int4_g64", "int8_row"): ("triton_w4a8", NEWER),
    ("int4_g64", "int4_g64"): ("triton_w4a4", NEWER),
    ("int4_g64", "uint4_g64"): ("triton_w4a4", NEWER),
    ("int4_g64", ""): ("triton_w4a16", NEWER),
    ("nvfp4", "nvfp4_dynamic"): ("triton_nvfp4", BLACKWELL),
    ("mxfp4", "mxfp4"): ("triton_mxfp4", BLACKWELL),
    ("fp8_e4m3_row", "fp8_e4m3_row"): ("scaled_mm_fp8", ADA + HOPPER + BLACKWELL),
}


def ask(weight, act, capability, device="cuda", **changes):
    traits = frozenset({"smooth", "lowrank", "bias"})
    return Ask("linear", device, weight, act, torch.bfloat16, 12288, 3072, 32, capability, traits, **changes)


def arch(capability):
    return capability if isinstance(capability, str) else "sm_{}{}".format(*capability)


@pytest.mark.parametrize("capability", CUDA, ids=arch)
@pytest.mark.parametrize("formats", TABLE, ids=lambda f: f"{f[0]}-{f[1] or 'float'}")
def test_linear_on_cuda(formats, capability):
    kernel, where = TABLE[formats]
    assert choose(ask(*formats, capability)).name == (kernel if capability in where else "reference")


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "gfx1201"])
@pytest.mark.parametrize("formats", TABLE, ids=lambda f: f"{f[0]}-{f[1] or 'float'}")
def test_linear_on_amd(formats, arch):
    kernel = choose(ask(*formats, arch, "hip")).name
    plain = {"triton_w4s_a8", "triton_w8a8", "triton_w4a8", "triton_w4a4", "triton_w4a16"}  # no inline PTX on AMD
    assert kernel == (TABLE[formats][0] if TABLE[formats][0] in plain else "reference")


def test_linear_on_amd_that_was_not_compiled():
    wanted = ask("int4_s8_g64", "int8_row", "gfx1030", "hip")
    assert choose(wanted).name == "reference"
    with pytest.raises(NoKernel, match="serves gfx942/gfx1100/gfx1201, found gfx1030"):
        choose(wanted, prefer="triton_w4s_a8")


@pytest.mark.parametrize("formats", TABLE, ids=lambda f: f"{f[0]}-{f[1] or 'float'}")
def test_linear_on_the_cpu_leaves_gpu_kernels_alone(formats):
    kernel = choose(ask(*formats, None, "cpu"))
    assert kernel.name == "reference" or kernel.needs.devices == ("cpu",)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0)], ids=arch)
@pytest.mark.parametrize("name", ["triton_nvfp4", "scaled_mm_nvfp4"])
def test_fp4_is_refused_before_blackwell(name, capability):
    with pytest.raises(NoKernel) as error:
        choose(ask("nvfp4", "nvfp4_dynamic", capability), prefer=name)
    text = str(error.value)
    assert f"{name} was asked for" in text and "needs capability 10.0 to 12.1, found {}.{}".format(*capability) in text
    assert "reference        available" in text, "says what would serve"


@pytest.mark.parametrize("capability", [(7, 5), *HOPPER, *BLACKWELL], ids=arch)
def test_int4_tensor_cores_are_refused_where_emulated(capability):
    with pytest.raises(NoKernel, match=r"gluon_int4 was asked for, but needs capability 8\.0 to 8\.9"):
        choose(ask("int4_g64", "int4_g64", capability), prefer="gluon_int4")


@pytest.mark.parametrize("capability", AMPERE + ADA, ids=arch)
def test_int4_tensor_cores_only_by_name(capability):
    wanted = ask("int4_g64", "int4_g64", capability)
    assert choose(wanted).name != "gluon_int4"
    assert choose(wanted, prefer="gluon_int4").name == "gluon_int4"
    with registry.use("gluon_int4"):
        assert choose(wanted).name == "gluon_int4"


def test_int4_tensor_cores_never_by_default():
    """Even where nothing but the reference could serve."""
    others = [k.priority for _, k in registry.kernels.items() if k.op == "linear" and k.name != "gluon_int4"]
    assert registry.find("linear", "gluon_int4").priority < min(others)


@pytest.mark.parametrize("name, multiple", [("triton_nvfp4", 8), ("scaled_mm_nvfp4", 16), ("scaled_mm_fp8", 16)])
def test_odd_shapes_fall_to_the_reference(name, multiple):
    formats = ("fp8_e4m3_row",) * 2 if "fp8" in name else ("nvfp4", "nvfp4_dynamic")
    odd = Ask("linear", "cuda", *formats, torch.bfloat16, n=12, k=3072, capability=(12, 0))
    assert choose(odd).name == "reference"
    with pytest.raises(NoKernel, match=f"needs N divisible by {multiple}, found 12"):
        choose(odd, prefer=name)


def test_static_scales_are_refused_where_not_computed():
    static = Ask(
        "linear", "cuda", "nvfp4", "nvfp4_dynamic", n=64, k=64, capability=(12, 0), traits=frozenset({"static_act"})
    )
    with pytest.raises(NoKernel, match="cannot do static_act"):
        choose(static, prefer="triton_nvfp4")


@pytest.mark.parametrize("size", [96, 512])
@pytest.mark.parametrize("name", ["triton_w4s_a8", "triton_nvfp4", "gluon_int4"])
def test_transforms_that_are_not_fused_are_refused_by_size(name, size):
    formats = {"triton_w4s_a8": ("int4_s8_g64", "int8_row"), "triton_nvfp4": ("nvfp4", "nvfp4_dynamic")}
    capability = (12, 0) if name == "triton_nvfp4" else (8, 9)
    wanted = ask(*formats.get(name, ("int4_g64", "int4_g64")), capability, hadamard=size)
    with pytest.raises(NoKernel, match=rf"serves block transforms of 16/32/64/128/256, asked {size}"):
        choose(wanted, prefer=name)
    assert choose(replace(wanted, hadamard=128), prefer=name).name == name


def test_static_scales_per_tensor_are_served_in_eight_bits():
    static = ask("fp8_e4m3_tensor", "fp8_e4m3_tensor", (8, 9), static="tensor")
    assert choose(static).name == "scaled_mm_fp8"
    with pytest.raises(NoKernel, match="serves scales of activations stored per tensor, asked one per block"):
        choose(replace(static, static="block"), prefer="scaled_mm_fp8")


@pytest.mark.parametrize("op", ["fused_linear", "mlp"])
@pytest.mark.parametrize("capability", CUDA, ids=arch)
def test_fused_ops_follow_the_linear_kernels(capability, op):
    for formats, (kernel, where) in TABLE.items():
        chosen = choose(replace(ask(*formats, capability), op=op)).name
        fused = kernel not in ("triton_w4a16", "scaled_mm_fp8")
        assert chosen == (kernel if fused and capability in where else "reference")


ATTENTION = {
    (7, 5): None,
    (8, 0): "int8",
    (8, 6): "int8",
    (8, 9): "int8_fp8",
    (9, 0): "int8_fp8",
    (10, 0): "int8_fp8",
    (10, 3): "fp4_fp8",
    (12, 0): "int8_fp8",
    (12, 1): "int8_fp8",
}


@pytest.mark.parametrize("capability", ATTENTION, ids=arch)
def test_attention_default_has_a_kernel(capability):
    spec = attention_ops.default_spec(capability)
    assert spec == ATTENTION[capability]
    if spec:
        qk, pv = attention_ops.SPECS[spec]
        kernel = choose(Ask("attention", "cuda", qk, pv, torch.bfloat16, k=128, capability=capability))
        assert kernel.name == f"triton_{spec}"


def test_findings_name_the_better_kernel_and_its_reason():
    found = {f.what: f for f in doctor.findings(device="cuda", capability=(8, 9))}
    nvfp4 = found["4-bit floats (NVFP4)"]
    assert nvfp4.kernel == "reference"
    assert "triton_nvfp4 needs capability 10.0 to 12.1, found 8.9" in nvfp4.better
    assert not any("cpu" in reason for f in found.values() for reason in f.better)
    assert found["8-bit floats"].kernel == "scaled_mm_fp8" and not found["8-bit floats"].better
    assert found["4-bit weights, 8-bit activations"].fused == ("fused_linear", "mlp")
    assert nvfp4.fused == () and found["4-bit weights, 16-bit activations"].fused == ()
    assert all(f.fused == () for f in doctor.findings(device="cpu"))


def test_report_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = doctor.report({"mine": ("int8_row", "int8_row")})
    assert text.startswith("device    cpu") and f"torch {torch.__version__.partition('+')[0]}" in text
    expected = choose(Ask("linear", "cpu", "int8_row", "int8_row", n=12288, k=3072)).name
    assert any(line.split()[:2] == ["mine", expected] for line in text.splitlines())


def test_report_of_a_gpu(monkeypatch):
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "NVIDIA Test", 12, 0, 32 * 2**30, 170

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    text = doctor.report(device="cuda")
    assert "NVIDIA Test, sm_120, 32.0 GiB, 170 multiprocessors" in text
    assert "triton_nvfp4" in text and "triton_int8_fp8" in text
    lines = text.splitlines()
    served = next(i for i, line in enumerate(lines) if line.startswith("4-bit floats (NVFP4)"))
    assert lines[served + 1].strip().startswith("fused: norms, activations") and "MLPs in three" in lines[served + 1]
