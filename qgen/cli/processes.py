"""The same command in several processes of this computer, which share the drawing (see `qgen.eval.resume`).

Each finds its rank where torchrun would put it, and accelerate reads it there: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
`accelerate launch` itself starts one process alone on a computer without a GPU, whatever number it is given.
"""

__all__ = ["relaunch"]

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

GRACE = 10.0  # seconds the first process gets to say itself what another one failed of


def relaunch(args: Sequence[str], processes: int, cpu: bool) -> int:
    """Runs `qgen` with these arguments, without their --processes, in so many processes, and returns the first exit code that is not 0.

    The first process alone speaks; of another's output the end is shown if that one fails first. When one fails the others are ended:
    they would wait for it. cpu: no GPU is to be used, though there may be one.
    """
    kept = [
        a
        for i, a in enumerate(args)
        if a.partition("=")[0] != "--processes" and (i == 0 or args[i - 1] != "--processes")
    ]
    shared = {
        **os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()), **({"ACCELERATE_USE_CPU": "true"} if cpu else {}),
    }  # fmt: skip
    with tempfile.TemporaryFile() as quiet:
        crew = []
        try:
            for rank in range(processes):
                output = {} if rank == 0 else {"stdout": quiet, "stderr": quiet}
                env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                crew.append(subprocess.Popen([sys.executable, "-m", "qgen", *kept], env=env, **output))
            while any(process.poll() is None for process in crew) and not any(process.poll() for process in crew):
                time.sleep(0.1)
            code = next((process.returncode for process in crew if process.poll()), 0)
            spoke = _ends_by_itself(crew[0], GRACE if code else 0) and crew[0].returncode
        finally:
            for process in crew:
                if process.poll() is None:
                    process.terminate()
            for process in crew:
                _wait(process)
        if code and not spoke:
            quiet.seek(0)
            sys.stderr.write("\n".join(quiet.read().decode(errors="replace").splitlines()[-5:]) + "\n")
    return code


def _ends_by_itself(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(process: subprocess.Popen) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
