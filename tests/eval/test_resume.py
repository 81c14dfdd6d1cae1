"""Killed in the middle, drawing goes on: finished pictures stay, and the numbers are those of an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from qgen.errors import BadData
from qgen.eval.evaluate import evaluate
from qgen.eval.fingerprint import fingerprint
from qgen.eval.resume import Share, generate_into, plan
from qgen.eval.store import Store

pytest.importorskip("PIL")

# A pipeline whose pictures are its noise, that writes down what it draws, and is slow enough to be killed.
PROGRAM = """
import os, sys, time, torch
from qgen.eval.resume import generate_into

class Painter:
    fingerprint = "painter"
    def __call__(self, prompt, generator, output_type="np"):
        time.sleep(float(sys.argv[3]))
        with open(sys.argv[2], "a") as log:
            log.writelines(f"{os.getpid()} {p}\\n" for p in prompt)
        return type("R", (), {"images": torch.stack([torch.rand(16, 16, 3, generator=g) for g in generator]).numpy()})

generate_into(sys.argv[1], Painter(), [f"prompt {i}" for i in range(24)], batch_size=3, progress=False)
"""
PROMPTS = [f"prompt {i}" for i in range(24)]


class Painter:
    """The same pipeline in this process; `wrong` is added to its pictures."""

    fingerprint = "painter"

    def __init__(self):
        self.drawn = []

    def __call__(self, prompt, generator, output_type="np"):
        self.drawn += prompt
        return type("R", (), {"images": torch.stack([torch.rand(16, 16, 3, generator=g) for g in generator]).numpy()})


# The class's name is part of a model's fingerprint, and both are called Painter.
def run(folder, **options):
    painter = Painter()
    return painter, generate_into(folder, painter, PROMPTS, batch_size=3, progress=False, **options)


def test_kill_9_in_the_middle_loses_nothing_that_was_finished(tmp_path):
    folder, log = tmp_path / "samples", tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(log), "0.15"]
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 120
        while len(list((folder / "records").glob("*.json"))) < 3 and time.monotonic() < until:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = [
        p
        for f in (folder / "records").glob("[!.]*.json")
        for p in (e["prompt"] for e in json.loads(f.read_text()).values())
    ]
    assert 9 <= len(finished) < 24
    painter, pictures = run(folder)
    assert not set(painter.drawn) & set(finished)
    assert set(painter.drawn) | set(finished) == set(PROMPTS)
    _, whole = run(tmp_path / "other")
    assert torch.equal(pictures, whole)
    options = {"metrics": ("psnr", "ssim"), "prompts": PROMPTS}
    reference = whole.flip(0)
    assert evaluate(pictures, reference, **options).to_json() == evaluate(whole, reference, **options).to_json()
    again, _ = run(folder)
    assert again.drawn == []


def test_a_damaged_picture_is_drawn_again_and_nothing_else(tmp_path):
    _, before = run(tmp_path)
    victim = Store(tmp_path, json.loads((tmp_path / "settings.json").read_text())).key("prompt 7")
    path = tmp_path / "pictures" / f"{victim}.png"
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "records" / "junk.json").write_text("{")
    painter, after = run(tmp_path)
    assert painter.drawn == ["prompt 7"]
    assert torch.equal(before, after)


def test_other_settings_or_another_model_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: seed 0 \(now 1\)"):
        run(tmp_path, seed=1)

    class Other(Painter):
        fingerprint = "other"

    with pytest.raises(ValueError, match=r"other settings: model"):
        generate_into(tmp_path, Other(), PROMPTS, batch_size=3, progress=False)


def test_shares_cover_every_batch_once_and_give_the_same_pictures(tmp_path):
    waits = []
    for rank in (1, 0):
        painter = Painter()
        share = Share(rank, 2, lambda: waits.append(1))
        if rank == 1:
            with pytest.raises(BadData, match="no finished picture"):  # the other half is not there yet
                generate_into(tmp_path / "two", painter, PROMPTS, batch_size=3, progress=False, share=share)
            first = painter.drawn
        else:
            found = generate_into(tmp_path / "two", painter, PROMPTS, batch_size=3, progress=False, share=share)
    assert sorted(first + painter.drawn) == sorted(PROMPTS) and len(first) == 12 and waits == [1, 1]
    assert torch.equal(found, run(tmp_path / "one")[1])


def test_repeated_and_strange_prompts(tmp_path):
    strange = ["🦉🍕", "בומה ירוקה", "x" * 2**20, "🦉🍕", "a/b\0c", "\ud800 lone"]
    painter = Painter()
    found = generate_into(tmp_path, painter, strange, batch_size=4, progress=False)
    assert torch.equal(found[0], found[3]) and len(painter.drawn) == 5
    again = Painter()
    assert torch.equal(generate_into(tmp_path, again, strange, batch_size=4, progress=False), found)
    assert again.drawn == [] and plan(strange, 4)[0] == strange[:3] + strange[4:5]


def test_evaluate_keeps_its_pictures(tmp_path):
    first = evaluate(Painter(), Painter(), PROMPTS, metrics=("psnr",), batch_size=3, progress=False, resume=tmp_path)
    painter = Painter()
    second = evaluate(painter, Painter(), PROMPTS, metrics=("psnr",), batch_size=3, progress=False, resume=tmp_path)
    assert first == second and painter.drawn == []


def test_fingerprint_changes_with_one_weight_and_one_setting():
    layer = torch.nn.Linear(4, 3)
    before = fingerprint(layer)
    assert before == fingerprint(layer)
    with torch.no_grad():
        layer.weight[1, 2] += 1e-3
    assert fingerprint(layer) != before
    assert fingerprint(layer.half()) != before


@pytest.mark.slow
def test_two_processes_of_accelerate_share_the_drawing(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "program.py").write_text(PROGRAM)
    logs, folder = tmp_path / "log", tmp_path / "samples"
    launch = [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "program.py"),
        str(folder),
        str(logs),
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-m", *launch], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = [line.split(" ", 1) for line in logs.read_text().splitlines()]
    assert sorted(prompt for _, prompt in drawn) == sorted(PROMPTS)
    shares = [sum(who == pid for pid, _ in drawn) for who in {pid for pid, _ in drawn}]
    assert shares == [12, 12], "two processes, half of the pictures each"
    painter, pictures = run(folder)
    assert painter.drawn == []
    assert torch.equal(pictures, run(tmp_path / "one")[1])


@pytest.mark.slow
def test_ray_retries_what_a_killed_worker_took_with_it(tmp_path):
    pytest.importorskip("ray", reason="drawing on several machines needs the package ray")
    from qgen.eval.ray_draw import draw_on_ray

    marker = str(tmp_path / "killed")

    def make():
        """Made here, so that Ray sends it by value: the first worker to draw its second batch is killed with -9."""
        import os

        import torch

        class Painter:
            fingerprint = "painter"
            calls = 0

            def __call__(self, prompt, generator, output_type="np"):
                self.calls += 1
                if self.calls == 2 and not os.path.exists(marker):
                    open(marker, "w").close()
                    os.kill(os.getpid(), 9)
                pictures = [torch.rand(16, 16, 3, generator=g) for g in generator]
                return type("R", (), {"images": torch.stack(pictures).numpy()})

        return Painter()

    found = draw_on_ray(make, PROMPTS, tmp_path / "ray", workers=2, batch_size=3, progress=False)
    assert os.path.exists(marker), "no worker was killed"
    assert torch.equal(found, run(tmp_path / "one")[1])
