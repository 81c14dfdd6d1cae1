"""The compiled INT4 kernel, executed: its PTX for sm_89 run on the CPU against the exact product of the same codes.

This sees what no other test without a GPU can: every address, every register of every matrix instruction, the edges
of M, N and K, and that nothing outside a buffer is read. What it takes for granted is ptxas and the PTX ISA's
fragment tables.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import interpreting

pytest.importorskip("triton", reason="the kernel is written in Gluon, a part of Triton")
if interpreting():
    pytest.skip("TRITON_INTERPRET=1: kernels of this process cannot be compiled", allow_module_level=True)

import ptx_machine

from qgen import formats
from qgen.formats import packing
from qgen.kernels import gluon_int4
from qgen.kernels.aot_compile import compile_case
from qgen.kernels.layouts import codes_to_groups
from qgen.kernels.registry import Ask

ADA = ("cuda", 89)
POINTERS = ("X", "SX", "W", "SW", "H", "UP", "BIAS", "Y")


@pytest.fixture(scope="module")
def compiled():
    """PTX by (activation format, everything divisible by 16), compiled once."""
    made = {}

    def get(act, even):
        if (act, even) not in made:
            case = gluon_int4._case("linear/test", act)
            made[act, even] = compile_case(case if even else replace(case, divisible=(*POINTERS, "K", "tiles")), ADA)
            assert not made[act, even].error, made[act, even].error
        return made[act, even].ptx

    return get


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype == torch.bfloat16 else t.dtype).numpy()


def problem(act, m, n, k, rank):
    """Memory and arguments of a launch, and the exact result."""
    x = torch.randint(0, 256, (m, k // 2), dtype=torch.uint8)
    sx = torch.rand(k // 64, m).bfloat16().float() + 0.5
    q = formats.get("int4_g64").quantize(torch.randn(n, k))
    slots = {"codes": q.codes, "scales": q.scales, "down": torch.zeros(rank, 1), "up": torch.randn(n, rank).bfloat16()}
    packed = gluon_int4.pack(slots, Ask("linear", "cuda", "int4_g64", act, n=n, k=k))
    h = torch.zeros(m, 32).bfloat16()
    h[:, :rank] = torch.randn(m, rank)
    bias = torch.randn(n).bfloat16()
    values = packing.unpack(x, 4).double()
    values = values if act == "uint4p_g64" else (values.long() ^ 8).double() - 8
    exact = (values.unflatten(1, (-1, 64)) * sx.T.double()[..., None]).flatten(1) @ q.dequantize().double().T
    exact += h[:, :rank].double() @ slots["up"].double().T + bias.double()
    memory = ptx_machine.Memory(
        X=codes_to_groups(x, 4).numpy(), SX=sx.numpy(), W=packed["codes"].numpy(), SW=bits(packed["scales"]),
        H=bits(h), UP=bits(packed["up"]), BIAS=bits(bias), Y=np.zeros((m, n), np.int16),
    )  # fmt: skip
    tiles = packed["codes"].shape[1]
    arguments = [memory.where[name] for name in POINTERS] + [m, n, k, tiles, h.shape[1] // 2, 0, 0]
    grid = -(-m // 128) * (tiles // gluon_int4.TILES_N)
    return memory, arguments, grid, exact.float()


@pytest.mark.parametrize(
    "act, even, shape",
    [
        ("int4_g64", True, (128, 128, 64)),
        ("int4_g64", True, (144, 272, 192)),
        ("int4_g64", False, (131, 200, 128)),
        ("uint4p_g64", True, (160, 128, 128)),
    ],
    ids=["one-tile", "several-tiles", "ragged", "unsigned"],
)
def test_compiled_kernel_gives_the_product(compiled, act, even, shape):
    memory, arguments, grid, exact = problem(act, *shape, rank=20)
    before = {name: memory.read(name).copy() for name in POINTERS[:-1]}
    ptx_machine.run(compiled(act, even), memory, arguments, grid, threads=32 * gluon_int4.WARPS_M * gluon_int4.WARPS_N)
    y = torch.from_numpy(memory.read("Y").copy()).view(torch.bfloat16)
    rms = exact.square().mean().sqrt()
    assert memory.all_written("Y")
    assert (y.float() - exact).square().mean().sqrt() <= 4e-3 * rms
    assert ((y.float() - exact).abs() / exact.abs().clamp(min=rms)).max() <= 2e-2
    assert all(np.array_equal(memory.read(name), array) for name, array in before.items())


def test_machine_sees_a_read_past_the_end(compiled):
    """One row less of activations than the kernel is told of."""
    memory, arguments, grid, _ = problem("int4_g64", 128, 128, 64, rank=20)
    start = memory.where["X"]
    memory.valid[start + 127 * 32 : start + 128 * 32] = False
    with pytest.raises(IndexError, match="outside every buffer"):
        ptx_machine.run(compiled("int4_g64", True), memory, arguments, grid, threads=256)


def test_machine_sees_swapped_words(compiled):
    """A weight whose fragments have two words exchanged gives another product: the test above is not blind to order."""
    memory, arguments, grid, exact = problem("int4_g64", 128, 128, 64, rank=20)
    words = memory.read("W").view(np.uint32)
    words[...] = words[..., [1, 0, 2, 3]]
    ptx_machine.run(compiled("int4_g64", True), memory, arguments, grid, threads=256)
    y = torch.from_numpy(memory.read("Y").copy()).view(torch.bfloat16).float()
    assert (y - exact).square().mean().sqrt() > 0.1 * exact.square().mean().sqrt()


def test_machine_refuses_what_it_does_not_know():
    ptx = ".entry f(\n.param .u32 f_param_0\n)\n{\n\tsin.approx.f32 %r1, %r2;\n\tret;\n}\n"
    with pytest.raises((NotImplementedError, ValueError)):
        ptx_machine.run(ptx, ptx_machine.Memory(), [0], 1, 32)
