"""Holds what a kernel compiled to against what it promised (`AotCase`) and against numbers recorded earlier.

A result is a `Row`: facts that fit a table, and a list of problems that should be empty.
"""

__all__ = ["Row", "check", "compare", "facts"]

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qgen.kernels.aot_case import AotCase, Target, label, smem_limit
from qgen.kernels.aot_compile import Compiled
from qgen.kernels.efficiency import loop_clocks
from qgen.kernels.sass import Instruction, is_call, is_mma, macs_of, mma_loop, opcode

TMEM_COLUMNS = 512
SHORTEST = 24  # instructions: what does not fit the chip compiles to a trap of 16
LOOP_TOLERANCE = 0.08  # ptxas reorders and rematerializes; a lost optimization costs far more
_SPILL = re.compile(r"^(LDL|STL|scratch_)")


@dataclass(frozen=True)
class Row:
    """One (case, target): what it compiled to. loop: instructions per trip; share: of the loop that tensor cores can
    work."""

    name: str
    target: str
    mma: str = ""
    loop: int = 0
    share: float | None = None
    limit: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tmem: int = 0
    instructions: int = 0
    seconds: float = 0.0
    note: str = ""
    problems: tuple[str, ...] = field(default=())


def check(case: AotCase, target: Target, compiled: Compiled) -> Row:
    """The facts of one compilation and every broken promise."""
    if compiled.error or case.raises:
        return _refused(case, target, compiled)
    listing = compiled.listing
    loop = mma_loop(listing)
    clocks = None
    if target[0] == "cuda" and loop:
        clocks = loop_clocks(loop, int(target[1]), compiled.warps, case.macs)
    row = Row(
        case.name,
        label(target),
        mma=_mma(loop or listing),
        loop=len(loop),
        share=None if clocks is None or not case.macs else round(clocks.share, 3),
        limit="" if clocks is None or not case.macs else clocks.limit,
        registers=compiled.registers,
        spills=compiled.spills,
        shared=compiled.shared,
        tmem=compiled.tmem,
        instructions=len(listing),
        seconds=round(compiled.seconds, 2),
    )
    waiver = case.waiver(target)
    problems = [*_promises(case, target, compiled, row), *_spills(case, target, compiled, loop)]
    problems += _work(case, loop, compiled.warps)
    note = ""
    if waiver:
        problems += _needless(case, target, row)
        note = f"{_exceeded(case, target, row)} accepted: {waiver.reason}"
    return Row(**{**vars(row), "problems": tuple(problems), "note": note})


def _refused(case: AotCase, target: Target, compiled: Compiled) -> Row:
    seconds = round(compiled.seconds, 2)
    if case.raises and re.search(case.raises, compiled.error):
        return Row(case.name, label(target), seconds=seconds, note="refused by the compiler, as promised")
    lines = [line for line in compiled.error.splitlines() if line.strip()]
    line = lines[-1] if lines else "compiled, though it should be refused"
    return Row(case.name, label(target), seconds=seconds, problems=(line.strip()[:300],))


def _mma(instructions: list[Instruction]) -> str:
    """The kinds of matrix instructions, most frequent first: "32 IMMA.16832.S8.S8.SAT"."""
    found = Counter(opcode(i.text) for i in instructions if is_mma(i.text))
    return ", ".join(f"{n} {name}" for name, n in found.most_common(2))


def _promises(case: AotCase, target: Target, compiled: Compiled, row: Row) -> list[str]:
    problems = [f"lacks {p}" for p in case.required(target) if not re.search(p, compiled.text)]
    problems += [f"has forbidden {p}" for p in case.forbidden(target) if re.search(p, compiled.text)]
    if row.instructions < SHORTEST:
        problems.append(f"only {row.instructions} instructions: a trap in place of a kernel that does not fit")
    if compiled.shared > smem_limit(target):
        problems.append(f"{compiled.shared} bytes of shared memory, {label(target)} has {smem_limit(target)}")
    if compiled.tmem > TMEM_COLUMNS:
        problems.append(f"{compiled.tmem} columns of tensor memory, there are {TMEM_COLUMNS}")
    budget, floor, waiver = case.loop_budget(target), case.least_efficiency(target), case.waiver(target)
    allowed = waiver.loop if waiver and waiver.loop else budget
    if allowed is not None and row.loop > allowed:
        problems.append(f"loop of {row.loop} instructions, budget {allowed}")
    if budget is not None and not row.loop:
        problems.append("has no loop with matrix instructions")
    if floor is not None and (row.share is None or row.share < floor):
        problems.append(f"tensor cores can work {row.share} of the loop ({row.limit} bound), promised {floor}")
    return problems


