"""Compiles one (case, target) without a GPU and keeps what came out: PTX, SASS or AMD assembly, registers, spills,
shared memory.

Triton brings `ptxas`, `cuobjdump` and LLVM in its wheel. Results are cached under a key of everything that can change
them: Triton's and ptxas' versions, the kernel's source and that of the functions it calls, types, constants, options,
target.
"""

__all__ = ["Compiled", "cache_dir", "compile_case", "key_of", "load", "store", "versions"]

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from qgen.kernels.aot_case import AotCase, Target
from qgen.kernels.sass import Instruction, parse_amdgcn, parse_sass


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave. spills: bytes of spill stores and loads; shared, stack: bytes; tmem: columns.

    error: the compiler's message if it refused; then the rest is empty. text: PTX and machine code, or AMD assembly.
    """

    backend: str
    seconds: float = 0.0
    ptx: str = ""
    machine: str = ""
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    tmem: int = 0
    warps: int = 0
    error: str = ""

    @cached_property
    def listing(self) -> list[Instruction]:
        return parse_sass(self.machine) if self.backend == "cuda" else parse_amdgcn(self.machine)

    @property
    def text(self) -> str:
        return f"{self.ptx}\n{self.machine}"


def cache_dir() -> Path:
    """Where compiled results are kept: $XDG_CACHE_HOME/qgen/aot, by default ~/.cache/qgen/aot."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgen" / "aot"


def versions() -> str:
    """ "triton 3.8.0, ptxas 12.9 and 13.3": what a golden number depends on."""
    import triton
    from triton import knobs

    return f"triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version} and {knobs.nvidia.ptxas_blackwell.version}"


def key_of(case: AotCase, target: Target) -> str:
    """The cache key of a compilation."""
    parts = (
        versions(),
        case.fn.cache_key,
        sorted(case.signature.items()),
        sorted((name, str(value)) for name, value in case.constexprs.items()),
        sorted(case.divisible),
        sorted((name, str(value)) for name, value in case.options.items()),
        target,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def load(folder: Path, key: str) -> Compiled | None:
    """The cached result, or None. A file that cannot be read counts as absent."""
    try:
        with gzip.open(folder / f"{key}.json.gz", "rt", encoding="utf-8") as file:
            return Compiled(**json.load(file))
    except (OSError, EOFError, ValueError, TypeError):
        return None


def store(folder: Path, key: str, compiled: Compiled) -> None:
    """Writes a result, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(gzip.compress(json.dumps(asdict(compiled)).encode(), 5))
    os.replace(file.name, folder / f"{key}.json.gz")


def compile_case(case: AotCase, target: Target) -> Compiled:
    """Compiles `case` for `target`. A refusal comes back as `error`; a case that does not fit its kernel raises."""
    import triton
    from triton import knobs

    source, options = _source(case), dict(case.options)
    start, log = time.perf_counter(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.cache.scope())
        stack.enter_context(knobs.compilation.scope())
        stack.enter_context(knobs.nvidia.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.always_compile = True  # ptxas reports registers only when it runs
        knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(contextlib.redirect_stdout(log))
        try:
            kernel = triton.compile(source, target=_gpu(target), options=options)
        except Exception as error:  # every compiler pass has an exception of its own; the message is the result
            return Compiled(target[0], time.perf_counter() - start, error=_message(error))
        seconds = time.perf_counter() - start
        facts = _cuda(kernel, log.getvalue()) if target[0] == "cuda" else _hip(kernel)
    return Compiled(
        target[0], seconds, shared=kernel.metadata.shared, tmem=getattr(kernel.metadata, "tmem_size", None) or 0,
        warps=kernel.metadata.num_warps, **facts,
    )  # fmt: skip


def _source(case: AotCase):
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = case.fn.arg_names
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(given) != set(names) or not set(case.divisible) <= set(names):
        odd = sorted(set(names) ^ set(given) | set(case.divisible) - set(names))
        raise ValueError(f"{case.name}: signature, constexprs and divisible do not fit the kernel's arguments: {odd}")
    signature = {name: given[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    kind = GluonASTSource if isinstance(case.fn, GluonJITFunction) else ASTSource
    return kind(case.fn, signature, dict(case.constexprs), attrs)


def _gpu(target: Target):
    from triton.backends.compiler import GPUTarget

    backend, arch = target
    return GPUTarget(backend, arch, 64 if str(arch).startswith("gfx9") else 32)


def _cuda(kernel, log: str) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        machine = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not found or not registers:
        raise RuntimeError(f"ptxas printed no register count: {log[:200]!r}")
    stack, stores, loads = map(int, found.groups())
    kept = "\n".join(line for line in machine.splitlines() if ";" in line)  # without the encodings' second words
    kept = re.sub(r"\s*/\* 0x[0-9a-f]+ \*/", "", kept)
    ptx = re.sub(r"\n\s*\.(loc|file)[^\n]*|\.section[^{]*\{.*?\n\s*\}", "", kernel.asm["ptx"], flags=re.DOTALL)
    return {"ptx": ptx, "machine": kept, "registers": int(registers[1]), "spills": stores + loads, "stack": stack}


def _hip(kernel) -> dict:
    text = kernel.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    stack = number("private_segment_fixed_size")
    return {"machine": text, "registers": number("vgpr_count"), "spills": spilled, "stack": stack}


def _message(error: BaseException) -> str:
    causes = []
    while error is not None:
        causes.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(causes)[-4000:]
