"""A killed run goes on from its last finished wave and ends with the bytes of a run that nobody interrupted.

The work happens in a process of its own, which is killed without warning (SIGKILL) at moments spread over its run time.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qgen
from qgen import Recipe, Spec
from qgen.calibration.recorder import timed
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.nn.packed import Packed
from qgen.resume import Journal
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Recipe(Spec("int4_g64", "uint4_g64", (LowRank(8), GPTQ())))

WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.test_resume import canonical, job
import qgen.methods.gptq, qgen.methods.lowrank, qgen.waves, qgen.calibration.recorder
print("ready", flush=True)
pid = os.getpid()
while sys.stdin.readline():  # each line: one job, in a child that may be killed
    child = os.fork()
    if not child:
        save_file(canonical(job(sys.argv[1])), sys.argv[2] + ".part")
        os.replace(sys.argv[2] + ".part", sys.argv[2])
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


def job(folder):
    """Six blocks, one wave each, and three layers outside: a second of work."""
    torch.set_num_threads(1)  # as in the worker, which forks: the number of threads sets the last bit of sums
    model = tiny.net(6)
    return qgen.quantize(
        model, RECIPE, calibration=tiny.net_calls(4, 1), memory=1, checkpoint=folder or None, progress=False
    )


def canonical(model):
    return {
        f"{path}.{slot}": t.contiguous()
        for path, layer in model.named_modules()
        if isinstance(layer, Packed)
        for slot, t in layer.canonical().items()
    }


def equal(a, b):
    bits = lambda t: t.contiguous().flatten().view(torch.uint8)  # noqa: E731
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


@pytest.fixture(scope="module")
def whole():
    """The job that nobody interrupts and that keeps no journal."""
    return dict(sorted(canonical(job("")).items()))


class Runs:
    """A process that forks one child per job, so that torch is imported once and not for every run."""

    def __init__(self, folder, result):
        command = [sys.executable, "-c", WORKER, str(folder), str(result)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline().strip() == "ready"

    def start(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.mark.skipif(sys.platform == "win32", reason="kills processes by SIGKILL")
def test_killed_at_ten_random_moments(tmp_path, whole):
    """Ten runs, each killed at a moment of its own and resumed; and one that is killed again and again."""
    draw = random.Random(11)
    killed = 0
    result = tmp_path / "result.safetensors"
    with Runs(tmp_path / "work", result) as runs:
        began = time.monotonic()
        runs.start()
        assert runs.wait() == "0"
        seconds = time.monotonic() - began
        waves = []
        for number in range(10):
            folder = tmp_path / "work"
            result.unlink(missing_ok=True)
            if number < 7:  # afresh each time; the last ones go on from one another's progress
                for file in folder.iterdir():
                    file.unlink()
            child = runs.start()
            spread = (number + draw.random()) / 8 if number < 7 else draw.random() / 5
            time.sleep(seconds * spread)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed += runs.wait() == "killed"
            waves.append(len(list(folder.glob("wave-*"))))
            if number in (6, 7, 8):
                continue
            runs.start()
            assert runs.wait() == "0"
            assert equal(dict(sorted(load_file(result).items())), whole), f"kill {number}, after {waves[-1]} waves"
    assert killed >= 5 and len(set(waves)) >= 3, f"{killed} kills, after {waves} waves: not spread over the run"


def test_a_journal_does_not_change_the_bytes(tmp_path, whole):
    model = job(tmp_path)
    assert equal(dict(sorted(canonical(model).items())), whole)
    again = job(tmp_path)  # everything comes from the journal
    assert equal(canonical(again), canonical(model)) and again.qgen_report == model.qgen_report
    call = tiny.net_call(99)
    assert torch.equal(call.run(again), call.run(model))


@pytest.mark.parametrize("name", ["unet", "flux"])
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_convolutions_and_shared_inputs_come_back_too(tmp_path, name, share):
    recipe = Recipe(Spec("int4_g64", "int4_g64", (LowRank(4, rounds=0),), share=share))
    make, call = tiny.FAMILIES[name]
    options = {"calibration": tiny.calls(name, 2), "checkpoint": tmp_path, "progress": False}
    model, again = (qgen.quantize(make(), recipe, **options) for _ in range(2))
    assert equal(canonical(again), canonical(model)) and again.qgen_report == model.qgen_report
    assert torch.equal(tiny.first(call(5).run(again)), tiny.first(call(5).run(model)))


def test_finished_waves_are_not_done_again(tmp_path, monkeypatch):
    job(tmp_path)
    last = sorted(tmp_path.glob("wave-*"))[-1]
    last.unlink()
    done, original = [], GPTQ.refine
    monkeypatch.setattr(
        GPTQ, "refine", lambda self, draft, stats: done.append(draft.sites[0].path) or original(self, draft, stats)
    )
    job(tmp_path)
    assert done and all(path == "head" or path.startswith("blocks.5.") for path in done) and len(done) <= 7


def test_every_wave_is_in_the_journal_as_written(tmp_path):
    model = job(tmp_path)
    journal_files = sorted(p.name for p in tmp_path.iterdir())
    assert journal_files[0] == "journal-module.json" and all(n.startswith("wave-module-") for n in journal_files[1:])
    float_model, kept = tiny.net(6), {}
    calls = timed(tiny.net_calls(4, 1), float_model).hold_out()
    from qgen.probe import probe
    from qgen.waves import passes, plan

    (wave,) = plan([(s, RECIPE.default) for s in probe(float_model, calls.calls[0])], 512 << 20)
    waves = [[s.path for s in part.sites] for part in passes(wave, 1)]
    journal = Journal.open(tmp_path, "", float_model, RECIPE, calls, 0, waves)
    for number in range(len(waves)):
        for path, (layout, slots, row) in journal.read(number).items():
            kept |= {f"{path}.{slot}": t for slot, t in slots.items()}
            assert layout == model.get_submodule(path).layout and row["path"] == path
    assert journal.read(len(waves)) is None
    assert equal(dict(sorted(kept.items())), dict(sorted(canonical(model).items())))
