"""The page as a whole: tabs, what the browser remembers, what happens when a page loads again, and the server behind it.

Nothing is fetched from anywhere: fonts are the system's, analytics are off, and Gradio's own files come from its package.
"""

__all__ = ["Settings", "build", "serve", "stop"]

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgen.errors import QgenError
from qgen.show.page import tag
from qgen.web import evaluate, gallery, generate, inspect, markup, quantize, style
from qgen.web.desk import KEPT, Desk, Tab
from qgen.web.errors import told
from qgen.web.jobs import OPEN, Jobs
from qgen.web.models import BEST, QUICK, Models
from qgen.web.roots import Roots
from qgen.web.worker import command

log = logging.getLogger("qgen")

TITLE = "qgen: 16 bits and 4 bits, side by side"
_ABOUT = (
    "The same prompt and the same noise, drawn at 16 bits and at 4. The shipped model draws 64 x 64 emoji (prompts such as *noto owl* or "
    "*flat penguin*) and needs no download; bring your own under Quantize."
)


@dataclass(frozen=True)
class Settings:
    """work: folder for jobs and the calibrated shipped model. roots: folders that path fields may reach, beside work's own results.

    hub: whether models may be fetched. waiting: jobs that may wait to draw, and heavy ones. prepare: calibrate the shipped model in the
    background. device: where models run, as `qgen.named.device_of` has it. worker: another program than `qgen.web.worker` for heavy jobs.
    """

    work: Path
    roots: tuple[Path, ...] = ()
    hub: bool = False
    waiting: tuple[int, int] = (64, 8)
    prepare: bool = True
    device: str = "auto"
    worker: tuple[str, ...] = ()


def build(settings: Settings) -> tuple[Any, Desk]:
    """The page, a `gr.Blocks` that is not launched yet, and the desk behind it. The shipped pair is loaded before this returns."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    work = settings.work.resolve()
    (work / "saved").mkdir(parents=True, exist_ok=True)
    jobs = Jobs(work / "jobs", {"draw": settings.waiting[0], "heavy": settings.waiting[1]})
    models = Models(jobs, work, settings.device, settings.worker or command(settings.device))
    desk = Desk(jobs, models, Roots((work / "saved", *settings.roots), settings.hub))
    for _, name in models.choices():
        models.pair(models.source(name))
    if settings.prepare:
        models.prepare()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Column(elem_id="title"):
            gr.Markdown(f"# qgen\n{_ABOUT}")
        note = gr.HTML(_preparing(models), elem_id="preparing", padding=False)
        mine = gr.BrowserState([], storage_key="qgen-mine", secret="qgen-web")
        tabs = {}
        for module in (generate, quantize, evaluate, inspect, gallery):
            name = module.__name__.rpartition(".")[2]
            with gr.Tab(name.capitalize(), id=name, elem_id=f"tab-{name}"):
                tabs[name] = module.build(desk)
        _wire(page, desk, mine, note, tabs)
    return page, desk


def _wire(page: Any, desk: Desk, mine: Any, note: Any, tabs: dict[str, Tab]) -> None:
    """Lists that follow what there is, jobs that outlive a reload, and functions for programs."""
    import gradio as gr

    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

    def remember(known: list, name: str) -> list:
        return [name, *(other for other in known or [] if other != name)][:KEPT] if name else known

    def lists(known: list) -> list:
        choices = desk.models.choices(known)
        return [gr.Dropdown(choices=choices) for _ in desk.lists]

    def first(known: list, *ids: str) -> list:
        choices = desk.models.choices(known)
        names = {name for _, name in choices}
        wanted = [desk.chosen(job_id) for job_id in ids]
        return [gr.Dropdown(choices=choices, value=one if one in names else choices[0][1]) for one in wanted]

    def tick(known: list) -> list:
        return [_preparing(desk.models), gr.Timer(active=_busy(desk.models)), *lists(known)]

    timer = gr.Timer(2, active=_busy(desk.models))
    timer.tick(tick, mine, [note, timer, *desk.lists], **quiet)
    quantized = tabs["quantize"]
    quantized.job_id.change(remember, [mine, quantized.job_id], mine, **quiet)
    quantized.ran.then(lists, mine, desk.lists, **quiet)
    page.load(first, [mine, *desk.homes], desk.lists, **quiet)
    for tab in tabs.values():
        for handler, source, outputs in tab.back:
            shown = page.load(handler, source, outputs, **quiet)
        if tab is quantized:  # when this job ends, another model may be there
            shown.then(lists, mine, desk.lists, **quiet)
    gr.api(told(desk.cancel), api_name="cancel", queue=False)
    gr.api(told(_job_of(desk)), api_name="job", queue=False)
    gr.api(told(_models_of(desk)), api_name="models", queue=False)


def _job_of(desk: Desk) -> Callable:
    def job(job_id: str) -> dict:
        """State, progress, log and result of a job, as JSON."""
        found = desk.jobs.get(job_id)
        if found is None:
            raise ValueError("there is no job of that id here")
        facts = found.facts() | {"ahead": desk.jobs.ahead(found)}
        if "rows" in facts["result"]:  # Gradio's clients take a dictionary with the key "path" for a file to fetch
            rows = [
                {"layer" if key == "path" else key: value for key, value in row.items()}
                for row in facts["result"]["rows"]
            ]
            facts["result"] = facts["result"] | {"rows": rows}
        return facts

    return job


def _models_of(desk: Desk) -> Callable:
    def models() -> list:
        """Names of the shipped 4-bit models that are ready; that of one's own is job: and the id of its quantize job."""
        return [name for _, name in desk.models.choices()]

    return models