def _exceeded(case: AotCase, target: Target, row: Row) -> str:
    """What a waiver is for, in a few words: "spill", "loop of 606 for 535"."""
    waiver, budget = case.waiver(target), case.loop_budget(target)
    return f"loop of {row.loop} for {budget}" if waiver.loop else "spill"


def _needless(case: AotCase, target: Target, row: Row) -> list[str]:
    """Waivers of what fits: of exact targets, since one for all of them may be needed by another."""
    waiver, budget = case.waivers.get(target), case.loop_budget(target)
    problems = []
    if waiver and waiver.spills and not row.spills:
        problems.append(f"spills nothing: its waiver of {waiver.spills} bytes is not needed")
    if waiver and waiver.loop and (budget is None or row.loop <= budget):
        problems.append(f"loop of {row.loop} instructions fits the budget {budget}: its waiver is not needed")
    return problems


def _spills(case: AotCase, target: Target, compiled: Compiled, loop: list[Instruction]) -> list[str]:
    problems, waiver = [], case.waiver(target)
    allowed, stack = (waiver.spills, waiver.stack) if waiver else (0, 0)
    if compiled.spills > allowed:
        problems.append(f"spills {compiled.spills} bytes, allowed {allowed}")
    if compiled.stack > max(stack, allowed):
        problems.append(f"{compiled.stack} bytes of stack, allowed {max(stack, allowed)}")
    if not allowed and any(_SPILL.match(opcode(i.text)) for i in loop):
        problems.append("loads or stores spilled registers in its loop")
    if called := sum(is_call(i, compiled.listing) for i in loop):
        problems.append(f"calls {called} subroutines in its loop")
    return problems


def _work(case: AotCase, loop: list[Instruction], warps: int) -> list[str]:
    """Problems with the multiply-adds that the loop's mnemonics tell, against those declared."""
    found: Counter[str] = Counter()
    for name in (opcode(i.text) for i in loop):
        if work := macs_of(name):
            operand = "f16" if work[0] == "bf16" else work[0]
            found[operand] += work[1] * warps // (4 if name[1] == "G" else 1)
    declared: Counter[str] = Counter()
    for operand, amount in case.macs.items():
        declared["f16" if operand == "bf16" else operand] += amount
    if not found or not declared:
        return [] if loop or not declared else ["has no loop with matrix instructions"]
    unrolled = max(found.values()) // max(declared.values()) or 1
    wrong = {o for o in found | declared if found[o] != unrolled * declared[o]}
    return [f"{found[o]} multiply-adds of {o} per trip, declared {declared[o]}" for o in sorted(wrong)]


def facts(row: Row) -> dict[str, int | str]:
    """What is recorded of a row, to compare with another day's."""
    return {name: getattr(row, name) for name in ("mma", "loop", "registers", "spills", "shared", "tmem")}


def compare(rows: list[Row], recorded: Mapping[str, Mapping[str, int | str]]) -> list[str]:
    """Differences of `rows` from what was recorded under "name@target", worth a look; loops may change by 8 %."""
    differences = []
    for row in rows:
        key = f"{row.name}@{row.target}"
        if (old := recorded.get(key)) is None:
            differences.append(f"{key}: not recorded yet")
            continue
        for name, now in facts(row).items():
            before = old.get(name)
            if name == "loop" and isinstance(before, int) and abs(now - before) <= LOOP_TOLERANCE * before:
                continue
            if name == "registers" and isinstance(before, int) and abs(now - before) <= LOOP_TOLERANCE * before:
                continue
            if now != before:
                differences.append(f"{key}: {name} {before} -> {now}")
    return differences
