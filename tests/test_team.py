"""Four processes of torchrun give what one gives: statistics, packed layers and report; also when one of them is killed on the way.

Processes are torchrun's, over gloo; they exchange what a script like any user's exchanges, which calls `qgen.quantize` and nothing else.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qgen
from qgen import Recipe, Spec, engine
from qgen.calibration.recorder import Recorder
from qgen.methods.bias import BiasCorrection
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.probe import probe
from qgen.team import ALONE, Team, team_for
from qgen.waves import measure, owners, plan
from tests import tiny
from tests.test_resume import canonical, equal

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Recipe(Spec("int4_g64", "uint4_g64", (Smooth(), LowRank(8), GPTQ(), BiasCorrection()), bins=2))

SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests import test_team
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
what, folder = sys.argv[1:3]
if what == "killed" and rank == 2 and start == 0:
    test_team.die_in_wave(3)
model, report = test_team.JOBS[what](folder)
save_file(test_team.told(model, report), f"{folder}/{what}-{rank}.safetensors", {"start": str(start)})
"""


def pipeline(folder):
    """Prompts, recorded and replayed in shares; each block a wave."""
    pipe = tiny.Pipe(4)
    recorder = Recorder(samples=10, steps=2, batch=1)
    qgen.quantize(
        pipe, RECIPE, prompts=[f"prompt {i}" for i in range(10)], calibration=recorder, memory=1, progress=False
    )
    return pipe.transformer, pipe.transformer.qgen_report


def killed(folder):
    """As `pipeline`, with a journal."""
    pipe = tiny.Pipe(4)
    recorder = Recorder(samples=10, steps=2, batch=1)
    options = {"prompts": [f"prompt {i}" for i in range(10)], "calibration": recorder, "memory": 1, "progress": False}
    qgen.quantize(pipe, RECIPE, checkpoint=f"{folder}/journal", distributed=True, **options)
    return pipe.transformer, pipe.transformer.qgen_report


def spoilt(folder):
    """One call of twenty holds NaN, and another one overflows inside: both are left out, whoever replays them."""
    calls = list(tiny.net_calls(10, 2).calls)
    calls[5].args[0][0, 0, 0] = float("nan")
    calls[11].args[0][:] = 3e38
    model = tiny.net(2)
    qgen.quantize(model, RECIPE, calibration=calls, progress=False)
    return model, model.qgen_report


JOBS = {"pipeline": pipeline, "killed": killed, "spoilt": spoilt}


def die_in_wave(number):
    """This process kills itself in the middle of a replay."""
    seen, whole = [], engine.measure

    def fatal(items):
        for i, item in enumerate(items):
            if i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    def counted(module, wave, calls, seed, progress, team):
        seen.append(wave)
        if len(seen) == number:
            progress = fatal
        return whole(module, wave, calls, seed, progress, team)

    engine.measure = counted


def told(model, report):
    """Packed layers, and of the report the errors and why the output row says what it says."""
    numbers = {f"sqnr of {row['path']}": torch.tensor(row["sqnr_db"]) for row in report if "sqnr_db" in row}
    words = report[-1]["why"].encode()
    return {**canonical(model), **numbers, "words": torch.tensor(list(words), dtype=torch.uint8)}


def torchrun(tmp_path, what, restarts=0, processes=4):
    """What each process saved, and how often they had been started again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", str(script), what, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    from safetensors import safe_open

    files = [tmp_path / f"{what}-{rank}.safetensors" for rank in range(processes)]
    starts = []
    for file in files:
        with safe_open(file, "pt") as opened:
            starts.append(int(opened.metadata()["start"]))
    return [load_file(file) for file in files], starts, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pipeline", "spoilt"])
def test_four_processes_give_what_one_gives(tmp_path, what):
    alone = dict(sorted(told(*JOBS[what](tmp_path)).items()))
    found, *_ = torchrun(tmp_path, what)
    for one in found:
        assert equal(dict(sorted(one.items())), alone)
    if what == "spoilt":
        assert "sample 2, step 1" in bytes(alone["words"].tolist()).decode()
        assert "sample 5, step 1" in bytes(alone["words"].tolist()).decode()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by SIGKILL")
def test_a_worker_killed_in_the_middle_is_started_again(tmp_path):
    alone = dict(sorted(told(*pipeline(tmp_path)).items()))
    found, starts, errors = torchrun(tmp_path, "killed", restarts=1)
    assert starts == [1] * 4 and "exitcode: -9" in errors, "nobody was killed"
    for one in found:
        assert equal(dict(sorted(one.items())), alone)


def test_the_work_is_divided():
    sites = probe(tiny.net(4), tiny.net_call())
    (wave,) = plan([(site, RECIPE.default) for site in sites], 1 << 60)
    for size in (1, 3, 4):
        owner = owners(wave, size)
        assert set(owner) == {site.shares for site in sites} and set(owner.values()) == set(range(size))
    assert Team(1, 3).mine(range(7)) == range(1, 7, 3)


def test_statistics_of_shares_are_those_of_all():
    """Exact: maxima, samples of rows. Equal to 1e-6 as required, and to the bit here: sums."""
    model, calls = tiny.net(2), tiny.net_calls(6, 2).hold_out()
    sites = [site for site in probe(model, calls.calls[0]) if site.role == "inside"]
    (wave,) = plan([(site, RECIPE.default) for site in sites], 1 << 60)
    whole = measure(model, wave, calls, 0, iter)
    halves = [measure(model, wave, replace(calls, calls=calls.calls[rank::2]), 0, iter) for rank in range(2)]
    for shares in whole:
        for name, observer in halves[0]._banks[shares].items():
            observer.merge(halves[1]._banks[shares][name])
        a, b = whole[shares], halves[0][shares]
        assert torch.equal(a.fit, b.fit) and torch.equal(a.held, b.held) and torch.equal(a.absmax, b.absmax)
        assert torch.equal(a.gram, b.gram) and torch.equal(a.absmean, b.absmean)


def test_alone_where_nobody_else_is(monkeypatch):
    with team_for("auto", "job") as team:
        assert team is ALONE and team.all(3) == [3] and team.lead(lambda: 4) == 4 and list(team.collect(None, 0)) == []
    with pytest.raises(
        ValueError, match=r"wants several processes, found this one alone: start the script with torchrun"
    ):
        qgen.quantize(tiny.plain(), "rtn-int4", distributed=True, progress=False)
    with pytest.raises(ValueError, match=r'distributed is "auto", True or False, found 4'):
        qgen.quantize(tiny.plain(), "rtn-int4", distributed=4, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of another program: only torchrun's own variables count
    with team_for("auto", "job") as team:
        assert team is ALONE
