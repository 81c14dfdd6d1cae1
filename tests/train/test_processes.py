"""Two processes take the same steps as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys, torch
torch.set_num_threads(1)
import qgen
from tests.tiny import net
from tests.train.test_finetune import ROUNDED, lessons, quantized
student = quantized(ROUNDED)
qgen.finetune(student, net(1), sys.argv[1], steps=6, batch=4, every=3, calibration=lessons(6, 2), checkpoint=sys.argv[2], progress=False)
if os.environ.get("RANK", "0") == "0":
    told = student.qgen_tuning
    print("TOLD" + json.dumps([told["curve"], list(told["held"].values())]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qzo", "brecq"])
def test_two_processes_are_one(method, tmp_path):
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }
    told = {}
    for count, launcher in launchers.items():
        command = [*launcher, str(tmp_path / "program.py"), method, str(tmp_path / str(count))]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        told[count] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD"))[4:])
    curves = [told[count][0] for count in (1, 2)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(set(curves[0])) == (24 if method == "brecq" else 6)
    assert told[1][1] == pytest.approx(told[2][1], rel=1e-4)
