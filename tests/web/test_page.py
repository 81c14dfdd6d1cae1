"""The page as programs see it: twenty visitors at once, cancelling, killed workers, and everything that may be typed wrongly."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qgen.web.app import Settings

httpx = pytest.importorskip("httpx")
pytest.importorskip("diffusers", reason="the shipped model is a diffusers pipeline: install qgen-diffusion[diffusers]")
gradio_client = pytest.importorskip("gradio_client")


MODEL = "shipped:rtn-int4"
DRAW = {
    "prompt": "noto owl",
    "model": MODEL,
    "seed": 1,
    "new_seed": False,
    "steps": 2,
    "guidance": 3,
    "width": 0,
    "height": 0,
    "gain": 4,
}
QUANTIZE = {
    "model": "demo",
    "recipe": "rtn-int4",
    "rank": 0,
    "budget": "",
    "samples": 2,
    "keep": 1,
    "steps": 0,
    "prompts": "",
    "prompt_file": "",
    "memory": "",
    "skip": "",
    "seed": 0,
    "heat": False,
}
EVALUATE = {
    "model": MODEL,
    "prompt_set": "held_out",
    "text": "",
    "file": "",
    "n": 2,
    "metrics": ["psnr"],
    "steps": 2,
    "seed": 0,
    "networks": "auto",
    "real": "",
}
SLEEPER = "say(say='ready')\nwhile True:\n    time.sleep(0.05)\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    (folder / "inside").mkdir()
    (folder / "outside").mkdir()
    (folder / "inside" / "prompts.txt").write_text("noto owl\nflat penguin\n", encoding="utf-8")
    (folder / "inside" / "noise.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "inside" / "long.csv").write_text("prompt\n" + "x" * 2**20 + "\n", encoding="utf-8")
    (folder / "inside" / "table.csv").write_text("words\nowl\n", encoding="utf-8")
    (folder / "inside" / "locked").mkdir()
    return folder


@pytest.fixture(scope="module")
def page(serve_page, root):
    """(desk, a function that gives a new client, the worker's script, address) of a page whose heavy jobs run that script."""
    with serve_page(Settings(root / "work", (root / "inside",), prepare=False)) as (desk, address, script):
        yield desk, lambda: gradio_client.Client(address, verbose=False), script, address.rstrip("/")


@pytest.fixture(scope="module")
def call(page):
    """A function: one endpoint, with changes to its usual arguments."""
    client = page[1]()

    def made(api, usual, **changes):
        return client.predict(*(usual | changes).values(), api_name=api)

    return made


def wait(found, what):
    until = time.monotonic() + 30
    while not found():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def test_every_action_has_its_name(page):
    names = set(page[1]().view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert names == {
        f"/{n}" for n in ("generate", "quantize", "save", "evaluate", "inspect", "gallery", "cancel", "job", "models")
    }


def test_a_drawing_is_what_the_pipelines_draw(page, call, demo_pipe):
    """Pixels and PSNR against the shipped pipeline called directly."""
    import numpy as np
    import torch
    from PIL import Image

    import qgen

    job_id, status, seed, (before, after), difference, _ = call("/generate", DRAW, seed=7, steps=3)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    wanted = []
    for recipe in (None, "rtn-int4"):
        if recipe:
            qgen.quantize(demo_pipe, recipe, progress=False)
        picture = demo_pipe("noto owl", generator=torch.Generator().manual_seed(7), **options).images[0]
        wanted.append(np.asarray(picture.convert("RGB")).astype(int))
    for path, picture in zip((before, after), wanted, strict=True):
        shown = np.asarray(Image.open(path))
        assert shown.shape == (512, 512, 3) and np.array_equal(shown[::8, ::8], picture)
    gaps = np.abs(wanted[1] - wanted[0])
    assert np.array_equal(np.asarray(Image.open(difference))[::8, ::8], (4 * gaps).clip(0, 255))
    facts = call("/job", {"job_id": job_id})
    assert facts["state"] == "done" and seed == 7 and job_id in status
    assert facts["result"]["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(gaps**2)))
    assert facts["result"]["bytes4"] < facts["result"]["bytes16"] / 2


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_twenty_visitors_each_get_their_own_picture_in_order(page):
    """Rounds of twenty; the first warms up. Answers come in the order of the queue, and memory is back within 5 % after the last."""
    import gc

    desk, address = page[0], page[3]

    def ask(n, base):
        arguments = DRAW | {"seed": base + n, "prompt": "flat penguin" if n % 2 else "noto owl", "steps": 1}
        post = httpx.post(f"{address}/gradio_api/call/generate", json={"data": list(arguments.values())}, timeout=60)
        said = httpx.get(f"{address}/gradio_api/call/generate/{post.json()['event_id']}", timeout=120).text.split(
            "event: "
        )
        assert said[-1].startswith("complete"), said[-1]
        answer = json.loads(said[-1].partition("data: ")[2])
        return answer[0], answer[2]

    def round_(base):
        with ThreadPoolExecutor(20) as pool:
            return list(pool.map(lambda n: ask(n, base), range(20)))

    round_(0)
    gc.collect()
    before = rss()
    for base in (100, 200):
        answers = round_(base)
    gc.collect()
    assert [seed for _, seed in answers] == [200 + n for n in range(20)]
    jobs = [desk.jobs.get(name) for name, _ in answers]
    assert [job.asked["seed"] for job in jobs] == [200 + n for n in range(20)]
    ended = sorted(jobs, key=lambda job: (job.folder / "job.json").stat().st_mtime_ns)
    made = sorted(jobs, key=lambda job: job.made)
    assert ended == made, "jobs did not end in the order in which they came"
    after = rss()
    print(
        f"20 visitors at once, twice: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after, {after / before - 1:+.2%}"
    )
    assert after <= 1.05 * before


def test_a_full_queue_is_said_and_a_cancelled_drawing_frees_its_place(page, call):
    desk, client, *_ = page
    gate = threading.Event()

    def held(job):
        while not gate.is_set():
            job.step("held")
            time.sleep(0.01)

    most, desk.jobs.most["draw"] = desk.jobs.most["draw"], 1
    try:
        running = desk.jobs.submit("draw:demo", "generate", {"seed": 0}, held)
        wait(lambda: running.state == "running", "the lane did not start")
        waiting = desk.jobs.submit("draw:demo", "generate", {"seed": 0}, held)
        with pytest.raises(Exception, match="queue is full"):
            call("/generate", DRAW)
        assert call("/cancel", {"job_id": waiting.id}) == "cancelled"
        answer = client().submit(*DRAW.values(), api_name="/generate")
        assert call("/cancel", {"job_id": running.id}) == "cancelled"
        assert len(answer.result(timeout=60)) == 6
        assert (waiting.state, running.state) == ("cancelled", "cancelled")
    finally:
        gate.set()
        desk.jobs.most["draw"] = most


def test_a_killed_worker_is_an_error_and_the_page_lives_on(page, call):
    desk, client, script, _ = page
    script.write(SLEEPER)
    answer = client().submit(*QUANTIZE.values(), api_name="/quantize")
    wait(lambda: answer.outputs() and desk.jobs.get(answer.outputs()[0][0]).log, "no worker")
    job = desk.jobs.get(answer.outputs()[0][0])
    os.kill(job.live["pid"], signal.SIGKILL)
    with pytest.raises(Exception, match=r"worker process was killed .signal 9"):
        answer.result(timeout=60)
    assert call("/job", {"job_id": job.id})["state"] == "failed"
    assert len(call("/generate", DRAW)) == 6


def test_a_cancelled_worker_is_gone_and_the_next_one_runs(page, call):
    desk, client, script, _ = page
    script.write(SLEEPER)
    answer = client().submit(*EVALUATE.values(), api_name="/evaluate")
    wait(lambda: answer.outputs() and desk.jobs.get(answer.outputs()[0][0]).log, "no worker")
    job = desk.jobs.get(answer.outputs()[0][0])
    assert call("/cancel", {"job_id": job.id}) == "cancelled"
    wait(lambda: job.state == "cancelled", "it went on")
    with pytest.raises(ProcessLookupError):
        os.kill(job.live["pid"], 0)
    script.write("say(error='it was my turn')\n")
    with pytest.raises(Exception, match="It was my turn"):
        call("/quantize", QUANTIZE)


@pytest.mark.parametrize(
    "prompt", ["🦉🌻", "בומה לילית", "بومة", "x" * 2000, "<script>alert(1)</script>", "owl\nwith a hat", "\u202eowl"]
)
def test_prompts_of_any_script_are_drawn(call, prompt):
    answer = call("/generate", DRAW, prompt=prompt, steps=1)
    assert len(answer[3]) == 2 and "<script" not in answer[1] + answer[5]


BAD_DRAWINGS = [
    ({"prompt": "x" * 2**20}, "1,048,576 characters; at most 2,000"),
    ({"prompt": "  "}, "write a prompt"),
    ({"steps": 0}, "(?i)steps|minimum"),
    ({"steps": 2.5}, "whole number"),
    ({"seed": -1}, "seed must be from 0"),
    ({"seed": 2**40}, "seed"),
    ({"width": 33}, "multiple of 16"),
    ({"width": 1 << 20}, "width must be from"),
    ({"guidance": 1000}, "(?i)guidance|maximum"),
    ({"gain": 0}, "(?i)gain|minimum"),
    ({"model": "shipped:nothing"}, "no 4-bit model"),
    ({"model": "job:" + "0" * 16}, "no 4-bit model"),
    ({"model": "job:../../etc"}, "no 4-bit model"),
    ({"model": "shipped:svdquant-int4"}, "still being calibrated"),
]


@pytest.mark.parametrize(
    ("changes", "words"), BAD_DRAWINGS, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD_DRAWINGS)]
)
def test_what_cannot_be_drawn_is_said_in_words(call, changes, words):
    with pytest.raises(Exception, match=f"(?i){words.removeprefix('(?i)')}"):
        call("/generate", DRAW, **changes)


BAD_WORK = [
    ("/quantize", QUANTIZE, {"model": "{outside}"}, "outside the folders"),
    ("/quantize", QUANTIZE, {"model": "../outside"}, "outside"),
    ("/quantize", QUANTIZE, {"model": "nothing"}, "nothing is at"),
    ("/quantize", QUANTIZE, {"model": "owner/name"}, "may not fetch"),
    ("/quantize", QUANTIZE, {"recipe": "svdquant-int5"}, "svdquant-int4"),
    ("/quantize", QUANTIZE, {"rank": 8}, "low-rank"),
    ("/quantize", QUANTIZE, {"memory": "lots"}, "memory"),
    ("/quantize", QUANTIZE, {"prompt_file": "noise.bin"}, "no UTF-8"),
    ("/quantize", QUANTIZE, {"prompt_file": "locked"}, "is a folder"),
    ("/quantize", QUANTIZE, {"prompt_file": "/etc/passwd"}, "outside"),
    ("/quantize", QUANTIZE, {"samples": 0}, "calibration prompts"),
    ("/evaluate", EVALUATE, {"real": "/etc"}, "outside"),
    ("/evaluate", EVALUATE, {"metrics": []}, "at least one metric"),
    ("/evaluate", EVALUATE, {"prompt_set": "text"}, "at least one prompt"),
    ("/evaluate", EVALUATE, {"prompt_set": "text", "text": "x" * 2**20}, "1,048,576 characters; at most 2,000"),
    ("/evaluate", EVALUATE, {"prompt_set": "file", "file": "long.csv"}, "1,048,576 characters; at most 2,000"),
    ("/evaluate", EVALUATE, {"prompt_set": "file", "file": "table.csv"}, "a column called prompt"),
    ("/evaluate", EVALUATE, {"prompt_set": "file", "file": "mjhq:../outside"}, "outside"),
    ("/evaluate", EVALUATE, {"prompt_set": "file", "file": "mjhq:locked"}, "no meta_data.json"),
    ("/evaluate", EVALUATE, {"prompt_set": "everything"}, "held_out.*builtin.*text.*file"),
    ("/quantize", QUANTIZE, {"budget": "lots"}, "A budget is text such as '4.5 bits'"),
    ("/evaluate", EVALUATE, {"prompt_set": "file", "file": "../../x"}, "outside"),
    ("/inspect", {"model": MODEL, "path": "/etc/passwd"}, {}, "outside"),
    ("/inspect", {"model": "nothing", "path": ""}, {}, "no 4-bit model"),
    ("/save", {"job_id": "", "path": "x"}, {}, "no finished model"),
    ("/cancel", {"job_id": "0" * 16}, {}, "no such job"),
    ("/job", {"job_id": "../x"}, {}, "no job of that id"),
]


@pytest.mark.parametrize(
    ("api", "usual", "changes", "words"), BAD_WORK, ids=[f"{a[1:]}{i}" for i, (a, *_) in enumerate(BAD_WORK)]
)
def test_what_cannot_be_done_is_said_in_words(call, root, api, usual, changes, words):
    changes = {k: v.format(outside=root / "outside") if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(Exception, match=f"(?i){words}"):
        call(api, usual, **changes)


def test_files_of_the_server_are_not_served(page, root):
    address = page[3]
    (root / "outside" / "secret.txt").write_text("secret")
    for path in (
        root / "outside" / "secret.txt",
        "/etc/passwd",
        root / "work" / "jobs" / ".." / ".." / "outside" / "secret.txt",
    ):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)


def test_a_gallery_has_a_picture_a_seed_and_the_list_can_be_inspected(call):
    _, _, pictures = call(
        "/gallery", {"prompt": "noto owl", "model": MODEL, "seed": 4, "count": 2, "steps": 2, "guidance": 3}
    )
    assert [p["caption"].split(":")[0] for p in pictures] == ["seed 4", "seed 5"]
    assert "transformer_blocks.0.attn1.to_q" in call("/inspect", {"model": MODEL, "path": ""})[2]
    assert call("/models", {}) == [MODEL]
