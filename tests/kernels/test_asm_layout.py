"""Inline assembly that works on four bytes at a time wants four neighbours along K in one register.

The sub-scale of a byte is that of its column of the weight, and the assembly reads it once per word. Triton promises no order
of the elements it packs, so the layout is read in the compiled intermediate code: registers run along K in fours.
"""

import re

import pytest
from interpreter import interpreting

pytest.importorskip("triton", reason="kernels are written in Triton, which is not installed")
if interpreting():
    pytest.skip("compiles kernels, which an interpreting process cannot", allow_module_level=True)

ALONG_K = (
    re.compile(r"^#ttg\.blocked<\{sizePerThread = \[(4|8|16|32), 1\], .*order = \[0, 1\]"),
    re.compile(r"^#ttg\.dot_op<\{opIdx = 1, .*kWidth = 4\}>"),
    re.compile(r"^#ttg\.linear<\{register = \[\[1, 0\], \[2, 0\], "),
)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("name", ["w4s_a8", "w4s_a8_m16"])
def test_subscales_meet_their_column(name, capability):
    import triton
    from triton.backends.compiler import GPUTarget

    from qgen.kernels import aot_compile, triton_linear

    cases = [case for case in triton_linear.aot_cases() if case.name.startswith(f"linear/{name}_sm")]
    (case,) = [case for case in cases if ("cuda", capability) in case.targets]
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(aot_compile._source(case), target=target, options=dict(case.options)).asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    lines = [line for line in code.splitlines() if "elementwise_inline_asm" in line and "xi32" in line]
    assert lines
    for line in lines:
        layout = re.search(r"tensor<32x\d+xi8, (#ttg\.dot_op<\{.*?\}>|#\w+)>, tensor<32x\d+xi32", line)
        assert layout, line
        layout = named.get(layout[1], layout[1])
        assert any(pattern.search(layout) for pattern in ALONG_K), layout