def _busy(models: Models) -> bool:
    return models.preparing is not None and models.preparing.state in OPEN


def _preparing(models: Models) -> str:
    """A line about the calibration in the background; nothing once it is done."""
    job = models.preparing
    if models.ready or job is None:
        return ""
    if job.state in ("failed", "cancelled"):
        return markup.boxed(
            tag("p", f"{BEST} could not be calibrated ({job.error or job.state}); {QUICK} is here.", class_="warn")
        )
    share = f", {100 * job.done / job.total:.0f} %" if job.total else ""
    now = f"{job.doing or 'waiting'}{share}"
    words = (
        f"{BEST}, the better recipe, is being calibrated in the background ({now}) and then joins the list of models."
    )
    return markup.boxed(tag("p", words, class_="soft"))


def serve(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    block: bool = True,
) -> tuple[Any, Desk, str]:
    """Builds the page and serves it; returns page, desk and address. block: returns only when the server is stopped."""
    os.environ.setdefault("GRADIO_TEMP_DIR", str(settings.work.resolve() / "gradio"))
    page, desk = build(settings)
    page.queue(max_size=4 * sum(settings.waiting), default_concurrency_limit=16, status_update_rate=10)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=share, auth=auth, quiet=True, inbrowser=False, ssr_mode=False, pwa=False,
            mcp_server=False, footer_links=["api", "settings"], prevent_thread_lock=True, show_error=True, max_file_size="1mb",
            allowed_paths=[str(desk.jobs.folder)], theme=style.theme(), css=style.CSS, head=style.HEAD, run_history=False,
            enable_monitoring=False,
        )  # fmt: skip
    except OSError as error:
        desk.jobs.close()
        raise QgenError(f"the page cannot be served at {host}, port {port or 'any'}: {error}") from None
    log.info("serving at %s", address)
    if block:
        with contextlib.suppress(KeyboardInterrupt):
            page.block_thread()
        stop(page, desk)
    return page, desk, address


def stop(page: Any, desk: Desk) -> None:
    """Ends jobs and the server."""
    desk.jobs.close()
    page.close(verbose=False)
