"""The benchmark's logic, on the CPU with a clock that tells made-up times: right before fast, percent of the roof,
tuning, exit codes."""

import itertools
import json

import pytest
import torch

from qgen.kernels import bench, bench_linear, bench_other, bench_packages, bench_tune, roofline, tuning
from qgen.kernels.bench_run import Contest, Contestant, relative_rms, run
from qgen.kernels.bench_timer import Sample, gpu_state
from qgen.kernels.tuning import Launch

CPU = torch.device("cpu")
ONE = torch.ones(4, 4)


class FakeClock:
    """Says that each call took what `seconds` says for what it returns; remembers how often it was asked."""

    def __init__(self, seconds=lambda result: 1e-3):
        self.seconds, self.asked = seconds, 0

    def __call__(self, call, runs):
        self.asked += 1
        return [self.seconds(call())] * runs


def contest(*contestants, baseline="base", flop=2e9):
    return Contest("op", "4x4", flop, contestants, lambda name: ONE, baseline)


def test_what_is_wrong_is_not_timed():
    clock = FakeClock()
    rows = run(contest(Contestant("base", lambda: ONE, 1e-2), Contestant("wrong", lambda: ONE * 1.1, 1e-2)), clock)
    assert clock.asked == 1
    assert rows[1].seconds is None and rows[1].error == pytest.approx(0.1) and "not timed" in rows[1].why


@pytest.mark.parametrize("bad", [ONE * torch.nan, ONE * torch.inf, torch.ones(4, 5)], ids=["nan", "inf", "shape"])
def test_what_is_not_finite_or_of_another_shape_is_wrong(bad):
    (row,) = run(contest(Contestant("base", lambda: bad, 1e9)), FakeClock())
    assert row.seconds is None


def test_failure_of_a_package_is_a_row():
    def fails():
        raise RuntimeError("no kernel image\nmore")

    rows = run(contest(Contestant("base", lambda: ONE, 1e-2), Contestant("other", fails, 1e-2)), FakeClock())
    assert rows[0].seconds == 1e-3 and rows[1].why == "RuntimeError: no kernel image"


def test_numbers_of_a_row():
    """2 GFLOP in 1 ms is 2 TFLOP/s; half of a bound of 0.5 ms; twice as fast as a baseline of 2 ms."""
    quick = Contestant("quick", lambda: ONE * 1.001, 1e-2, bound=0.5e-3)
    clock = FakeClock(lambda result: 2e-3 if result is ONE else 1e-3)
    base, row = run(contest(Contestant("base", lambda: ONE, 1e-2), quick), clock)
    assert (row.tflops, row.roof, row.speedup) == (2.0, 0.5, 2.0)
    assert base.speedup == 1.0 and base.roof is None


def test_read_is_compared_and_not_timed():
    timed = []
    clock = FakeClock(lambda result: timed.append(result) or 1.0)
    (row,) = run(contest(Contestant("base", lambda: (ONE, "rest"), 0.0, read=lambda result: result[0])), clock, runs=1)
    assert row.error == 0 and timed == [(ONE, "rest")]


def test_sample():
    sample = Sample.of([float(i) for i in (9, 1, 2, 3, 4, 5, 6, 7, 8, 0)])
    assert (sample.median, sample.low, sample.high, sample.runs) == (4.5, 2.0, 7.0, 10)


def test_relative_rms_sees_scale():
    assert relative_rms(ONE * 1.2, ONE) == pytest.approx(0.2)


def test_linear_contest_is_right_on_this_cpu():
    """Every kernel that serves the CPU equals the reference on its own codes, as it will have to on a GPU."""
    card = roofline.CARDS["RTX 5090"]
    made = bench_linear.contest((33, 128, 64), CPU, card)
    rows = run(made, FakeClock(), runs=3)
    assert made.shape == "M=33 K=128 N=64" and rows[0].name == "cuBLAS bf16" and len(rows) > 3
    ours = [row for row in rows if ":" in row.name]
    assert ours and all(row.seconds and row.roof for row in ours), [row.why for row in ours]


def test_linear_contest_catches_a_broken_kernel(monkeypatch):
    made = bench_linear.contest((33, 128, 64), CPU)
    name = next(c.name for c in made.contestants if c.name.startswith("cpu_dequant"))
    broken = [
        Contestant(c.name, lambda c=c: c.call() * (1.05 if c.name == name else 1), c.tolerance)
        for c in made.contestants
    ]
    rows = {r.name: r for r in run(Contest("linear", "", 1, tuple(broken), made.truth, made.baseline), FakeClock())}
    assert rows[name].seconds is None and "wrong by 5" in rows[name].why


def test_conv_contest_is_right_on_this_cpu():
    made = bench_linear.conv_contest((1, 64, 5, 48), CPU)
    rows = run(made, FakeClock(), runs=1)
    assert len(rows) > 2 and all(row.seconds for row in rows), [row.why for row in rows]


def test_attention_contest_baseline():
    made = bench_other.attention_contest((1, 2, 40, 64), CPU, roofline.CARDS["A100"])
    (row,) = (row for row in run(made, FakeClock(), runs=1) if row.name == made.baseline)
    assert row.seconds and row.error < 1e-2 and row.roof > 0


