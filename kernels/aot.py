"""`python -m qgen.kernels.aot`: compiles every Triton kernel for every card it serves and proves what it became.
Needs no GPU.

Of each (kernel, target): which matrix instructions, how many instructions in the loop around them, what share of the
loop the tensor cores can work by the model of `qgen.kernels.efficiency`, registers, spilled bytes, shared memory; and
whether the promises of its `AotCase` hold. The numbers are compared with `golden.json`, recorded for named versions
of Triton and ptxas.

    python -m qgen.kernels.aot [--only REGEX] [--target sm_89 …] [--jobs 2] [--update] [--json FILE] [--list] [--fresh]

Exit code 0: all promises kept, nothing differs from the record; 1: otherwise; 3: Triton is not installed.
Each compilation runs in a process of its own, since a compiler that crashes takes its process with it.
"""

__all__ = ["cases", "main", "prove"]

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from qgen.kernels import aot_compile
from qgen.kernels.aot_case import AotCase, Target, arch_of, label
from qgen.kernels.aot_check import Row, check, compare, facts
from qgen.kernels.aot_compile import Compiled
from qgen.kernels.aot_layer import LAYER, LayerShare, layer_share
from qgen.kernels.aot_table import layers_table, rows_table
from qgen.kernels.roofline import CARDS

GOLDEN = Path(__file__).with_name("golden.json")
Pair = tuple[AotCase, Target]


def cases() -> list[AotCase]:
    """The cases of every module of qgen.kernels, in order of their names. ValueError if two share a name."""
    import qgen.kernels

    found: list[AotCase] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(qgen.kernels.__path__)):
        if module.startswith(("triton_", "gluon_")):  # a module of shared helpers has none
            found += getattr(importlib.import_module(f"qgen.kernels.{module}"), "aot_cases", list)()
    names = [case.name for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two AOT cases share the name {', '.join(twice)}")
    return sorted(found, key=lambda case: case.name)


def prove(pairs: Iterable[Pair], folder: Path, jobs: int = 1, fresh: bool = False) -> list[tuple[Pair, Compiled]]:
    """Compiles the pairs, `jobs` at a time, each in a process of its own, and returns them with their results.

    folder: cache of compiled results; `fresh` ignores what it holds. A crashed compiler gives a result with `error`.
    """
    pairs = list(pairs)
    keys = [aot_compile.key_of(case, target) for case, target in pairs]
    results = {key: None if fresh else aot_compile.load(folder, key) for key in keys}
    missing = [(key, *pair) for key, pair in zip(keys, pairs, strict=True) if results[key] is None]
    fork = multiprocessing.get_context("fork")
    running: dict[str, multiprocessing.Process] = {}
    while missing or running:
        while missing and len(running) < jobs:
            key, case, target = missing.pop(0)
            if key not in running:
                running[key] = fork.Process(target=_compile, args=(folder, key, case, target))
                running[key].start()
        time.sleep(0.02)
        for key in [key for key, process in running.items() if not process.is_alive()]:
            code = running.pop(key).exitcode
            crash = Compiled("cuda", error=f"the compiler's process ended with exit code {code}")
            results[key] = (aot_compile.load(folder, key) if code == 0 else None) or crash
    return [(pair, results[key]) for key, pair in zip(keys, pairs, strict=True)]


def _compile(folder: Path, key: str, case: AotCase, target: Target) -> None:
    aot_compile.store(folder, key, aot_compile.compile_case(case, target))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _options().parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: an interpreted one cannot be compiled
    try:
        found = cases()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        print("qgen.kernels.aot compiles with Triton, which is not installed", file=sys.stderr)
        return 3
    pairs = [
        (case, target)
        for case in found
        for target in case.targets
        if re.search(options.only, case.name) and (not options.target or label(target) in options.target)
    ]
    if options.list:
        print("\n".join(f"{case.name}@{label(target)}" for case, target in pairs))
        return 0
    if not pairs:
        print(f"no case matches --only {options.only!r} --target {options.target}", file=sys.stderr)
        return 1
    results = prove(pairs, options.cache, options.jobs, options.fresh)
    rows = [check(case, target, compiled) for (case, target), compiled in results]
    layers = [share for share in _layers(results) if share]
    whole = len(pairs) == sum(len(case.targets) for case in found)
    differences = _record(rows, whole) if options.update else _differences(rows)
    _print(rows, layers, differences, options)
    return 1 if differences or any(row.problems for row in rows) else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qgen.kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    parser.add_argument("--target", action="append", help="e.g. sm_89, gfx942; may be given several times")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--update", action="store_true", help="record these numbers in golden.json")
    parser.add_argument("--fresh", action="store_true", help="compile even what the cache holds")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--list", action="store_true", help="print the pairs and compile nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--cache", type=Path, default=aot_compile.cache_dir(), help="folder of compiled results")
    return parser


def _layers(results: list[tuple[Pair, Compiled]]) -> Iterable[LayerShare | None]:
    for (case, target), compiled in results:
        for card in CARDS.values():
            if arch_of(card.capability) == target and card.name in ("A100", "RTX 4090", "H100", "B200", "RTX 5090"):
                yield layer_share(case, compiled, card)


def _differences(rows: list[Row]) -> list[str]:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if aot_compile.versions() not in recorded:
        known = "; ".join(recorded) or "none"
        print(f"No record for {aot_compile.versions()} (recorded: {known}): numbers are not compared.\n")
        return []
    return compare([row for row in rows if not row.problems and row.instructions], recorded[aot_compile.versions()])


def _record(rows: list[Row], whole: bool) -> list[str]:
    """Writes golden.json; a run over everything drops what no longer exists. Returns rows that cannot be recorded."""
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    kept = {} if whole else recorded.get(aot_compile.versions(), {})
    kept |= {f"{row.name}@{row.target}": facts(row) for row in rows if row.instructions and not row.problems}
    text = json.dumps({**recorded, aot_compile.versions(): dict(sorted(kept.items()))}, indent=1, sort_keys=True)
    GOLDEN.write_text(re.sub(r"\n   ", " ", text).replace("\n  }", " }") + "\n", encoding="utf-8")
    return []


def _print(rows: list[Row], layers: list[LayerShare], differences: list[str], options: argparse.Namespace) -> None:
    print(
        f"Compiled, not timed: {aot_compile.versions()}. No GPU took part; shares come from a model of the pipelines.\n"
    )
    print(rows_table(rows, options.markdown))
    if layers:
        m, n, k = LAYER
        print(
            f"\nModelled share of the tensor cores' peak for a layer of M={m}, K={k}, N={n} (a bound, not a timing)\n"
        )
        print(layers_table(layers, options.markdown))
    for row in rows:
        if " accepted: " in row.note:
            print(f"WAIVED {row.name}@{row.target}: {row.note}")
    for row in rows:
        for problem in row.problems:
            print(f"FAILED {row.name}@{row.target}: {problem}")
    for difference in differences:
        print(f"DIFFERS {difference}")
    broken = sum(bool(row.problems) for row in rows)
    print(f"\n{len(rows)} compilations, {broken} with broken promises, {len(differences)} differences from the record")
    if options.json:
        content = {
            "versions": aot_compile.versions(),
            "rows": [asdict(row) for row in rows],
            "layers": [asdict(layer) for layer in layers],
            "differences": differences,
        }
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
