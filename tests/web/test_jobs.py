"""Order, limits, cancelling, and what is left of jobs after a restart."""

import threading
import time

import pytest

from qgen.errors import QgenError
from qgen.web.jobs import Cancelled, Full, Jobs


def wait(job, *states):
    until = time.monotonic() + 20
    while job.state not in states:
        assert time.monotonic() < until, f"{job.state}, wanted {states}"
        time.sleep(0.005)


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(tmp_path / "jobs", {"draw": 3})
    yield made
    made.close()


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


def blocked(gate):
    def run(job):
        while not gate.is_set():
            job.step("waiting for the gate")
            time.sleep(0.005)
        job.result = {"answer": job.asked["n"]}

    return run


def test_one_lane_runs_in_order(jobs):
    order, threads = [], set()

    def run(job):
        order.append(job.asked["n"])
        threads.add(threading.get_ident())
        time.sleep(0.01)

    made = [jobs.submit("heavy", "x", {"n": n}, run) for n in range(6)]
    for job in made:
        wait(job, "done")
    assert order == list(range(6)) and len(threads) == 1


def test_lanes_run_side_by_side(jobs, gate):
    slow = jobs.submit("draw:a", "x", {"n": 0}, blocked(gate))
    quick = jobs.submit("draw:b", "x", {"n": 1}, lambda job: None)
    wait(quick, "done")
    assert slow.state == "running"


def test_a_full_lane_refuses_and_a_cancelled_job_frees_its_place(jobs, gate):
    running = jobs.submit("draw:a", "x", {"n": 0}, blocked(gate))
    wait(running, "running")
    waiting = [jobs.submit("draw:a", "x", {"n": n}, blocked(gate)) for n in (1, 2, 3)]
    assert [jobs.ahead(job) for job in waiting] == [1, 2, 3]
    with pytest.raises(Full, match="3 jobs are waiting"):
        jobs.submit("draw:a", "x", {"n": 4}, blocked(gate))
    jobs.cancel(waiting[0].id)
    assert waiting[0].state == "cancelled" and [jobs.ahead(job) for job in waiting[1:]] == [1, 2]
    last = jobs.submit("draw:a", "x", {"n": 5}, blocked(gate))
    jobs.cancel(running.id)
    wait(running, "cancelled")
    gate.set()
    for job in (*waiting[1:], last):
        wait(job, "done")
    assert [job.result["answer"] for job in (*waiting[1:], last)] == [2, 3, 5]


def test_a_failed_job_says_why_and_the_lane_goes_on(jobs):
    def fails(error):
        def run(job):
            raise error

        return run

    told = jobs.submit("heavy", "x", {}, fails(QgenError("the disk is full")))
    bug = jobs.submit("heavy", "x", {}, fails(KeyError("secret detail")))
    last = jobs.submit("heavy", "x", {}, lambda job: None)
    wait(last, "done")
    assert (told.state, told.error) == ("failed", "The disk is full")
    assert bug.state == "failed" and "KeyError" in bug.error and "secret" not in bug.error


def test_results_are_there_after_a_restart_and_open_jobs_are_said_to_be_lost(jobs, gate, tmp_path):
    done = jobs.submit("heavy", "x", {"n": 7}, lambda job: job.result.update(answer=7))
    wait(done, "done")
    open_ = jobs.submit("heavy", "x", {"n": 8}, blocked(gate))
    wait(open_, "running")
    again = Jobs(tmp_path / "jobs")
    assert again.get(done.id).result == {"answer": 7} and again.get(done.id).state == "done"
    assert again.get(open_.id).state == "failed" and "restarted" in again.get(open_.id).error


@pytest.mark.parametrize("name", ["", None, 7, "../../etc", "0" * 16, "..%2f", ["x"], "A" * 16])
def test_ids_that_are_none_find_nothing(jobs, name):
    assert jobs.get(name) is None and jobs.cancel(name) is None


def test_ids_do_not_repeat(jobs):
    made = [jobs.submit("heavy", "x", {"n": n}, lambda job: None) for n in range(8)]
    assert len({job.id for job in made}) == 8 and all(len(job.id) == 16 for job in made)


def test_cancel_reaches_a_running_job_at_its_next_step(jobs):
    seen = []

    def run(job):
        try:
            while True:
                job.step("busy")
                time.sleep(0.002)
        except Cancelled:
            seen.append("stopped")
            raise

    job = jobs.submit("heavy", "x", {}, run)
    wait(job, "running")
    jobs.cancel(job.id)
    wait(job, "cancelled")
    assert seen == ["stopped"]
