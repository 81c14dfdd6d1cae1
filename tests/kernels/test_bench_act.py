"""The contest of activation kernels, whose Triton kernel runs interpreted."""

# ruff: noqa: E402 - nothing that defines a kernel is imported before the interpreter is corrected

import interpreter

interpreter.needed()

import torch

from qgen.kernels import bench_other
from qgen.kernels.bench_run import run


def test_act_contest_is_right(monkeypatch):
    monkeypatch.setattr(bench_other.doctor, "capability", lambda device: ("cpu", (12, 0)))
    made = bench_other.act_contest((40, 128), torch.device("cpu"))
    rows = run(made, lambda call, runs: [1e-3] * runs)
    names = {
        "copy of x",
        *(f"triton_act {act}" for act in ("int8_row", "int4_g64", "uint4p_g64", "uint4_g64", "nvfp4_dynamic", "mxfp4")),
    }
    assert {row.name for row in rows} == names
    assert all(row.seconds for row in rows), [row.why for row in rows]


def test_act_contest_leaves_fp4_to_blackwell(monkeypatch):
    monkeypatch.setattr(bench_other.doctor, "capability", lambda device: ("cuda", (8, 9)))
    made = bench_other.act_contest((1, 64), torch.device("cpu"))
    assert not any("fp4" in contestant.name for contestant in made.contestants)
