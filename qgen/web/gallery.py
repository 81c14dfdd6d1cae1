"""Many seeds of one prompt: whether a difference is that of one unlucky picture or of the model."""

__all__ = ["build"]

from collections.abc import AsyncIterator
from typing import Any

from qgen.web.desk import Desk, Tab, identity
from qgen.web.drawing import draw_seeds
from qgen.web.errors import told, whole
from qgen.web.generate import loaded, settings
from qgen.web.jobs import Job

_MAX_SEEDS = 24


def shown(job: Job) -> tuple:
    """(pictures with captions,) of what is drawn so far."""
    made = (job.result or job.live).get("made") or []
    return ([(str(job.folder / one["file"]), caption(one)) for one in made],)


def caption(one: dict[str, Any]) -> str:
    db = "equal" if one["psnr"] is None else f"{one['psnr']:.1f} dB"
    return f"seed {one['seed']}: {db}"


def build(desk: Desk) -> Tab:
    """As `generate.build`."""
    import gradio as gr

    async def gallery(
        prompt: str, model: str, seed: float, count: float, steps: float, guidance: float
    ) -> AsyncIterator[tuple]:
        """Draws several seeds of one prompt at 16 and at 4 bits. Returns the job's id, its state as HTML, and pictures with captions."""
        asked = settings(prompt, model, seed, steps, guidance) | {
            "count": whole(count, 1, _MAX_SEEDS, "the number of seeds")
        }
        source = desk.models.source(model)
        job = desk.jobs.submit(source.lane, "gallery", asked, lambda job: draw_seeds(loaded(desk, source, job), job))
        async for values in desk.follow(job, shown):
            yield values

    job_id = identity("gallery")
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            prompt = gr.Textbox(label="Prompt", value="noto owl", elem_id="gallery-prompt")
            model = desk.model_list("gallery-model", job_id)
        with gr.Column(scale=4, min_width=300), gr.Row():
            seed = gr.Number(
                label="First seed",
                value=0,
                precision=0,
                elem_id="gallery-seed",
                min_width=110,
            )
            count = gr.Slider(1, _MAX_SEEDS, 6, step=1, label="Seeds", elem_id="gallery-count", min_width=150)
            steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="gallery-steps", min_width=150)
            guidance = gr.Slider(0, 15, 3, step=0.5, label="Guidance", elem_id="gallery-guidance", min_width=150)
    with gr.Row():
        run = gr.Button("Draw all seeds", variant="primary", elem_id="gallery-draw", scale=0, min_width=180)
        desk.cancel_button("cancel-gallery", job_id)
    status = gr.HTML(padding=False, elem_id="gallery-status", elem_classes="status")
    pictures = gr.Gallery(
        label="16 bits | 4 bits | difference × 4", format="png", columns=2, object_fit="contain", height="auto",
        elem_id="gallery", elem_classes=["pixel", "triples"], preview=False,
    )  # fmt: skip
    outputs, inputs = [job_id, status, pictures], [prompt, model, seed, count, steps, guidance]
    ran = gr.on(
        [run.click, prompt.submit], told(gallery), inputs, outputs, api_name="gallery", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    fields = {"prompt": prompt, "seed": seed, "count": count, "steps": steps, "guidance": guidance}
    back = [
        (lambda name: desk.asked(name, tuple(fields)), job_id, list(fields.values())),
        (desk.resume(shown, len(outputs)), job_id, outputs),
    ]
    return Tab(job_id, ran, back)
