"""The proof by compilation: its own logic on made-up results, a few kernels compiled on purpose to fail, and all of
them to pass.

Runs in a process where kernels are compiled, never interpreted.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from interpreter import interpreting

pytest.importorskip("triton", reason="nothing to compile: Triton is not installed")
if interpreting():
    pytest.skip("TRITON_INTERPRET=1: kernels of this process cannot be compiled", allow_module_level=True)

from qgen.kernels import aot, aot_compile, gluon_int4, triton_fp4
from qgen.kernels.aot_case import AotCase, Waiver, label, smem_limit
from qgen.kernels.aot_check import Row, check, compare
from qgen.kernels.aot_compile import Compiled
from qgen.kernels.aot_layer import layer_share
from qgen.kernels.roofline import CARDS
from qgen.kernels.tuning import Launch

ADA, BLACKWELL = ("cuda", 89), ("cuda", 100)
ROOT = Path(__file__).parents[2]


def sass(*lines):
    return "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))


LOOP = ("IMMA.16832.S8.S8.SAT R4, R5", "LOP3.LUT R1, R2", "@P0 BRA 0x0")
GOOD = Compiled(
    "cuda", 1.0, ptx="ld.global.v4", machine=sass(*LOOP, *["NOP"] * 40, "EXIT"), registers=40, shared=1024, warps=4
)
CASE = AotCase("op/kernel", None, {}, targets=(ADA,), macs={"s8": 4 * 16 * 8 * 32}, tile=(64, 64))


def problems(compiled=GOOD, target=ADA, **changes):
    return check(replace(CASE, **changes), target, compiled).problems


def test_a_kept_promise():
    row = check(replace(CASE, require={None: (r"IMMA\.16832", r"ld\.global\.v4")}, forbid={ADA: ("HMMA",)}), ADA, GOOD)
    assert row.problems == () and row.loop == 3 and row.mma == "1 IMMA.16832.S8.S8.SAT"
    assert row.share == 1.0 and row.limit == "tensor" and row.target == "sm_89"


@pytest.mark.parametrize(
    "compiled, changes, problem",
    [
        (GOOD, {"require": {ADA: ("QMMA",)}}, "lacks QMMA"),
        (GOOD, {"forbid": {None: ("LOP3",)}}, "has forbidden LOP3"),
        (replace(GOOD, spills=8), {}, "spills 8 bytes, allowed 0"),
        (replace(GOOD, spills=16), {"waivers": {ADA: Waiver(8, "known")}}, "spills 16 bytes, allowed 8"),
        (replace(GOOD, stack=32), {}, "32 bytes of stack, allowed 0"),
        (replace(GOOD, machine=sass("EXIT")), {"macs": {}}, "only 1 instructions: a trap"),
        (replace(GOOD, shared=100 * 1024), {}, "102400 bytes of shared memory, sm_89 has 101376"),
        (replace(GOOD, tmem=576), {}, "576 columns of tensor memory, there are 512"),
        (GOOD, {"budget": {None: 2}}, "loop of 3 instructions, budget 2"),
        (GOOD, {"macs": {"s8": 4 * 16 * 8 * 64}}, "16384 multiply-adds of s8 per trip, declared 32768"),
        (GOOD, {"macs": {"bf16": 64}}, "multiply-adds of f16 per trip, declared 64"),
        (GOOD, {"efficiency": {ADA: 1.01}}, "tensor cores can work 1.0 of the loop (tensor bound), promised 1.01"),
        (replace(GOOD, machine=sass(*["NOP"] * 40)), {}, "has no loop with matrix instructions"),
        (
            replace(GOOD, machine=sass("LDL R1, [R2]", LOOP[0], LOOP[2], *["NOP"] * 40)),
            {},
            "loads or stores spilled registers in its loop",
        ),
        (
            replace(GOOD, machine=sass("CALL.REL.NOINC 0x50", LOOP[0], LOOP[2], "EXIT", *["NOP"] * 40, "RET.REL R2")),
            {},
            "calls 1 subroutines in its loop",
        ),
        (replace(GOOD, error="CompilationError: x\ntype fp8e4nv not supported"), {}, "type fp8e4nv not supported"),
        (GOOD, {"raises": "fp8e4nv"}, "compiled, though it should be refused"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
def test_a_broken_promise(compiled, changes, problem):
    assert any(problem in found for found in problems(compiled, **changes)), problems(compiled, **changes)


def test_loop_beyond_its_budget_is_accepted_for_a_reason():
    waived = {"budget": {None: 2}, "waivers": {ADA: Waiver(0, "two sums", loop=3)}}
    row = check(replace(CASE, **waived), ADA, GOOD)
    assert not row.problems and row.note == "loop of 3 for 2 accepted: two sums"
    assert problems(replace(GOOD, spills=4), **waived) == ("spills 4 bytes, allowed 0",)
    longer = replace(GOOD, machine=sass(LOOP[0], "NOP", *LOOP[1:], *["NOP"] * 40))
    assert problems(longer, **waived) == ("loop of 4 instructions, budget 3",)


def test_waivers_that_are_not_needed_are_problems():
    assert problems(waivers={ADA: Waiver(8, "known")}) == ("spills nothing: its waiver of 8 bytes is not needed",)
    waived = {"budget": {None: 3}, "waivers": {ADA: Waiver(0, "two sums", loop=9)}}
    assert problems(**waived) == ("loop of 3 instructions fits the budget 3: its waiver is not needed",)
    assert problems(waivers={None: Waiver(8, "some of all targets")}) == ()


def test_accepted_spill_is_noted():
    row = check(replace(CASE, waivers={None: Waiver(8, "one pointer")}), ADA, replace(GOOD, spills=8))
    assert not row.problems and row.note == "spill accepted: one pointer"


def test_unrolled_loop_is_recognized():
    twice = replace(GOOD, machine=sass(LOOP[0], LOOP[0], LOOP[2], *["NOP"] * 40))
    assert problems(twice) == ()


def test_promised_refusal():
    row = check(replace(CASE, raises="fp8e4nv"), ADA, Compiled("cuda", error="type fp8e4nv not supported"))
    assert not row.problems and row.note == "refused by the compiler, as promised"


def test_exact_targets_add_patterns_and_override_numbers():
    case = replace(CASE, require={None: ("a",), ADA: ("b",)}, budget={None: 10, ADA: 20})
    assert case.required(ADA) == ("a", "b") and case.required(BLACKWELL) == ("a",)
    assert case.loop_budget(ADA) == 20 and case.loop_budget(BLACKWELL) == 10


def test_limits_of_cards():
    assert (label(ADA), label(("hip", "gfx942"))) == ("sm_89", "gfx942")
    assert smem_limit(("cuda", 120)) == 99 * 1024 and smem_limit(("cuda", 90)) == 227 * 1024


def test_differences_from_the_record():
    row = Row("a", "sm_89", mma="8 IMMA", loop=108, registers=100, shared=1024, instructions=500)
    same = {"a@sm_89": {"mma": "8 IMMA", "loop": 100, "registers": 100, "spills": 0, "shared": 1024, "tmem": 0}}
    assert compare([row], same) == []
    assert compare([replace(row, loop=109)], same) == ["a@sm_89: loop 100 -> 109"]
    assert compare([replace(row, mma="8 HMMA")], same) == ["a@sm_89: mma 8 IMMA -> 8 HMMA"]
    assert compare([row], {}) == ["a@sm_89: not recorded yet"]


def test_layer_share_by_hand():
    """A tile of 64 x 64 per program of 4 warps; 3 instructions issue in 16 clocks of the tensor cores; 41 outside."""
    case = replace(CASE, macs={"s8": 16384})
    shape = (64 * 128, 64, 4096)  # 128 tiles, one per multiprocessor of a 4090; 16384 / 4096 = 4 columns of K per trip
    share = layer_share(case, GOOD, CARDS["RTX 4090"], shape)
    assert share.waves == 1.0 and share.loop == 1.0
    assert share.share == pytest.approx(1024 * 16 / (1024 * 16 + 41))
    assert share.outside == pytest.approx(41 / (1024 * 16 + 41))
    assert layer_share(replace(case, tile=None), GOOD, CARDS["RTX 4090"], shape) is None


def test_results_there_and_back(tmp_path):
    aot_compile.store(tmp_path, "key", GOOD)
    assert aot_compile.load(tmp_path, "key") == GOOD and aot_compile.load(tmp_path, "other") is None
    (tmp_path / "bad.json.gz").write_bytes((tmp_path / "key.json.gz").read_bytes()[:50])
    assert aot_compile.load(tmp_path, "bad") is None
    assert {p.name for p in tmp_path.iterdir()} == {"key.json.gz", "bad.json.gz"}, "no temporary file is left"


def test_key_depends_on_what_changes_code():
    case = triton_fp4.aot_cases()[0]
    key = aot_compile.key_of(case, BLACKWELL)
    assert key == aot_compile.key_of(replace(case, name="other", require={}), BLACKWELL), (
        "promises are checked, not compiled"
    )
    for change in (
        {"constexprs": {**case.constexprs, "BK": 64}},
        {"options": {"num_warps": 8}},
        {"divisible": ()},
        {"fn": gluon_int4.aot_cases()[0].fn},
    ):
        assert key != aot_compile.key_of(replace(case, **change), BLACKWELL)
    assert key != aot_compile.key_of(case, ("cuda", 103))


def test_a_compiler_that_crashes_is_a_result(tmp_path, monkeypatch):
    case = triton_fp4.aot_cases()[0]
    monkeypatch.setattr(aot_compile, "compile_case", lambda case, target: os._exit(134))
    ((_, compiled),) = aot.prove([(case, BLACKWELL)], tmp_path)
    assert compiled.error == "the compiler's process ended with exit code 134"


def test_each_pair_compiles_once_and_is_cached(tmp_path, monkeypatch):
    case = triton_fp4.aot_cases()[0]
    monkeypatch.setattr(aot_compile, "compile_case", lambda case, target: replace(GOOD, seconds=float(target[1])))
    pairs = [(case, ("cuda", cc)) for cc in (100, 103, 100)]
    assert [c.seconds for _, c in aot.prove(pairs, tmp_path, jobs=2)] == [100, 103, 100]
    monkeypatch.setattr(aot_compile, "compile_case", lambda case, target: os._exit(1))
    assert [c.seconds for _, c in aot.prove(pairs, tmp_path)] == [100, 103, 100]
    assert all("exit code 1" in c.error for _, c in aot.prove(pairs, tmp_path, fresh=True))


def test_signature_that_does_not_fit_its_kernel():
    case = triton_fp4.aot_cases()[0]
    with pytest.raises(ValueError, match=r"linear/mxfp4_sm100|linear/nvfp4_sm100.*\['GONE'\]"):
        aot_compile.compile_case(replace(case, divisible=("GONE",)), BLACKWELL)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs aot.main over made-up cases, with a record of its own."""
    real = triton_fp4.aot_cases()[0]
    cases = [replace(CASE, name=name, fn=real.fn) for name in ("op/a", "op/b")]
    monkeypatch.setattr(aot, "cases", lambda: cases)
    monkeypatch.setattr(aot, "GOLDEN", tmp_path / "golden.json")
    results = {"now": GOOD}
    monkeypatch.setattr(aot_compile, "compile_case", lambda case, target: results["now"])

    def run(*arguments, compiled=GOOD):
        results["now"] = compiled
        return aot.main([*arguments, "--cache", str(tmp_path / "cache"), "--fresh"])

    return run


