"""Runs each test module that needs Triton's interpreter in a process of its own.

Triton decides when a kernel is decorated whether it will be compiled or interpreted, so the two kinds of test cannot
share a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import interpreting

HERE = Path(__file__).parent
MODULES = sorted(p.name for p in HERE.glob("test_*.py") if "\ninterpreter.needed()" in p.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(interpreting(), reason="this process is interpreted already: run the modules directly")
@pytest.mark.parametrize("module", MODULES)
def test_module_passes_interpreted(module):
    pytest.importorskip("triton", reason="kernels are written in Triton, which is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout, f"{module} ran no test:\n{done.stdout[-2000:]}"


def test_there_are_modules():
    assert "test_interpreter.py" in MODULES
