"""Launch tables: what is found for a card and M, and files of `bench --tune`, which come from anybody."""

import json
from dataclasses import asdict

import pytest

from qgen.kernels import bench_tune, tuning
from qgen.kernels.bench_run import Contestant
from qgen.kernels.tuning import Launch


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The table and what was read from the environment are as before, after each test."""
    monkeypatch.setattr(tuning, "TABLE", dict(tuning.TABLE))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning._from_environment.cache_clear()
    yield
    tuning._from_environment.cache_clear()


def entry(**changes):
    launch = asdict(Launch(128, 256, 64, 8, 4)) | changes.pop("launch", {})
    return {"op": "linear", "family": "sm_90", "m": 4096, "launch": launch, "seconds": 1e-4, "before": 2e-4} | changes


def file_of(tmp_path, *entries):
    path = tmp_path / "entries.json"
    path.write_text(json.dumps({"gpu": {"name": "a card"}, "entries": list(entries)}))
    return path


def test_an_entry_replaces_the_rows_it_belongs_to(tmp_path):
    small, large = tuning.launch("linear", (9, 0), 40), tuning.launch("linear", (8, 0), 4096)
    assert tuning.load(file_of(tmp_path, entry(), entry(m=10, launch={"bm": 16}))) == 2
    assert tuning.launch("linear", (9, 0), 5000) == Launch(128, 256, 64, 8, 4)
    assert tuning.launch("linear", (9, 0), 16) == Launch(16, 256, 64, 8, 4)
    assert tuning.launch("linear", (9, 0), 40) == small, "rows in between keep theirs"
    assert tuning.launch("linear", (8, 0), 4096) == large, "and so do other cards"


def test_what_the_bench_writes_is_what_is_loaded(tmp_path):
    import torch

    times = iter([1.0, 0.5, 0.7])
    contestant = Contestant("op", lambda: torch.ones(3), 1e-3)
    found, _ = bench_tune.tune(
        "linear",
        "sm_90",
        4096,
        contestant,
        torch.ones(3),
        lambda run, runs: [next(times)],
        bench_tune.CANDIDATES["linear"][:2],
    )
    tuning.load(file_of(tmp_path, {**found, "shape": "M=4096", "kernel": "triton_w4s_a8"}))
    assert tuning.launch("linear", (9, 0), 4096) == bench_tune.CANDIDATES["linear"][0]


def test_the_environment_names_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(file_of(tmp_path, entry())))
    assert tuning.launch("linear", (9, 0), 4096) == Launch(128, 256, 64, 8, 4)


def test_a_bad_file_in_the_environment_is_an_error_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "missing.json"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"missing\.json cannot be used as a tuning table"):
            tuning.launch("linear", (9, 0), 4096)


BAD = {
    "no JSON": ("{", "Expecting property name"),
    "a list": ("[]", "an object with a list 'entries'"),
    "entries are numbers": ('{"entries": [1]}', "an object with a list 'entries'"),
    "deep": ("[" * 100000, "cannot be used"),
    "unknown op": (entry(op="linaer"), r"entry 0: unknown op 'linaer' \(did you mean 'linear'"),
    "unknown family": (entry(family="sm_91"), "unknown family 'sm_91'"),
    "rows": (entry(m=0), "m is a number of rows, found 0"),
    "a truth value for rows": (entry(m=True), "m is a number of rows, found True"),
    "a launch with more": (entry(launch={"extra_cuda_flags": "-x"}), "launch has the keys bk, bm, bn, stages, warps"),
    "no launch": ({**entry(), "launch": None}, "launch has the keys"),
    "an odd tile": (entry(launch={"bm": 96}), "bm is one of 16, 32, 64, 128, 256; found 96"),
    "text for a number": (entry(launch={"warps": "8"}), "warps is one of 1, 2, 4, 8, 16; found '8'"),
    "a small fp4 tile": (entry(op="fp4", launch={"bm": 64, "bk": 128}), "tiles of fp4 are multiples of 128"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_change_nothing(case, tmp_path):
    content, words = BAD[case]
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"entries": [content, entry()]}))
    before = dict(tuning.TABLE)
    with pytest.raises(ValueError, match=words):
        tuning.load(path)
    assert before == tuning.TABLE


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    path.write_bytes(b" " * (tuning._MOST_BYTES + 1))
    with pytest.raises(ValueError, match="expected at most 1048576 bytes"):
        tuning.load(path)


@pytest.mark.parametrize("op", sorted({op for op, _ in tuning.TABLE}))
def test_every_op_has_a_launch_for_every_card_and_size(op):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), "gfx942", None):
        for m in (1, 16, 17, 64, 65, 1 << 20):
            assert isinstance(tuning.launch(op, capability, m), Launch)
