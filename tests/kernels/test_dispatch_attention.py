"""Which attention kernel a call gets on cards that need not be here, and what is refused before anything is launched, and why."""

from dataclasses import replace

import pytest
import torch

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, registry, tuning
from qgen.kernels.attention_ops import AMD, HEAD_DIMS, SPECS, default_spec
from qgen.kernels.registry import Ask, choose

pytest.importorskip("triton", reason="most kernels are written in Triton, which is not installed")

CUDA = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
INT8 = {*CUDA} - {(7, 5), (10, 3)}
SERVED = {
    "int8": INT8,
    "int8_fp8": {c for c in INT8 if c >= (8, 9)},
    "fp4_fp8": {c for c in CUDA if c >= (10, 0)},
    "fp4": {c for c in CUDA if c >= (10, 0)},
}
DEFAULTS = {
    (7, 5): None, (8, 0): "int8", (8, 6): "int8", (8, 7): "int8", (8, 9): "int8_fp8", (9, 0): "int8_fp8", (10, 0): "int8_fp8",
    (10, 3): "fp4_fp8", (11, 0): "int8_fp8", (12, 0): "int8_fp8", (12, 1): "int8_fp8", "gfx942": "int8", "gfx1100": "int8",
    "gfx1201": "int8", "gfx90a": None, None: None,
}  # fmt: skip


def ask(spec, capability, device="cuda", d=128, dtype=torch.bfloat16, traits=()):
    qk, pv = SPECS[spec]
    return Ask("attention", device, qk, pv, dtype, k=d, capability=capability, traits=frozenset(traits))


@pytest.mark.parametrize("capability", CUDA, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_on_cuda(spec, capability):
    for d in HEAD_DIMS:
        for traits in ((), ("causal", "smooth_q", "hadamard"), ("mask",)):
            able = capability in SERVED[spec] and not (spec.startswith("fp4") and "mask" in traits)
            kernel = choose(ask(spec, capability, d=d, traits=traits))
            assert kernel.name == (f"triton_{spec}" if able else "reference")


@pytest.mark.parametrize("arch", [*AMD, "gfx90a", "gfx1030"])
@pytest.mark.parametrize("spec", SPECS)
def test_on_amd(spec, arch):
    able = spec == "int8" and arch in AMD
    assert choose(ask(spec, arch, "hip")).name == ("triton_int8" if able else "reference")


@pytest.mark.parametrize("spec", SPECS)
def test_on_the_cpu(spec):
    assert choose(ask(spec, None, "cpu")).name == "reference"


@pytest.mark.parametrize("capability", DEFAULTS, ids=str)
def test_default_has_a_kernel(capability):
    spec = default_spec(capability)
    assert spec == DEFAULTS[capability]
    if spec:
        device = "hip" if isinstance(capability, str) else "cuda"
        assert choose(ask(spec, capability, device)).name == f"triton_{spec}"


REFUSED = {
    "fp4-on-ada": ("fp4", (8, 9), {}, r"needs capability 10\.0 to 12\.1, found 8\.9"),
    "fp4-fp8-on-hopper": ("fp4_fp8", (9, 0), {}, r"needs capability 10\.0 to 12\.1, found 9\.0"),
    "fp8-on-ampere": ("int8_fp8", (8, 6), {}, r"needs capability 8\.9 to 12\.1, found 8\.6"),
    "int8-on-turing": ("int8", (7, 5), {}, r"needs capability 8\.0 to 12\.1, found 7\.5"),
    "int8-on-b300": ("int8", (10, 3), {}, r"int8 products leave the fast path of the tensor cores on 10\.3"),
    "masked-fp4": ("fp4", (12, 0), {"traits": ("mask",)}, "cannot do mask"),
    "masked-fp4-fp8": ("fp4_fp8", (10, 0), {"traits": ("mask",)}, "cannot do mask"),
    "head-256": ("int8", (8, 9), {"d": 256}, "serves head_dim 64/96/128, asked 256"),
    "float32": ("int8", (8, 9), {"dtype": torch.float32}, "serves float16/bfloat16, asked float32"),
    "fp8-on-amd": ("int8_fp8", "gfx942", {"device": "hip"}, "runs on cuda, not hip"),
    "old-amd": ("int8", "gfx90a", {"device": "hip"}, "serves gfx942/gfx1100/gfx1201, found gfx90a"),
    "cpu": ("int8", None, {"device": "cpu"}, "runs on cuda/hip, not cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case):
    spec, capability, changes, reason = REFUSED[case]
    with pytest.raises(NoKernel, match=reason) as error:
        choose(ask(spec, capability, **changes), prefer=f"triton_{spec}")
    assert f"triton_{spec} was asked for" in str(error.value) and "reference" in str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_the_op_itself_refuses_before_anything_is_launched(case, monkeypatch):
    """As above, but by the op on tensors: a device that reports `capability`, kernels that must not be reached."""
    from qgen.kernels import triton_attention, triton_attention_fp4

    spec, capability, changes, reason = REFUSED[case]
    wanted = ask(spec, capability, **changes)
    monkeypatch.setattr(attention_ops, "ask", lambda *args: wanted)
    for module in (triton_attention, triton_attention_fp4):
        monkeypatch.setattr(module, "prepare", lambda *args, **kwargs: pytest.fail("something was launched"))
    q = torch.zeros(1, 1, 8, wanted.k, dtype=wanted.dtype)
    mask = torch.ones(8, 8, dtype=torch.bool) if "mask" in wanted.traits else None
    with pytest.raises(NoKernel, match=reason) as error:
        attention_ops.attention(q, q, q, mask, False, None, spec, True, False, f"triton_{spec}")
    assert "scaled_dot_product_attention" in str(error.value)


def test_a_call_asks_for_what_its_tensors_are(monkeypatch):
    q = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    wanted = attention_ops.ask(q, "int8", torch.ones(8, 8, dtype=torch.bool), True, True, 64)
    assert wanted == replace(ask("int8", None, "cpu", 64, torch.float16), traits=frozenset(
        {"mask", "causal", "smooth_q", "hadamard"}))  # fmt: skip
    monkeypatch.setattr(tuning, "capability_of", lambda device: "gfx942")
    assert attention_ops.ask(q, "int8").capability == "gfx942"


def test_every_kernel_of_the_op_is_in_these_tables():
    names = {key.partition("/")[2] for key in registry.kernels if key.startswith("attention/")}
    assert names == {"reference", *(f"triton_{spec}" for spec in SPECS)}