def test_bounds_know_the_operands():
    gemms = {pair: bench_linear._gemm(64, 64, 64, *pair) for pair in [("int4_g64", ""), ("int4_s8_g64", "int8_row")]}
    assert gemms["int4_g64", ""].operand == "bf16" and gemms["int4_g64", ""].act_bits == 16
    assert gemms["int4_s8_g64", "int8_row"].operand == "s8" and gemms["int4_s8_g64", "int8_row"].weight_bits == 4
    assert bench_linear._gemm(64, 64, 64, "nvfp4", "nvfp4_dynamic").operand == "fp4"
    assert bench_linear._gemm(64, 64, 64, "fp8_e4m3_row", "fp8_e4m3_row").operand == "fp8"
    assert bench_linear._gemm(64, 64, 64, "int4_g64", "int4_g64").operand == "s8", "int4 runs on int8 tensor cores"
    assert bench_linear._bound(gemms["int4_g64", ""], None) is None


def test_packages_fail_inside_their_own_call(monkeypatch):
    monkeypatch.setattr(bench_packages, "_have", lambda package: package == "torchao")
    monkeypatch.setattr(bench_packages, "_torchao", lambda x, w: 1 / 0)
    ((name, call),) = bench_packages.linear_packages(ONE, ONE)
    assert name.startswith("torchao")
    with pytest.raises(ZeroDivisionError):
        call()


def test_comfy_kitchen_row():
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    x, w = torch.randn(8, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    call = dict(bench_packages.linear_packages(x, w))["comfy-kitchen int8"]
    assert relative_rms(call(), x.float() @ w.float().T) < 0.03


def test_tuning_takes_the_fastest_that_is_right():
    """The op looks its launch up in the table; 256 columns are fastest but wrong, 64 are right and fast."""
    seconds = {0: 1.0, 64: 0.5, 128: 0.8, 256: 0.1}
    key = ("linear", "test")
    tuning.TABLE[key] = ((tuning.LARGE, Launch(0)),)

    def call():
        bn = tuning.TABLE[key][-1][1].bn
        if bn == 512:
            raise RuntimeError("out of resource: shared memory")
        return ONE * (2.0 if bn == 256 else 1.0)

    clock = FakeClock(lambda result: seconds[tuning.TABLE[key][-1][1].bn])
    candidates = [Launch(128, bn) for bn in (64, 128, 256, 512)]
    try:
        entry, trials = bench_tune.tune(*key, 4096, Contestant("op", call, 1e-3), ONE, clock, candidates)
        assert tuning.TABLE[key] == ((tuning.LARGE, Launch(0)),), "the table is as it was"
        slow, _ = bench_tune.tune(*key, 4096, Contestant("op", call, 1e-3), ONE, FakeClock(), candidates)
    finally:
        del tuning.TABLE[key]
    assert entry["launch"]["bn"] == 64 and entry["seconds"] == 0.5 and entry["before"] == 1.0
    assert [t.why[:12] for t in trials] == ["", "", "wrong by 1.0", "RuntimeError"]
    assert slow is None, "no faster than what is there"


def test_candidates_are_for_ops_of_the_table():
    import qgen.kernels.registry as registry

    assert "reference" in {k.name for _, k in registry.kernels.items()}, "discovery fills the table"
    if pytest.importorskip("triton", reason="tables belong to Triton kernels"):
        assert all((op, "any") in tuning.TABLE for op in bench_tune.CANDIDATES)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["linear"]) == 3
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "needs a GPU" in out


def test_unknown_op(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["linaer"])
    assert stop.value.code == 2 and "did you mean 'linear'" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "OPS", {"linear": (bench_linear.contest, ((9, 64, 64), (3, 64, 64)))})
    monkeypatch.setattr(bench, "OURS", ("cpu",))


def test_program(small, capsys, tmp_path):
    assert bench.main(["linear", "--runs", "2", "--json", str(tmp_path / "rows.json")], FakeClock(), CPU) == 0
    out = capsys.readouterr().out
    assert "linear M=9 K=64 N=64" in out and "linear M=3 K=64 N=64" in out and "torch 2." in out
    assert "data sheet of this card is not known" in out
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert {row["shape"] for row in rows} == {"M=9 K=64 N=64", "M=3 K=64 N=64"}
    assert all(row["seconds"] == 1e-3 for row in rows if row["name"] == "cuBLAS bf16")


def test_program_fails_if_one_of_ours_is_wrong(small, monkeypatch, capsys):
    monkeypatch.setattr(bench_linear, "KERNEL_TOLERANCE", 0.0)
    assert bench.main(["linear", "--quick"], FakeClock(), CPU) == 1
    out = capsys.readouterr().out
    assert "not timed" in out and "M=3" not in out


def test_program_tunes(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "TUNED", {"cpu_dequant": "linear"})
    monkeypatch.setattr(bench_tune, "CANDIDATES", {"linear": (Launch(16), Launch(32))})
    times = (0.9**i for i in itertools.count())  # whatever comes later is a tenth faster
    clock = FakeClock(lambda result: next(times))
    file = tmp_path / "entries.json"
    assert bench.main(["linear", "--quick", "--runs", "1", "--tune", str(file)], clock, CPU) == 0
    entries = json.loads(file.read_text())["entries"]
    assert entries and all(entry["op"] == "linear" and entry["launch"]["bm"] in (16, 32) for entry in entries)


def test_gpu_state_without_nvidia_smi(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    assert gpu_state(CPU) == {
        "name": "Test GPU",
        **dict.fromkeys(
            ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"), "unknown"
        ),
    }
