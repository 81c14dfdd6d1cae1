"""Executes compiled PTX on the CPU: every thread of a block at once, in numpy, instruction by instruction.

For kernels that Triton's interpreter cannot run (Gluon). It knows the few instructions that such a kernel compiles to
and refuses all others. Branches must be uniform over the block. Memory is a set of buffers with gaps between them; an
access that touches a gap, or that is not aligned to its size, is an error, which a GPU would not report.

Matrix instructions follow the fragment tables of the PTX ISA, chapter "Warp Level Matrix Instructions".
https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

__all__ = ["Memory", "run"]

import re

import numpy as np

GAP = 1 << 16  # bytes between buffers
TYPES = {
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64, "u64": np.uint64,
    "b64": np.uint64, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": np.uint16,
}  # fmt: skip
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


class Memory:
    """Global memory: arrays at addresses of their own. `where[name]` is the address, `read` gives an array back."""

    def __init__(self, **arrays: np.ndarray):
        self.where, self._spans, end = {}, {}, GAP
        for name, array in arrays.items():
            self.where[name] = end
            self._spans[name] = (end, array.nbytes, array.dtype, array.shape)
            end += -(-array.nbytes // 256) * 256 + GAP
        self.bytes, self.valid, self.written = np.zeros(end, np.uint8), np.zeros(end, bool), np.zeros(end, bool)
        for name, array in arrays.items():
            start, size = self._spans[name][:2]
            self.bytes[start : start + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.valid[start : start + size] = True

    def read(self, name: str) -> np.ndarray:
        start, size, dtype, shape = self._spans[name]
        return self.bytes[start : start + size].view(dtype).reshape(shape)

    def all_written(self, name: str) -> bool:
        start, size = self._spans[name][:2]
        return bool(self.written[start : start + size].all())

    def places(self, address: np.ndarray, size: int, on: np.ndarray) -> np.ndarray:
        """Indices (threads, size) of bytes; IndexError for a thread that is `on` and leaves its buffer."""
        places = address.astype(np.int64)[:, None] + np.arange(size)
        places[~on] = 0
        if (address[on] % size).any():
            raise IndexError(f"an access of {size} bytes is not aligned")
        if not self.valid[places[on]].all():
            raise IndexError(f"an access of {size} bytes lies outside every buffer")
        return places


def run(ptx: str, memory: Memory, arguments: list[int], grid: int, threads: int) -> None:
    """Runs the one kernel in `ptx` for every block of a one-dimensional grid; memory changes in place."""
    program, labels = _parse(ptx)
    names = re.findall(r"\.param\s+\.\w+\s[^\n]*?(\w+_param_\d+)", ptx)
    for block in range(grid):
        _Block(memory, dict(zip(names, arguments, strict=True)), block, threads).run(program, labels)


def _parse(ptx: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Statements as (predicate, opcode, operands), and labels by the index of the statement that follows."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    program, labels = [], {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if label := re.match(r"^(\$\w+):", line):
            labels[label[1]] = len(program)
            continue
        if re.match(r"^\{ [a-z]", line):  # inline assembly of several statements
            line = line[1:].rstrip("} ")
        for statement in filter(None, (part.strip() for part in line.split(";"))):
            if statement[0] in ".}":
                continue
            match = re.match(r"^(@!?%p\d+)?\s*([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
            program.append((match[1] or "", match[2], _operands(match[3])))
    return program, labels


def _operands(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text) if part.strip(" ,")]


class _Block:
    def __init__(self, memory: Memory, parameters: dict[str, int], block: int, threads: int):
        self.memory, self.parameters, self.threads = memory, parameters, threads
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": np.full(threads, block, np.uint32),
        }

    def run(self, program, labels) -> None:
        at = 0
        while at < len(program):
            predicate, opcode, operands = program[at]
            on = np.ones(self.threads, bool)
            if predicate:
                on = self.registers[predicate.lstrip("@!")] ^ predicate.startswith("@!")
            if opcode.startswith("bra"):
                if on.any() != on.all():
                    raise NotImplementedError("a branch on which the threads of a block differ")
                at = labels[operands[0]] if on.all() else at + 1
                continue
            if opcode == "ret":
                return
            self.step(opcode, operands, on)
            at += 1

    # -- registers -----------------------------------------------------------------------------------------------------
    def get(self, operand: str, kind: str) -> np.ndarray:
        dtype = TYPES[kind]
        if operand in self.registers:
            value = self.registers[operand]
            return value.view(dtype) if value.itemsize == np.dtype(dtype).itemsize else value.astype(dtype)
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint32).view(dtype)
        number = int(operand, 0)
        return np.full(self.threads, number % (1 << 8 * np.dtype(dtype).itemsize), f"u{np.dtype(dtype).itemsize}").view(
            dtype
        )

    def set(self, register: str, value: np.ndarray, on: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        value = value if value.dtype == bool else value.view(f"u{value.itemsize}")
        old = self.registers.get(register, np.zeros_like(value))
        self.registers[register] = np.where(on, value, old)

    # -- instructions --------------------------------------------------------------------------------------------------
    def step(self, opcode: str, operands: list[str], on: np.ndarray) -> None:
        name, *suffixes = opcode.split(".")
        kind = suffixes[-1] if suffixes else ""
        with np.errstate(over="ignore"):
            if name == "ld" and suffixes[0] == "param":
                value = self.parameters[operands[1].strip("[]")]
                self.set(operands[0], np.full(self.threads, value, TYPES[kind]), on)
            elif name in ("ld", "st") and suffixes[0] == "global":
                self.transfer(name, kind, operands, on)
            elif name == "mma":
                self.mma(opcode, operands, on)
            elif name == "mov" and operands[0].startswith("{"):
                halves = self.get(operands[1], "b32").view(np.uint16).reshape(-1, 2)
                for i, register in enumerate(operands[0].strip("{} ").split(",")):
                    self.set(register.strip(), halves[:, i], on)
            elif name == "mov" and operands[1].startswith("{"):
                parts = [self.get(r.strip(), "b16") for r in operands[1].strip("{} ").split(",")]
                self.set(operands[0], np.stack(parts, 1).view(np.uint32)[:, 0], on)
            else:
                self.set(operands[0], self.value(name, suffixes, operands[1:]), on)

    def value(self, name: str, suffixes: list[str], operands: list[str]) -> np.ndarray:
        kind = suffixes[-1]
        if name == "mov":
            return self.get(operands[0], kind)
        if name == "setp":
            return COMPARE[suffixes[0]](self.get(operands[0], kind), self.get(operands[1], kind))
        if name == "selp":
            chosen = self.registers[operands[2]]
            return np.where(chosen, self.get(operands[0], kind), self.get(operands[1], kind))
        if name == "cvt":
            return self.convert(suffixes, operands)
        if name in ("shl", "shr"):
            return (np.left_shift if name == "shl" else np.right_shift)(
                self.get(operands[0], kind), self.get(operands[1], "u32").astype(TYPES[kind])
            )
        if name == "bfe":
            value, start, length = (self.get(o, "u32") for o in operands)
            return (value >> start) & ((np.uint32(1) << length) - np.uint32(1))
        if name == "div":
            quotient = np.trunc(self.get(operands[0], kind).astype(np.float64) / self.get(operands[1], kind))
            return quotient.astype(TYPES[kind])
        if name == "fma":
            a, b, c = (self.get(o, kind).astype(np.float64) for o in operands)
            return (a * b + c).astype(np.float32)
        if name in ("mul", "mad") and suffixes[0] == "wide":
            wide = kind[0] + "64"
            product = self.get(operands[0], kind).astype(TYPES[wide]) * self.get(operands[1], kind).astype(TYPES[wide])
            return product if name == "mul" else product + self.get(operands[2], wide)
        if name == "mad" and suffixes[0] == "lo":
            return self.get(operands[0], kind) * self.get(operands[1], kind) + self.get(operands[2], kind)
        if name in BINARY and set(suffixes[:-1]) <= {"lo", "rn"}:
            return BINARY[name](self.get(operands[0], kind), self.get(operands[1], kind))
        raise NotImplementedError(f"the PTX machine does not know {'.'.join([name, *suffixes])}")

    def convert(self, suffixes: list[str], operands: list[str]) -> np.ndarray:
        to, source = suffixes[-2:]
        if to == "bf16x2":  # the first operand becomes the upper half
            high, low = (_bf16(self.get(o, "f32")).astype(np.uint32) for o in operands)
            return (high << 16) | low
        if to == "bf16":
            return _bf16(self.get(operands[0], "f32"))
        if source == "bf16":
            return self.get(operands[0], "b16").astype(np.uint32) << 16
        return self.get(operands[0], source).astype(TYPES[to])

    def transfer(self, name: str, kind: str, operands: list[str], on: np.ndarray) -> None:
        registers, place = operands if name == "ld" else operands[::-1]
        registers = [r.strip() for r in registers.strip("{} ").split(",")]
        base, _, offset = place.strip("[] ").partition("+")
        size = np.dtype(TYPES[kind]).itemsize
        address = self.get(base.strip(), "s64") + int(offset or 0)
        places = self.memory.places(address, size * len(registers), on)
        for i, register in enumerate(registers):
            part = places[:, i * size : (i + 1) * size]
            if name == "ld":
                value = np.ascontiguousarray(self.memory.bytes[part]).view(TYPES[kind])[:, 0]
                self.set(register, value, on)
            else:
                raw = np.ascontiguousarray(self.get(register, kind)).view(np.uint8).reshape(-1, size)
                self.memory.bytes[part[on]] = raw[on]
                self.memory.written[part[on]] = True

    def mma(self, opcode: str, operands: list[str], on: np.ndarray) -> None:
        if not on.all():
            raise NotImplementedError("a matrix instruction of half a warp")
        d, a, b, c = ([r.strip() for r in group.strip("{} ").split(",")] for group in operands)
        left, right = (np.stack([self.get(r, "b32") for r in group], 1).reshape(-1, 32, len(group)) for group in (a, b))
        lane = np.arange(32)
        if "m16n8k64" in opcode:
            types = re.search(r"\.s32\.([su])4\.([su])4\.s32", opcode)
            left, right, each, kind = _nibbles(left, types[1]), _nibbles(right, types[2]), 8, "s32"
        elif "m16n8k16.row.col.f32.bf16.bf16.f32" in opcode:
            left, right, each, kind = _halves(left), _halves(right), 2, "f32"
        else:
            raise NotImplementedError(f"the PTX machine does not know {opcode}")
        # Register i of A holds `each` neighbours of row lane / 4 (+ 8 for odd i), from column lane % 4 · each (+ half
        # for i >= 2).
        warps, k = len(left), 8 * each
        rows, columns = np.zeros((warps, 16, k), left.dtype), np.zeros((warps, k, 8), left.dtype)
        for e in range(each):
            along = lane % 4 * each + e
            for i in range(4):
                rows[:, lane // 4 + 8 * (i % 2), along + k // 2 * (i // 2)] = left[:, :, i, e]
            for i in range(2):
                columns[:, along + k // 2 * i, lane // 4] = right[:, :, i, e]
        product = rows @ columns  # exact: integers, or float64 of bf16
        for i in range(4):
            part = product[:, lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2].reshape(-1)
            self.set(d[i], (part + self.get(c[i], kind)).astype(TYPES[kind]), on)


def _nibbles(words: np.ndarray, sign: str) -> np.ndarray:
    values = ((words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).astype(np.int64)
    return (values ^ 8) - 8 if sign == "s" else values


def _halves(words: np.ndarray) -> np.ndarray:
    pair = np.stack([words << 16, words & np.uint32(0xFFFF0000)], -1)
    return np.ascontiguousarray(pair).view(np.float32).astype(np.float64)


def _bf16(value: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
