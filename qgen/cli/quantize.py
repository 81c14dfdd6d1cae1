"""`qgen quantize MODEL --recipe … --out …`: loads, quantizes, saves, and writes the report into the same folder."""

from pathlib import Path
from typing import Annotated, Any

import typer


def quantize(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder of a pipeline, diffusers or transformers; a hub id; or the word demo.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the quantized model and report.html.")],
    recipe: Annotated[str, typer.Option(help="Name (see `qgen recipes`) or a recipe's .json file.")] = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one calibration prompt, or text for a language model, per line; default: a built-in set."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibrate with at most so many prompts.")] = 128,
    keep: Annotated[int, typer.Option(min=1, help="Denoiser calls kept per prompt.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps while calibrating; default: the pipeline's own.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Keep layers whose path matches this glob in float; repeatable.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For calibration statistics, such as 2GiB; less means more replays.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Mixed precision within '4.5 bits' on average, '6 GiB', or '12 ms' of layers.")
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="The smallest mixture that reaches 'psnr>=30', 'ssim>=0.9' or 'sqnr>=20'.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for progress: the same command goes on from there.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto keeps what the files hold.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of noise while calibrating, and of methods' random numbers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write into --out though it is not empty.")] = False,
) -> None:
    """Quantize a model's denoisers to 4 bits, save it, and write a report."""
    from rich.console import Console

    from qgen.allocate import asked
    from qgen.calibration.recorder import Recorder
    from qgen.checks import parse_bytes
    from qgen.cli.common import (
        calibrates,
        claim,
        device_of,
        load,
        note,
        own_prompts,
        read_prompts,
        read_recipe,
        texts,
        typed,
    )
    from qgen.engine import quantize as run
    from qgen.io.checkpoint import save
    from qgen.show.report import report
    from qgen.show.rows import gather
    from qgen.show.summary import table

    claim(out, force)
    chosen = read_recipe(recipe, device_of(device)).skip(*skip or ())
    given = read_prompts(prompts)
    if memory is not None:
        parse_bytes(memory)
    limits = asked(budget, quality)
    again = (
        f"; the same command goes on from {checkpoint}"
        if checkpoint
        else "; with --checkpoint DIR the same command can go on"
    )
    ctx.meta["qgen.resume"] = again
    pipe = load(model, dtype, device)
    given = given or own_prompts(pipe, "calibration")
    data: Any = None
    if any(limits) or calibrates(chosen):
        data = (
            Recorder(samples, keep) if hasattr(pipe, "components") else texts(model, given, samples) if given else None
        )
    note(f"quantizing {type(pipe).__name__} with {chosen.name}")
    run(
        pipe, chosen, prompts=given, call_kwargs={"num_inference_steps": steps} if steps else None, memory=memory, checkpoint=checkpoint,
        calibration=data, seed=seed, budget=limits[0], quality=limits[1],
    )  # fmt: skip
    save(pipe, out)
    page = report(pipe, out / "report.html", commands=[typed(ctx)])
    console = Console()
    console.print(table(gather(pipe), console.width))
    typer.echo(f"saved {out}, report {page}")
