"""`qgen finetune QUANTIZED --teacher MODEL --out …`: teaches a quantized model by its 16-bit original and saves it."""

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a model that qgen quantized.")],
    teacher: Annotated[str, typer.Option(help="The 16-bit original: a folder, a hub id, or the word demo.")],
    out: Annotated[Path, typer.Option(help="Folder for the fine-tuned model and report.html.")],
    method: Annotated[
        str, typer.Option(help="efficientdm, full, quest, qvgen, scales, lowrank, bias, qzo, topkld, brecq, qdrop.")
    ] = "efficientdm",
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer; brecq and qdrop: for each block.")] = 200,
    lr: Annotated[float | None, typer.Option(min=0.0, help="In place of the method's own rate.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Recorded calls per step.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line for the teacher; default: a built-in set.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Learn from at most so many prompts.")] = 128,
    keep: Annotated[int, typer.Option(min=1, help="Denoiser calls kept per prompt.")] = 8,
    sampling: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps of the teacher; default: its own.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for progress: the same command goes on from there.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the float parts: no or bf16.")] = "no",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the teacher's noise and of methods' random numbers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write into --out though it is not empty.")] = False,
) -> None:
    """Fine-tune a quantized model by its 16-bit original, without data, and save it."""
    from qgen.calibration.recorder import Recorder
    from qgen.cli.common import claim, load, note, own_prompts, read_prompts, typed
    from qgen.io.checkpoint import save
    from qgen.show.report import report
    from qgen.train import tunings
    from qgen.train.finetune import finetune as run

    claim(out, force)
    kind = tunings[method]
    given = read_prompts(prompts)
    ctx.meta["qgen.resume"] = (
        f"; the same command goes on from {checkpoint}"
        if checkpoint
        else "; with --checkpoint DIR the same command can go on"
    )
    pipe, original = load(model, "auto", device), load(teacher, "auto", device)
    given = given or own_prompts(original, "calibration")
    note(f"fine-tuning {type(pipe).__name__} with {method}")
    run(
        pipe, original, kind(), steps=steps, lr=lr, batch=batch, prompts=given, precision=precision, seed=seed, checkpoint=checkpoint,
        call_kwargs={"num_inference_steps": sampling} if sampling else None, calibration=Recorder(samples, keep),
    )  # fmt: skip
    save(pipe, out)
    page = report(pipe, out / "report.html", commands=[typed(ctx)])
    for name in getattr(pipe, "components", {"": pipe}):
        told = getattr(getattr(pipe, name, pipe) if name else pipe, "qgen_tuning", None)
        if told:
            typer.echo(f"{name or 'model'}: held-out error {told['held'][0]:.4g} -> {told['held'][told['best']]:.4g}")
    typer.echo(f"saved {out}, report {page}")
