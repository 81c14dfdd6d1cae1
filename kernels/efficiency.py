r"""How much of a loop's time the tensor cores can work, from its instructions alone: a model, not a timing.

Every scheduler of a streaming multiprocessor issues one instruction per clock and owns a quarter of the units. One
warp's trip through the loop keeps each unit busy for

    tensor = Σ multiply-adds / rate      issue = number of instructions      fma, alu, xu = Σ clocks per instruction
    shared = 4 · Σ bytes / 128           (the quarters share one path of 128 bytes per clock to shared memory)

and a perfectly overlapped loop takes the longest of these. The share is `tensor / max(all)`; latencies, bank conflicts,
memory traffic and barriers are not in it, so the truth is lower. Rates: CUDA C++ programming guide, arithmetic
throughput table, and the dense peaks of `qgen.kernels.roofline`. GeForce and RTX parts are rated as GeForce.
"""

__all__ = ["Clocks", "loop_clocks", "rate"]

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qgen.kernels.sass import Instruction, macs_of, opcode

# Multiply-adds per clock and scheduler. 103 and 110 multiply int8 by the old path, at a rate nobody states: left out.
_BLACKWELL = {"bf16": 1024, "f16": 1024, "fp8": 2048, "fp4": 4096}
_RATES: dict[int, dict[str, int]] = {
    80: {"bf16": 256, "f16": 256, "f16_f16": 256, "s8": 512, "s4": 1024},
    86: {"bf16": 64, "f16": 64, "f16_f16": 128, "s8": 256, "s4": 512},
    89: {"bf16": 64, "f16": 64, "f16_f16": 128, "fp8": 128, "fp8_f16": 256, "s8": 256, "s4": 512},
    90: {"bf16": 512, "f16": 512, "f16_f16": 512, "fp8": 1024, "s8": 1024},
    100: {**_BLACKWELL, "s8": 2048},
    103: {**_BLACKWELL, "fp4": 6144},
    110: _BLACKWELL,
    120: {"bf16": 64, "f16": 64, "f16_f16": 128, "fp8": 128, "fp8_f16": 256, "s8": 256, "fp4": 512},
}
_RATES |= {87: _RATES[80], 121: _RATES[120]}

_FLOAT = re.compile(r"^(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)\b")
_FLOAT2 = re.compile(r"^(FFMA2|FADD2|FMUL2)\b")
_MULTIPLY = re.compile(r"^(IMAD|IDP)\b")
_LOGIC = re.compile(
    r"^(LOP3|IADD3?|VIADD|SHF|LEA|PRMT|SEL|ISETP|FSETP|FSEL|FMNMX3?|IMNMX|VIMNMX3?|IABS|F2FP|I2FP|LOP|MOV|SGXT|BMSK)\b"
)
_SLOW = re.compile(r"^(MUFU|I2F|F2I|F2F|POPC|FLO|BREV)\b")


@dataclass(frozen=True)
class Clocks:
    """Clocks of one warp's trip through a loop, by unit."""

    tensor: float
    issue: float
    fma: float
    alu: float
    xu: float
    shared: float

    @property
    def share(self) -> float:
        """Part of the loop that the tensor cores work, 0 to 1."""
        return self.tensor / self.total if self.total else 0.0

    @property
    def total(self) -> float:
        """Clocks of the busiest unit."""
        return max(asdict(self).values())

    @property
    def limit(self) -> str:
        """Name of the busiest unit."""
        units = asdict(self)
        return max(units, key=units.get)


def rate(capability: int, operand: str) -> int | None:
    """Multiply-adds per clock and scheduler of e.g. (89, "s8"); None where the tensor cores do not take the operand."""
    return _RATES.get(capability, {}).get(operand)


def loop_clocks(
    loop: Sequence[Instruction], capability: int, warps: int, macs: Mapping[str, int] | None = None
) -> Clocks | None:
    """Clocks of one trip through `loop` on compute capability `capability` (89 for 8.9), or None if a rate is unknown.

    warps: of the program. macs: multiply-adds of the program's trip by operand; needed for tcgen05, whose mnemonics
    tell no shape, and ignored where they do.
    """
    names = [opcode(i.text) for i in loop]
    tensor = _tensor(names, capability, warps, macs or {})
    if tensor is None:
        return None
    unified = capability >= 120  # 32 integer lanes per scheduler, as for floats; 16 before
    whole, slow = (1 if unified else 2), 2 if capability == 80 else 1
    fma = sum(slow if _FLOAT.match(n) else 2 if _FLOAT2.match(n) else whole if _MULTIPLY.match(n) else 0 for n in names)
    return Clocks(
        tensor=tensor,
        issue=len(names),
        fma=fma,
        alu=whole * sum(bool(_LOGIC.match(n)) for n in names),
        xu=8 * sum(bool(_SLOW.match(n)) for n in names),
        shared=4 * sum(_shared_bytes(n) for n in names) / 128,
    )


def _tensor(names: list[str], capability: int, warps: int, macs: Mapping[str, int]) -> float | None:
    clocks = 0.0
    if any(n.startswith("UTC") for n in names):
        work = [(operand, amount / warps) for operand, amount in macs.items()]
    else:
        found = ((n, macs_of(n)) for n in names)
        work = [(_accumulated(n, f[0]), f[1] / (4 if n[1] == "G" else 1)) for n, f in found if f]
    for operand, amount in work:
        if (per_clock := rate(capability, operand)) is None:
            return None
        clocks += amount / per_clock
    return clocks


def _accumulated(mnemonic: str, operand: str) -> str:
    """GeForce halves the rate of float32 accumulation; "QMMA.16832.F16.…" accumulates in float16."""
    return f"{operand}_f16" if re.match(r"[HQ]MMA\.\d+\.F16\b", mnemonic) else operand


def _shared_bytes(mnemonic: str) -> int:
    """Bytes of shared memory that one warp moves: 32 lanes of 4 to 16 bytes, or 1 to 4 matrices of 128 bytes."""
    if match := re.match(r"(?:LDSM|STSM)\S*\.([124])\b", mnemonic):
        return 128 * int(match[1])
    if re.match(r"(LDS|STS|LDGSTS)\b", mnemonic):
        return 32 * (16 if ".128" in mnemonic else 8 if ".64" in mnemonic else 4)
    return 0
