"""A visitor's own model to 4 bits: what to quantize, how, live progress and log, the result and its worst layers, and saving it."""

__all__ = ["build"]

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from qgen.eval.prompt_sets import COPIES, PromptSet, load_prompts
from qgen.web import markup
from qgen.web.desk import Desk, Tab, identity
from qgen.web.errors import checked, told, whole
from qgen.web.jobs import Job
from qgen.web.roots import Roots

_MAX_PROMPTS = 4096
_MAX_FILE, _MAX_COPY = 4 << 20, 256 << 20  # bytes of a file of prompts, and of a benchmark's copy
FIELDS = (
    "model", "recipe", "rank", "budget", "samples", "keep", "steps", "prompts", "prompt_file", "memory", "skip", "seed", "heat",
)  # fmt: skip


def read_prompts(roots: Roots, path: str) -> PromptSet:
    """The prompts of a file inside the roots, or of a benchmark's copy there (mjhq:, coco: or parti: and its path).

    ValueError for what is none, is too large, or holds a prompt that is too long.
    """
    kind, _, where = str(path or "").strip().partition(":")
    copy = bool(where) and kind in COPIES
    found = roots.existing(where if copy else path)
    if found.is_dir() and not copy:
        raise ValueError(f"{found.name} is a folder; a file of prompts is wanted: .txt, .json, .jsonl, .csv or .tsv")
    if found.is_file() and found.stat().st_size > (_MAX_COPY if copy else _MAX_FILE):
        raise ValueError(f"{found.name} is larger than {(_MAX_COPY if copy else _MAX_FILE) >> 20} MiB")
    prompts = load_prompts(f"{kind}:{found}" if copy else found, _MAX_PROMPTS)
    return replace(prompts, prompts=tuple(map(checked, prompts.prompts)))


def lines(text: str) -> list[str]:
    """Prompts of a text, one a line; ValueError if there are none."""
    found = [checked(line) for line in str(text or "").splitlines() if line.strip()]
    if not found:
        raise ValueError("write at least one prompt, one per line")
    return found[:_MAX_PROMPTS]


def shown(job: Job) -> tuple:
    """(log, result, files) of a job."""
    import gradio as gr

    log = "\n".join(job.log)
    if job.state != "done":
        return log, gr.skip(), gr.skip()
    return log, markup.worst(job.result), [str(job.folder / name) for name in job.result["files"]]


