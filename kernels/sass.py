"""Machine code as data: a listing of (address, instruction), its innermost tensor-core loop, what the loop is made of.

Both SASS (as `cuobjdump -sass` prints it) and AMD's assembly become the same listing, in which a branch names the
address it goes to. Loops are natural loops of the control-flow graph: a branch to a block that dominates it closes
one, and what reaches that branch without passing the block is its body, wherever the compiler put it. Of the loops
that hold matrix instructions but no smaller loop that does, the one with the most matrix instructions is *the* loop
of a kernel; of equals the shorter one, so that an attention kernel is judged by its unmasked loop.
"""

__all__ = ["Instruction", "counts", "is_call", "is_mma", "macs_of", "mma_loop", "opcode", "parse_amdgcn", "parse_sass"]

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_SASS_BRANCH = re.compile(r"\b(?:BRA|CALL\.REL)\S*\s.*?0x([0-9a-f]+)")  # ptxas also jumps by CALL, without a RET
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_BRANCH = re.compile(r"^s_c?branch\w*\s+(\.LBB\w+)")
_ENDS = re.compile(r"^(BRA 0x|EXIT\b|RET\b|BRA\.U 0x|s_branch\b|s_endpgm|s_setpc)")  # nothing follows these
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_MMA = re.compile(r"^(?:[HIQOBD]G?MMA|UTC[A-Z]*MMA|v_w?mfma_|v_wmma_|v_smfma)")


class Instruction(NamedTuple):
    """One instruction. target: the address that it may jump to, if it is a branch within the function."""

    address: int
    text: str
    target: int | None = None


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of what `cuobjdump -sass` printed for one function."""
    listing = []
    for address, line in _SASS_LINE.findall(text):
        branch = _SASS_BRANCH.search(line)
        listing.append(Instruction(int(address, 16), line, int(branch[1], 16) if branch else None))
    return listing


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of one function in the assembly that LLVM writes; addresses count instructions."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for raw in text.splitlines():
        if label := _AMD_LABEL.match(raw):
            labels[label[1]] = len(lines)
        line = raw.split(";")[0].strip()
        if re.match(r"^[svdgbi]\w*_", line) or line.startswith(("global_", "flat_", "buffer_", "scratch_")):
            lines.append(line)
    branches = (_AMD_BRANCH.match(line) for line in lines)
    return [
        Instruction(i, line, labels.get(b[1]) if b else None)
        for i, (line, b) in enumerate(zip(lines, branches, strict=True))
    ]


def opcode(text: str) -> str:
    """The mnemonic with its modifiers: "IMMA.16832.S8.S8.SAT"."""
    return _PREDICATE.sub("", text).split()[0]


def counts(listing: Sequence[Instruction]) -> Counter[str]:
    """How often each mnemonic without modifiers occurs: "IMMA", "LOP3", "v_mfma_i32_32x32x16_i8"."""
    return Counter(opcode(i.text).partition(".")[0] for i in listing)


def mma_loop(listing: Sequence[Instruction]) -> list[Instruction]:
    """Instructions of the innermost loop with matrix instructions, by address; empty if there is none."""
    loops = []
    for body in _natural_loops(listing):
        if work := sum(is_mma(listing[i].text) for i in body):
            loops.append((work, body))
    inner = [a for a in loops if not any(b[1] < a[1] for b in loops)]
    if not inner:
        return []
    return [listing[i] for i in sorted(max(inner, key=lambda loop: (loop[0], -len(loop[1])))[1])]


def _natural_loops(listing: Sequence[Instruction]) -> list[frozenset[int]]:
    """Natural loops as sets of indices into `listing`; loops with the same head are one."""
    blocks, successors = _blocks(listing)
    predecessors: dict[int, set[int]] = {b: set() for b in successors}
    for block, following in successors.items():
        for other in following:
            predecessors[other].add(block)
    above = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in successors.items():
        for head in following:
            if block in above and head in above[block]:
                body, queue = bodies.setdefault(head, {head}), [block]
                while queue:
                    if (b := queue.pop()) not in body:
                        body.add(b)
                        queue += predecessors[b]
    return [frozenset(i for b in body for i in blocks[b]) for body in bodies.values()]


def _blocks(listing: Sequence[Instruction]) -> tuple[dict[int, range], dict[int, set[int]]]:
    """Basic blocks by the index of their first instruction, and who follows whom."""
    index = {instruction.address: i for i, instruction in enumerate(listing)}
    leaders = {0} if listing else set()
    for i, instruction in enumerate(listing):
        if instruction.target is not None or _ENDS.match(instruction.text):
            leaders |= {i + 1, index.get(instruction.target, 0)}
    starts = sorted(i for i in leaders if i < len(listing))
    blocks = {a: range(a, b) for a, b in zip(starts, [*starts[1:], len(listing)], strict=False)}
    successors = {}
    for start, block in blocks.items():
        last = listing[block[-1]]
        successors[start] = {index[last.target]} if last.target in index else set()
        if not _ENDS.match(last.text) and block.stop < len(listing):
            successors[start].add(block.stop)
    return blocks, successors


def _dominators(successors: dict[int, set[int]], predecessors: dict[int, set[int]]) -> dict[int, frozenset[int]]:
    """Blocks that every path from the entry to a block passes, for each block that can be reached."""
    order, queue = [], [0] if successors else []
    while queue:
        if (block := queue.pop()) not in order:
            order.append(block)
            queue += sorted(successors[block], reverse=True)
    above = {block: frozenset(order) for block in order}
    above[0] = frozenset({0})
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = frozenset.intersection(*(above[p] for p in predecessors[block] if p in above)) | {block}
            changed |= new != above[block]
            above[block] = new
    return above


def is_mma(text: str) -> bool:
    """Whether an instruction works on the tensor cores."""
    return bool(_MMA.match(_PREDICATE.sub("", text)))


def is_call(instruction: Instruction, listing: Sequence[Instruction]) -> bool:
    """Whether a CALL enters a subroutine (what follows its target returns) and is no jump (what follows it ends)."""
    if not opcode(instruction.text).startswith("CALL"):
        return False
    after = (opcode(i.text) for i in listing if instruction.target is None or i.address >= instruction.target)
    return next((name for name in after if name.startswith(("RET", "EXIT"))), "EXIT").startswith("RET")


def macs_of(mnemonic: str) -> tuple[str, int] | None:
    """(operand type, multiply-adds of one instruction) by its mnemonic; None where the mnemonic does not tell
    (tcgen05).

    A `wgmma` counts for its warpgroup of four warps, the others for their warp.
    """
    if not (shape := re.search(r"\.(\d+)x(\d+)x(\d+)|\.(16)(8)(\d{1,2})\b|_(\d+)x(\d+)x(\d+)", mnemonic)):
        return None
    m, n, k = (int(size) for size in shape.groups() if size)
    return _operand(mnemonic), m * n * k


def _operand(mnemonic: str) -> str:
    if re.search(r"\.[SU]4|iu4", mnemonic):
        return "s4"
    if re.match(r"I|v_\w+_i32_\w+i(u)?8", mnemonic):
        return "s8"
    if mnemonic.startswith("O"):
        return "fp4"
    if re.match(r"Q|v_\w+(fp8|bf8)", mnemonic):
        return "fp8"
    return "bf16" if re.search("BF16|bf16", mnemonic) else "f16"
