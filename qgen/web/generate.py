"""The first tab: one prompt, one seed, at 16 and at 4 bits, and what lies between them."""

__all__ = ["build"]

import secrets
from collections.abc import AsyncIterator
from typing import Any

from qgen.web import markup
from qgen.web.desk import Desk, Tab, identity
from qgen.web.drawing import MAX_SEED, draw
from qgen.web.errors import checked, told, whole
from qgen.web.jobs import Job

EXAMPLES = ("noto owl", "flat penguin", "noto rocket", "flat sunflower")
_MAX_STEPS, _MAX_SIDE = 100, 2048


def size(value: Any, what: str) -> int:
    """0, the model's own, or a multiple of 16 pixels."""
    side = whole(value or 0, 0, _MAX_SIDE, what)
    if side and (side < 32 or side % 16):
        raise ValueError(f"{what} must be 0 (the model's own) or a multiple of 16 from 32 to {_MAX_SIDE}, found {side}")
    return side


def settings(prompt: Any, model: Any, seed: Any, steps: Any, guidance: Any) -> dict[str, Any]:
    """What drawing needs, checked."""
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 0 <= guidance <= 30:
        raise ValueError(f"guidance must be a number from 0 to 30, found {str(guidance)[:40]!r}")
    return {
        "prompt": checked(prompt), "model": str(model or ""), "seed": whole(seed, 0, MAX_SEED, "the seed"),
        "steps": whole(steps, 1, _MAX_STEPS, "the number of steps"), "guidance": float(guidance),
    }  # fmt: skip


def pictures(job: Job) -> tuple:
    """(seed, slider, difference, facts) of a job."""
    import gradio as gr

    if job.state != "done":
        return job.asked["seed"], gr.skip(), gr.skip(), gr.skip()
    files = [str(job.folder / f"{name}.png") for name in ("16-bit", "4-bit", "difference")]
    return job.asked["seed"], (files[0], files[1]), files[2], markup.facts(job.result)


def build(desk: Desk) -> Tab:
    """The tab's components and events."""
    import gradio as gr

    async def generate(
        prompt: str,
        model: str,
        seed: float,
        new_seed: bool,
        steps: float,
        guidance: float,
        width: float,
        height: float,
        gain: float,
    ) -> AsyncIterator[tuple]:
        """Draws a prompt at 16 and at 4 bits from the same noise. Returns the job's id, its state as HTML, the seed, both pictures, their
        difference, and facts as HTML; /job gives the same facts as JSON."""
        seed = secrets.randbelow(MAX_SEED) if new_seed else seed
        asked = settings(prompt, model, seed, steps, guidance)
        asked |= {
            "width": size(width, "the width"),
            "height": size(height, "the height"),
            "gain": whole(gain, 1, 32, "the gain"),
        }
        source = desk.models.source(model)
        job = desk.jobs.submit(source.lane, "generate", asked, lambda job: draw(loaded(desk, source, job), job))
        async for values in desk.follow(job, pictures):
            yield values

    job_id = identity("generate")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=2, max_lines=6, elem_id="prompt", rtl=False)
            gr.Examples([[text] for text in EXAMPLES], prompt, label="Try one", elem_id="examples")
            model = desk.model_list("model", job_id)
            with gr.Row():
                run = gr.Button("Draw both", variant="primary", elem_id="draw", scale=2)
                desk.cancel_button("cancel-draw", job_id)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                with gr.Row():
                    seed = gr.Number(label="Seed", value=1, precision=0, elem_id="seed", min_width=130)
                    new_seed = gr.Checkbox(label="New seed each time", value=False, elem_id="new-seed")
                with gr.Row():
                    steps = gr.Slider(1, _MAX_STEPS, 20, step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(0, 15, 3, step=0.5, label="Guidance", elem_id="guidance")
                with gr.Row():
                    width = gr.Number(
                        label="Width", value=0, precision=0, elem_id="width", min_width=100, info="0: the model's own"
                    )
                    height = gr.Number(
                        label="Height", value=0, precision=0, elem_id="height", min_width=100, info="0: the model's own"
                    )
                gain = gr.Slider(1, 32, 4, step=1, label="Difference is shown times", elem_id="gain")
        with gr.Column(scale=7, min_width=320):
            status = gr.HTML(padding=False, elem_id="draw-status", elem_classes="status")
            slider = gr.ImageSlider(
                label="16 bits | 4 bits", format="png", elem_id="slider", type="filepath", max_height=520,
                elem_classes="pixel",
            )  # fmt: skip
            position = gr.Slider(0, 100, 50, step=1, label="Divider (arrow keys move it)", elem_id="position")
            facts = gr.HTML(padding=False, elem_id="facts")
            difference = gr.Image(
                label="Difference (black where equal)", format="png", elem_id="difference", type="filepath", interactive=False,
                elem_classes="pixel", buttons=["download", "fullscreen"],
            )  # fmt: skip
    outputs = [job_id, status, seed, slider, difference, facts]
    inputs = [prompt, model, seed, new_seed, steps, guidance, width, height, gain]
    ran = gr.on(
        [run.click, prompt.submit], told(generate), inputs, outputs, api_name="generate", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    position.input(
        lambda at: gr.ImageSlider(slider_position=at),
        position,
        slider,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    fields = {
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "width": width,
        "height": height,
        "gain": gain,
    }
    back = [
        (lambda name: desk.asked(name, tuple(fields)), job_id, list(fields.values())),
        (desk.resume(pictures, len(outputs)), job_id, outputs),
    ]
    return Tab(job_id, ran, back)


def loaded(desk: Desk, source: Any, job: Job) -> Any:
    job.step(f"loading {source.label}")
    return desk.models.pair(source)