def save(desk: Desk, job_id: str, path: str) -> Path:
    """Copies a job's model to a folder inside the roots, whole or not at all, and returns the folder."""
    job = desk.jobs.get(job_id)
    if job is None or job.kind != "quantize" or job.state != "done":
        raise ValueError("there is no finished model to save yet: quantize one first")
    target = desk.roots.inside(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"something is at {target} already; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.{job.id[:6]}.partial")
    try:
        shutil.copytree(job.folder / "model", stage)
        for name in ("report.html", "recipe.json"):
            if (job.folder / name).is_file():
                shutil.copy2(job.folder / name, stage / name)
        if target.is_dir():
            target.rmdir()
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def build(desk: Desk) -> Tab:
    """As `generate.build`."""
    import gradio as gr

    from qgen import recipes

    async def quantize(
        model: str, recipe: str, rank: float, budget: str, samples: float, keep: float, steps: float,
        prompts: str, prompt_file: str, memory: str,
        skip: str, seed: float, heat: bool,
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Quantizes a model in a process of its own. Returns the job's id, its state as HTML, the log, the result as HTML, and files."""
        from qgen.allocate import Budget
        from qgen.checks import parse_bytes
        from qgen.web.work_quantize import recipe_of

        typed = (model, recipe, rank, budget, samples, keep, steps, prompts, prompt_file, memory, skip, seed, heat)
        asked = {
            "model": desk.roots.model(model), "recipe": str(recipe), "rank": whole(rank or 0, 0, 1024, "the rank"),
            "samples": whole(samples, 1, _MAX_PROMPTS, "the number of calibration prompts"),
            "keep": whole(keep, 1, 100, "the number of calls per prompt"), "steps": whole(steps or 0, 0, 1000, "the number of steps"),
            "memory": str(memory or "").strip(), "budget": str(budget or "").strip()[:80],
            "skip": str(skip or "").split(), "seed": whole(seed or 0, 0, 2**31 - 1, "the seed"),
            "heat": bool(heat), "typed": dict(zip(FIELDS, typed, strict=True)),
        }  # fmt: skip
        if asked["memory"]:
            parse_bytes(asked["memory"])
        if asked["budget"]:
            Budget.parse(asked["budget"])
        recipe_of(asked)  # an unknown name or a rank that does not fit is an error now
        if str(prompt_file or "").strip():
            asked["prompts"] = list((await asyncio.to_thread(read_prompts, desk.roots, prompt_file)).prompts)
        elif str(prompts or "").strip():
            asked["prompts"] = lines(prompts)
        async for values in desk.follow(desk.heavy("quantize", asked), shown):
            yield values

    def keep_it(job_id: str, path: str) -> str:
        """Saves a finished quantize job's model into a folder inside the allowed roots. Returns that folder."""
        return f"Saved to {save(desk, job_id, path)}"

    job_id = identity("quantize")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            model = gr.Textbox(
                label="Model", value="demo", elem_id="quantize-model",
                info=f"demo, a folder of a pipeline or model, one .safetensors or .gguf file{', or a hub id' if desk.roots.hub else ''}. "
                f"Folders allowed here: {desk.roots.said()}",
            )  # fmt: skip
            recipe = gr.Dropdown(
                recipes.names(), value="svdquant-int4", label="Recipe", elem_id="recipe", filterable=False
            )
            about = gr.Markdown(_about("svdquant-int4"), elem_id="recipe-about")
            with gr.Row():
                run = gr.Button("Quantize", variant="primary", elem_id="quantize", scale=2)
                desk.cancel_button("cancel-quantize", job_id)
            with gr.Accordion("Calibration and layers", open=False, elem_id="quantize-settings"):
                with gr.Row():
                    samples = gr.Number(
                        label="Calibration prompts", value=32, precision=0, elem_id="samples", min_width=130
                    )
                    keep = gr.Number(
                        label="Denoiser calls kept of each run",
                        value=4,
                        precision=0,
                        elem_id="keep",
                        min_width=130,
                    )
                with gr.Row():
                    steps = gr.Number(
                        label="Sampling steps", value=0, precision=0, info="0: the pipeline's own", min_width=130, elem_id="quantize-steps",
                    )  # fmt: skip
                    rank = gr.Number(
                        label="Low-rank branch",
                        value=0,
                        precision=0,
                        info="0: the recipe's own",
                        elem_id="rank",
                        min_width=130,
                    )
                budget = gr.Textbox(
                    label="Budget for mixed precision", placeholder="4.5 bits", elem_id="budget",
                    info="Bits a weight on average, or bytes such as 6 GiB. Empty: the recipe's formats as they are.",
                )  # fmt: skip
                prompts = gr.Textbox(
                    label="Prompts to calibrate with",
                    lines=3,
                    info="One a line. Empty: the model's own, or a built-in set.",
                    elem_id="quantize-prompts",
                )
                prompt_file = gr.Textbox(
                    label="Or a file of prompts",
                    info="Inside the allowed folders: .txt, .json, .jsonl, .csv, .tsv",
                    elem_id="prompt-file",
                )
                with gr.Row():
                    memory = gr.Textbox(
                        label="Memory for statistics", placeholder="2GiB", info="Empty: half the model", min_width=130
                    )
                    skip = gr.Textbox(
                        label="Keep in 16 bits",
                        placeholder="*.proj_out *.ff.*",
                        info="Globs of layer paths",
                        min_width=130,
                    )
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, min_width=130)
                    heat = gr.Checkbox(
                        label="Measure error by timestep (holds both models in memory)", value=True, elem_id="heat"
                    )
        with gr.Column(scale=7, min_width=320):
            status = gr.HTML(padding=False, elem_id="quantize-status", elem_classes="status")
            log = gr.Textbox(
                label="Log",
                lines=7,
                max_lines=14,
                interactive=False,
                elem_id="quantize-log",
                elem_classes="log",
                autoscroll=True,
            )
            result = gr.HTML(padding=False, elem_id="quantize-result")
            files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="quantize-files")
            with gr.Row():
                path = gr.Textbox(
                    label="Save as",
                    placeholder="a new folder inside the allowed ones",
                    elem_id="save-path",
                    scale=3,
                    min_width=200,
                )
                keeper = gr.Button("Save", elem_id="save", min_width=90, scale=1)
            saved = gr.Markdown(elem_id="saved")
    outputs = [job_id, status, log, result, files]
    inputs = [model, recipe, rank, budget, samples, keep, steps, prompts, prompt_file, memory, skip, seed, heat]
    ran = run.click(
        told(quantize), inputs, outputs, api_name="quantize", concurrency_limit=None, show_progress="hidden"
    )
    recipe.change(_about, recipe, about, show_progress="hidden", queue=False, api_visibility="private")
    keeper.click(told(keep_it), [job_id, path], saved, api_name="save", concurrency_limit=4)
    back = [
        (lambda name: desk.asked(name, FIELDS), job_id, inputs),
        (desk.resume(shown, len(outputs)), job_id, outputs),
    ]
    return Tab(job_id, ran, back)


def _about(name: str) -> str:
    from qgen import recipes

    if name == "auto":
        return "Picks for the server's device: NVFP4 where tensor cores run it, else W4A8."
    if name not in recipes.names():
        return ""
    recipe = recipes.get(name)
    return f"{recipe.about}. Default layers: `{recipe.default}`."
