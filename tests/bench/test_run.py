"""Rows in processes of their own. Scripts stand for the Pythons of peers: one returns, one raises, one dies, one hangs."""

import json
import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qgen.bench.job import Job
from qgen.bench.peer import Config, peers, select
from qgen.bench.run import Bench
from qgen.errors import QgenError

pytest.importorskip("PIL")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="scripts with a first line stand for interpreters")

WORKER = """#!{python} -I
import json, pathlib, sys
from PIL import Image
place = pathlib.Path(sys.argv[4] if sys.argv[1] == "-c" else sys.argv[-1])
job = json.loads((place / "job.json").read_text())
(place / "pictures").mkdir()
for i in range(len(job["prompts"])):
    Image.new("RGB", (16, 16), (10 * i, {colour}, 0)).save(place / "pictures" / f"{{i:05d}}.png")
measured = {{"nbytes": 100, "bits": 4.0, "seed": job["seed"]}}
(place / "result.json").write_text(json.dumps({{"measured": measured}}))
with open({log!r}, "a") as file:
    file.write(job["peer"] + " ")
"""


@pytest.fixture
def script(tmp_path):
    """A function: an executable file with this text."""

    def make(name, text):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def bench(tmp_path, script, log):
    """Everything returns at once; the reference's pictures are darker than the others'."""
    text = {name: WORKER.format(python=sys.executable, colour=c, log=str(log)) for name, c in (("a", 0), ("b", 20))}
    pythons = {"unquantized": script("reference", text["a"]), "torchao": script("fine", text["b"])}
    job = Job("", "", "demo", ("x", "y"), seed=7)
    return Bench(tmp_path / "out", job, pythons, timeout=60, metrics=("psnr",))


PAIRS = [("torchao", Config("int8", 8, 8, ""))]


def test_a_row_that_returns_is_scored_and_kept(bench, log):
    reference, row = list(bench.rows(PAIRS))
    assert (reference.peer, row.error) == ("unquantized", "")
    assert row.measured == {"nbytes": 100, "bits": 4.0, "seed": 7}
    assert row.scores["psnr"].value == pytest.approx(26.881, abs=1e-3)  # 10 log10(3 · 255² / 20²)
    assert reference.scores["psnr"].value == float("inf")
    assert list(bench.rows(PAIRS)) == [reference, row]
    assert log.read_text() == "unquantized torchao "  # the second time nothing was run


def test_a_row_that_fails_says_so_and_is_tried_again(bench, script, log):
    fine = bench.pythons
    words = "import pathlib, sys; pathlib.Path(sys.argv[4], 'result.json').write_text('{\"error\": \"ImportError: no kernel\"}')"
    bench.pythons = {**fine, "torchao": script("raises", f"#!{sys.executable} -I\n{words}\n")}
    assert list(bench.rows(PAIRS))[1].error == "ImportError: no kernel"
    bench.pythons = {**fine, "torchao": script("dies", "#!/bin/sh\necho about to die >&2\nkill -SEGV $$\n")}
    assert list(bench.rows(PAIRS))[1].error == "its process died (SIGSEGV); last words: about to die"
    bench.pythons = {**fine, "torchao": script("leaves", "#!/bin/sh\nexit 3\n")}
    assert list(bench.rows(PAIRS))[1].error == "its process died (exit code 3); last words: none"
    bench.pythons = {**fine, "torchao": "/nowhere/python"}
    assert "cannot be started" in list(bench.rows(PAIRS))[1].error
    bench.pythons = fine
    assert list(bench.rows(PAIRS))[1].error == ""


def test_a_row_that_hangs_is_stopped_with_its_children(bench, script, tmp_path):
    child = tmp_path / "child"
    bench.pythons |= {"torchao": script("hangs", f"#!/bin/sh\nsleep 100 &\necho $! > {child}\nwait\n")}
    next(rows := bench.rows(PAIRS))
    bench.timeout = 1
    start = time.monotonic()
    assert next(rows).error == "no result after 1 s, stopped; --timeout allows more"
    assert time.monotonic() - start < 20
    state = Path(f"/proc/{int(child.read_text())}/stat")
    if Path("/proc/self/stat").exists():
        time.sleep(0.2)
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_absent_packages_give_one_row(bench, monkeypatch):
    def gone(self):
        raise ModuleNotFoundError("sdnq is not installed here: pip install sdnq")

    monkeypatch.setattr(peers["sdnq"], "version", gone)
    _, row = bench.rows(select(["sdnq"]))
    assert row.name == "sdnq all" and "pip install sdnq" in row.error


def test_rows_of_other_settings_are_refused(bench):
    list(bench.rows(PAIRS))
    bench.job = replace(bench.job, seed=8)
    with pytest.raises(ValueError, match=r"seed 7 \(now 8\); add --fresh"):
        list(bench.rows(PAIRS))


def test_without_the_16_bit_pictures_there_is_no_table(bench, script):
    bench.pythons |= {"unquantized": script("no", "#!/bin/sh\nexit 1\n")}
    with pytest.raises(QgenError, match="16-bit pipeline itself"):
        list(bench.rows(PAIRS))


def test_a_job_survives_its_trip_through_json(bench):
    job = replace(bench.job, peer="a", config="b", prompts=("ü", "🙂"))
    assert Job.from_json(job.to_json()) == job
    assert set(json.loads(job.to_json())) - set(job.settings()) == {"peer", "config"}
