"""What a kernel promises about the machine code it compiles to, as data that needs neither Triton nor a GPU to import.

A module with Triton kernels offers `aot_cases() -> list[AotCase]`; `python -m qgen.kernels.aot` compiles each case for
each target and holds the result against the promises. A target is `("cuda", 89)` or `("hip", "gfx942")`. In tables
keyed by target, None stands for every target; an exact key adds to it (require, forbid) or overrides it (the others).

    AotCase(
        "linear/w4s_a8",
        _gemm,  # a @triton.jit function, or a @gluon.jit one
        signature={"x": "*i8", "w": "*u8", "out": "*bf16", "m": "i32", "k": "i32"},  # constexprs are added from below
        constexprs={"BM": 128, "BN": 128},
        divisible=("x", "w", "out", "k"),  # multiples of 16, as the launcher finds at run time; else no 16-byte loads
        options={"num_warps": 8, "num_stages": 3},
        targets=(("cuda", 80), ("cuda", 89)),
        require={None: (r"IMMA\\.16832\\.S8\\.S8",)},
        macs={"s8": 128 * 128 * 64},  # multiply-adds of one program in one trip of its innermost mma loop
    )
"""

__all__ = ["AMD", "NVIDIA", "AotCase", "Target", "Waiver", "arch_of", "label", "smem_limit"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Target = tuple[str, int | str]

# Jetson Orin (87) equals 80 with less shared memory, Thor is 110, DGX Spark 121.
NVIDIA: tuple[Target, ...] = tuple(("cuda", cc) for cc in (80, 86, 89, 90, 100, 103, 110, 120, 121))
AMD: tuple[Target, ...] = (("hip", "gfx942"), ("hip", "gfx1100"))

# KiB of shared memory one program may use: CUDA C++ programming guide, technical specifications per compute capability.
_SMEM_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Waiver:
    """What a target may exceed, for a stated reason: so many bytes spilled (stores and loads) and of stack, and so many
    instructions in the loop in place of its budget. A waiver that is not needed any more is reported as a problem."""

    spills: int
    reason: str
    stack: int = 0
    loop: int = 0


@dataclass(frozen=True)
class AotCase:
    """One (kernel, shape) to compile without a GPU, and what must be true of the result.

    name: unique, "<op>/<variant>". fn: a jit function. signature: argument to Triton type ("*bf16", "i32", "fp32").
    divisible: names of arguments that are multiples of 16. options: num_warps, num_stages, maxnreg, …
    require, forbid: target (or None) to regular expressions, searched in PTX and SASS together (AMD: in the assembly).
    waivers: target to what it may exceed. budget: target to the most instructions the innermost mma loop may have.
    macs: operand type ("s4", "s8", "fp4", "fp8", "f16", "bf16") to the multiply-adds of one program in one trip of that
    loop; the mma instructions found are held against it, and it gives the share of the loop that tensor cores work.
    tile: (BM, BN), the output of one program of a matrix product: gives the share at the shape of a whole layer.
    efficiency: target to the least acceptable share. raises: compiling must fail with a message that matches (so that a
    guard of the dispatch stays honest).
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = NVIDIA
    require: Mapping[Target | None, tuple[str, ...]] = field(default_factory=dict)
    forbid: Mapping[Target | None, tuple[str, ...]] = field(default_factory=dict)
    waivers: Mapping[Target | None, Waiver] = field(default_factory=dict)
    budget: Mapping[Target | None, int] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    tile: tuple[int, int] | None = None
    efficiency: Mapping[Target | None, float] = field(default_factory=dict)
    raises: str | None = None

    def required(self, target: Target) -> tuple[str, ...]:
        """Patterns that must occur for `target`."""
        return (*self.require.get(None, ()), *self.require.get(target, ()))

    def forbidden(self, target: Target) -> tuple[str, ...]:
        """Patterns that must not occur for `target`."""
        return (*self.forbid.get(None, ()), *self.forbid.get(target, ()))

    def waiver(self, target: Target) -> Waiver | None:
        """What `target` may exceed, or None."""
        return self.waivers.get(target, self.waivers.get(None))

    def loop_budget(self, target: Target) -> int | None:
        """The greatest loop length of `target`, or None."""
        return self.budget.get(target, self.budget.get(None))

    def least_efficiency(self, target: Target) -> float | None:
        """The least tensor-core share of `target`, or None."""
        return self.efficiency.get(target, self.efficiency.get(None))


def label(target: Target) -> str:
    """("cuda", 89) to "sm_89", ("hip", "gfx942") to "gfx942"."""
    backend, arch = target
    return f"sm_{arch}" if backend == "cuda" else str(arch)


def arch_of(capability: tuple[int, int] | str) -> Target:
    """A capability as `Ask` has it, (8, 9) or "gfx942", to a target."""
    return ("hip", capability) if isinstance(capability, str) else ("cuda", 10 * capability[0] + capability[1])


def smem_limit(target: Target) -> int:
    """Bytes of shared memory that one program of `target` may use."""
    return 1024 * (64 if target[0] == "hip" else _SMEM_KIB[int(target[1])])
