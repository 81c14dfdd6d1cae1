"""Numbers: both models draw a set of prompts from the same noise; a table that grows, plots, the worst pairs, and files to keep."""

__all__ = ["build"]

import asyncio
from collections.abc import AsyncIterator

from qgen.eval.prompt_sets import PromptSet, load_prompts
from qgen.web import markup
from qgen.web.desk import Desk, Tab, identity
from qgen.web.errors import told, whole
from qgen.web.gallery import caption
from qgen.web.jobs import Job
from qgen.web.quantize import lines, read_prompts

SETS = (
    ("Held-out prompts of the shipped model", "held_out"),
    ("128 captions of any kind", "builtin"),
    ("My own, below", "text"),
    ("A file on the server", "file"),
)
FIELDS = ("model", "prompt_set", "text", "file", "n", "metrics", "steps", "seed", "networks", "real")
_DEFAULT = ("psnr", "ssim", "lpips", "fid", "clip")
_MAX = 512


def shown(job: Job) -> tuple:
    """(table, plots, worst pairs, files) of a job, growing."""
    import gradio as gr

    found = job.result or job.live
    of = len(job.asked["prompts"])
    table = (
        markup.scores(found["rows"], found.get("failed") or {}, found.get("drawn", of), of)
        if found.get("rows")
        else gr.skip()
    )
    if job.state != "done":
        return table, gr.skip(), gr.skip(), gr.skip()
    worst = [
        (str(job.folder / one["file"]), f"{one['prompt'][:60]} — {caption({**one, 'seed': ''}).split(': ')[1]}")
        for one in found["worst"]
    ]
    return (
        table,
        markup.over_prompts(found["per_prompt"], found["rows"]),
        worst,
        [str(job.folder / name) for name in found["files"]],
    )


def build(desk: Desk) -> Tab:
    """As `generate.build`."""
    import gradio as gr

    from qgen.eval.metrics import metrics as known

    async def evaluate(
        model: str,
        prompt_set: str,
        text: str,
        file: str,
        n: float,
        metrics: list[str],
        steps: float,
        seed: float,
        networks: str,
        real: str,
    ) -> AsyncIterator[tuple]:
        """Scores a 4-bit model against its 16-bit partner, in a process of its own. prompt_set: held_out, builtin, text or file. Returns
        the job's id, its state, the table and plots as HTML, the worst pairs, and files."""
        source = desk.models.source(model)
        for name in metrics:
            known[name]  # an unknown name is an error now
        if not metrics:
            raise ValueError("choose at least one metric")
        if networks not in ("auto", "small", "real"):
            raise ValueError(f"networks must be auto, small or real, found {str(networks)[:40]!r}")
        typed = (model, prompt_set, text, file, n, metrics, steps, seed, networks, real)
        prompts = await asyncio.to_thread(_prompts, desk, prompt_set, text, file)
        asked = {
            "base": source.base, "folder": str(source.folder) if source.folder else None, "recipe": source.recipe, "label": source.label,
            "prompts": list(prompts.prompts)[: whole(n, 1, _MAX, "the number of prompts")], "metrics": list(metrics),
            "set": prompt_set, "set_name": prompts.name, "licence": prompts.licence,
            "steps": whole(steps or 0, 0, 100, "the number of steps") or None, "seed": whole(seed or 0, 0, 2**31 - 1, "the seed"),
            "extractor": networks, "real": str(desk.roots.existing(real)) if str(real or "").strip() else None,
            "typed": dict(zip(FIELDS, typed, strict=True)),
        }  # fmt: skip
        async for values in desk.follow(desk.heavy("evaluate", asked), shown):
            yield values

    job_id = identity("evaluate")
    names = [name for name, _ in known.items()]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            model = desk.model_list("evaluate-model", job_id)
            with gr.Row():
                n = gr.Slider(1, _MAX, 16, step=1, label="Prompts", elem_id="evaluate-n", min_width=150)
                steps = gr.Number(
                    label="Steps",
                    value=0,
                    precision=0,
                    info="0: the pipeline's own",
                    min_width=110,
                    elem_id="evaluate-steps",
                )
        with gr.Column(scale=5, min_width=300):
            metrics = gr.CheckboxGroup(
                names, value=[name for name in _DEFAULT if name in names], label="Metrics", elem_id="metrics"
            )
    with gr.Accordion("Prompts, networks, real pictures", open=False, elem_id="evaluate-settings"):
        prompt_set = gr.Radio(list(SETS), value="held_out", label="Prompt set", elem_id="prompt-set")
        with gr.Row():
            text = gr.Textbox(label="My prompts, one a line", lines=3, elem_id="evaluate-text", min_width=260)
            with gr.Column(min_width=260):
                file = gr.Textbox(
                    label="File of prompts", elem_id="evaluate-file",
                    info="Inside the allowed folders: .txt, .json, .jsonl, .csv, .tsv; or a benchmark's copy as mjhq:, coco: or parti:path",
                )  # fmt: skip
                real = gr.Textbox(
                    label="Real pictures for FID and KID", info="A folder of pictures, or a features file. Empty: the 16-bit pictures.",
                    elem_id="evaluate-real",
                )  # fmt: skip
        with gr.Row():
            networks = gr.Dropdown(
                ["auto", "small", "real"], value="auto", label="Networks", elem_id="networks", filterable=False, min_width=200,
                info="real: Inception, AlexNet and CLIP; small: those that ship; auto: the first that are here",
            )  # fmt: skip
            seed = gr.Number(label="Seed", value=0, precision=0, min_width=110, elem_id="evaluate-seed")
    with gr.Row():
        run = gr.Button("Evaluate", variant="primary", elem_id="evaluate", scale=0, min_width=180)
        desk.cancel_button("cancel-evaluate", job_id)
    status = gr.HTML(padding=False, elem_id="evaluate-status", elem_classes="status")
    table = gr.HTML(padding=False, elem_id="scores")
    files = gr.File(
        label="CSV, JSON and a printable page", file_count="multiple", interactive=False, elem_id="evaluate-files"
    )
    worst = gr.Gallery(
        label="Worst pairs: 16 | 4 bits | difference × 4", format="png", columns=2, object_fit="contain", height="auto",
        elem_id="worst", elem_classes=["pixel", "triples"], preview=False,
    )  # fmt: skip
    plots = gr.HTML(padding=False, elem_id="plots")
    outputs = [job_id, status, table, plots, worst, files]
    inputs = [model, prompt_set, text, file, n, metrics, steps, seed, networks, real]
    ran = run.click(
        told(evaluate), inputs, outputs, api_name="evaluate", concurrency_limit=None, show_progress="hidden"
    )
    back = [
        (lambda name: desk.asked(name, FIELDS[1:]), job_id, inputs[1:]),
        (desk.resume(shown, len(outputs)), job_id, outputs),
    ]
    return Tab(job_id, ran, back)


def _prompts(desk: Desk, which: str, text: str, file: str) -> PromptSet:
    if which == "text":
        return PromptSet("the visitor's own", "as their owner says", tuple(lines(text)))
    if which == "file":
        return read_prompts(desk.roots, file)
    names = {"held_out": "demo", "builtin": "builtin"}
    if which not in names:
        raise ValueError(f"the prompt set must be held_out, builtin, text or file, found {str(which)[:40]!r}")
    return load_prompts(names[which])
