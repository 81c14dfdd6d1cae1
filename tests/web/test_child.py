"""A worker process: what it says arrives; killed, cancelled, silent or mute, it ends in a sentence and takes nothing with it."""

import os
import signal
import time

import pytest

from qgen.errors import QgenError
from qgen.web.child import run_in_child
from qgen.web.jobs import Cancelled, Job, Jobs


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    return Job("0" * 16, "x", {"recipe": "rtn-int4", "text": "שלום 🦉"}, folder)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_progress_log_and_result_arrive(job, script):
    command = script(
        "asked = json.load(open(os.path.join(folder, 'asked.json'), encoding='utf-8'))\n"
        "say(step=['half way', 1, 2]); say(say='a line'); say(show={'rows': [1]}); print('no JSON', flush=True)\n"
        "say(result={'text': asked['text'], 'here': os.getcwd()})\n"
    )
    run_in_child(job, list(command))
    assert job.result == {"text": "שלום 🦉", "here": str(job.folder)}
    assert (job.doing, job.done, job.total) == ("half way", 1, 2) and job.live["rows"] == [1]
    assert job.log[-1].endswith("a line")


def test_an_error_in_words_is_the_job_s_error(job, script):
    with pytest.raises(QgenError, match="no room left"):
        run_in_child(job, list(script("say(error='no room left')\n")))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("os.kill(os.getpid(), 9)\n", r"killed .signal 9, SIGKILL.*memory"),
        ("raise SystemExit(4)\n", "code 4"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("pass\n", "code 0: it said nothing"),
    ],
)
def test_a_process_that_ends_early_is_explained(job, script, lines, words):
    with pytest.raises(QgenError, match=words):
        run_in_child(job, list(script(lines)))


def test_cancelling_ends_the_process_even_one_that_does_not_listen(tmp_path, script):
    jobs = Jobs(tmp_path / "jobs")
    command = script("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(say='ready')\ntime.sleep(60)\n")
    job = jobs.submit("heavy", "x", {}, lambda job: run_in_child(job, list(command)))
    until = time.monotonic() + 20
    while not job.log and time.monotonic() < until:
        time.sleep(0.01)
    pid = job.live["pid"]
    assert alive(pid)
    jobs.cancel(job.id)
    while job.state == "running" and time.monotonic() < until:
        time.sleep(0.01)
    assert job.state == "cancelled" and not alive(pid)


def test_killed_from_outside_the_next_job_still_runs(tmp_path, script):
    jobs = Jobs(tmp_path / "jobs")
    command = script("say(say='ready')\ntime.sleep(60)\n")
    job = jobs.submit("heavy", "x", {}, lambda job: run_in_child(job, list(command)))
    until = time.monotonic() + 20
    while not job.log and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(job.live["pid"], signal.SIGKILL)
    after = jobs.submit("heavy", "x", {}, lambda job: job.result.update(ok=True))
    while after.state != "done" and time.monotonic() < until:
        time.sleep(0.01)
    assert job.state == "failed" and "SIGKILL" in job.error and after.result == {"ok": True}


def test_a_stopped_job_raises_cancelled(job, script):
    job.stop.set()
    with pytest.raises(Cancelled):
        run_in_child(job, list(script("time.sleep(60)\n")))


def test_the_worker_leaves_when_the_server_is_gone(tmp_path):
    import subprocess
    import sys

    code = "import threading, time; from qgen.web import worker\n"
    code += "threading.Thread(target=worker._leave_with_the_server, daemon=True).start(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(timeout=50) == 3