def test_program_records_and_compares(program, capsys, tmp_path):
    assert program() == 0 and "No record for triton" in capsys.readouterr().out
    assert program("--update") == 0
    recorded = json.loads((tmp_path / "golden.json").read_text())
    assert set(recorded[aot_compile.versions()]) == {"op/a@sm_89", "op/b@sm_89"}
    assert program("--json", str(tmp_path / "out.json")) == 0
    assert "Compiled, not timed" in capsys.readouterr().out
    assert [row["loop"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [3, 3]
    assert program(compiled=replace(GOOD, registers=80)) == 1
    assert "DIFFERS op/a@sm_89: registers 40 -> 80" in capsys.readouterr().out


def test_program_reports_broken_promises(program, capsys):
    assert program("--only", "a$", "--markdown", compiled=replace(GOOD, spills=4)) == 1
    out = capsys.readouterr().out
    assert "FAILED op/a@sm_89: spills 4 bytes" in out and "op/b" not in out
    assert out.count("| kernel") == 2 and "1 compilations, 1 with broken promises" in out


def test_program_lists_what_it_waived(program, capsys, monkeypatch):
    one = replace(CASE, fn=triton_fp4.aot_cases()[0].fn, waivers={ADA: Waiver(8, "one pointer")})
    monkeypatch.setattr(aot, "cases", lambda: [one])
    assert program(compiled=replace(GOOD, spills=4)) == 0
    assert "WAIVED op/kernel@sm_89: spill accepted: one pointer" in capsys.readouterr().out


def test_program_update_keeps_what_it_did_not_compile(program, tmp_path):
    program("--update")
    program("--update", "--only", "a$", compiled=replace(GOOD, registers=48))
    recorded = json.loads((tmp_path / "golden.json").read_text())[aot_compile.versions()]
    assert recorded["op/a@sm_89"]["registers"] == 48 and recorded["op/b@sm_89"]["registers"] == 40


def test_program_lists(program, capsys):
    assert program("--list") == 0 and capsys.readouterr().out == "op/a@sm_89\nop/b@sm_89\n"
    assert program("--target", "sm_90") == 1 and "no case matches" in capsys.readouterr().err


def test_names_are_unique():
    assert len(aot.cases()) > 5


def test_a_tile_that_does_not_fit_tensor_memory_is_caught():
    """256 x 256 float32 accumulators and scales want 576 columns of 512: Triton compiles a trap and says nothing."""
    case = triton_fp4._case("linear/too_wide", 16, Launch(256, 256, 128, 8, 2), (BLACKWELL,))
    found = check(case, BLACKWELL, aot_compile.compile_case(case, BLACKWELL)).problems
    assert any("tensor memory" in p or "a trap" in p for p in found), found


def test_emulated_int4_shows():
    """On Hopper the INT4 instruction is a subroutine: what the capability in `Needs` is there to refuse."""
    case = gluon_int4.aot_cases()[0]
    compiled = aot_compile.compile_case(case, ("cuda", 90))
    assert "IMMA.16864" not in compiled.machine
    assert check(case, ("cuda", 90), compiled).problems


@pytest.mark.aot
def test_all_kernels_keep_their_promises():
    """Every kernel for every target; minutes at first, seconds when the cache is warm. `make aot` runs the same."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qgen.kernels.aot", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
