"""What became of every layer: errors, formats, bytes, and a heat map of the error by timestep."""

__all__ = ["build"]

from collections.abc import AsyncIterator

from qgen.web import markup
from qgen.web.desk import Desk, Tab, identity
from qgen.web.errors import told
from qgen.web.jobs import Job


def shown(job: Job) -> tuple:
    """(page,) of a job."""
    import gradio as gr

    return (markup.model(job.result) if job.state == "done" else gr.skip(),)


def build(desk: Desk) -> Tab:
    """As `generate.build`."""
    import gradio as gr

    async def inspect(model: str, path: str) -> AsyncIterator[tuple]:
        """Shows a 4-bit model of the list, or, if a path is given, the headers of a checkpoint there (qgen's own or a peer's), read in
        a process of its own. Returns the job's id ("" for one of the list), its state and the page as HTML."""
        if str(path or "").strip():
            job = desk.heavy("inspect", {"checkpoint": str(desk.roots.existing(path))})
            async for values in desk.follow(job, shown):
                yield values
            return
        yield "", "", markup.model(desk.models.result(model))

    job_id = identity("inspect")
    with gr.Row():
        with gr.Column(scale=4, min_width=280):
            model = desk.model_list("inspect-model", job_id)
        with gr.Column(scale=4, min_width=280):
            path = gr.Textbox(
                label="Or a quantized checkpoint on the server", elem_id="inspect-path",
                info=f"qgen's own, Nunchaku, ComfyUI, GGUF and others. Folders allowed here: {desk.roots.said()}",
            )  # fmt: skip
    with gr.Row():
        run = gr.Button("Inspect", variant="primary", elem_id="inspect", scale=0, min_width=180)
        desk.cancel_button("cancel-inspect", job_id)
    status = gr.HTML(padding=False, elem_id="inspect-status", elem_classes="status")
    page = gr.HTML(padding=False, elem_id="inspect-page")
    outputs = [job_id, status, page]
    ran = gr.on(
        [run.click, path.submit], told(inspect), [model, path], outputs, api_name="inspect", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    return Tab(job_id, ran, [(desk.resume(shown, len(outputs)), job_id, outputs)])
