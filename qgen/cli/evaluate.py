"""`qgen eval`: scores pipelines, folders of pictures or clips, geometry and language models against their 16-bit selves."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="What to score: a model (folder, quantized or not, hub id, or the word demo), or a folder of pictures; or what "
            "--video, --text and --geometry say."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="The 16-bit model, or its pictures, to compare with; with --recipe, MODEL itself by default."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Quantize MODEL by this recipe, a name or a .json file, before it is scored.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="builtin, demo, a .txt, .json, .jsonl, .csv or .tsv file, or a local copy: mjhq:/path, coco:/path, parti:/path. "
            "The demo model has its own."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Take the first n prompts only.")] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Of psnr, ssim, ms_ssim, sqnr, lpips, dists, fid, kid, is, clip, clip_iqa, image_reward, hpsv2, commas between; or for "
            "clips of video_psnr, video_consistency, video_flicker."
        ),
    ] = "",
    extractor: Annotated[
        str,
        typer.Option(help="auto, small, real, or metric=name[:path] with commas between, such as fid=inception:/path."),
    ] = "auto",
    real: Annotated[Path | None, typer.Option(help="Folder of real pictures or features file for fid and kid.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the noise; both models get the same.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn and scored at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto keeps what the files hold.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    video: Annotated[bool, typer.Option("--video", help="MODEL and --reference are folders of clips.")] = False,
    text: Annotated[Path | None, typer.Option(help="MODEL is a language model; score it on this text file.")] = None,
    geometry: Annotated[
        bool,
        typer.Option(
            "--geometry", help="MODEL and --reference are .npz files, or folders of them, with poses, depth or points."
        ),
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Draw in so many processes through accelerate; needs --out.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Draw on a Ray cluster: its address, auto, or local; needs --out.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on the Ray cluster.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for scores.json, report.html, before_after.png and samples/, from which a killed run goes on."
        ),
    ] = None,
) -> None:
    """Score a model against a reference; run the same command again after a crash and finished pictures are kept."""
    from qgen.cli import evaluate_kinds as kinds

    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    if sum((video, text is not None, geometry)) > 1:
        raise ValueError("--video, --text and --geometry exclude each other")
    if (processes > 1 or ray is not None) and out is None:
        raise ValueError("--processes and --ray need --out FOLDER, where the processes' pictures meet")
    if video or geometry:
        judge = kinds.clips if video else kinds.scenes
        kinds.write(ctx, judge(model, reference, wanted, seed), out)
    elif text is not None:
        kinds.write(ctx, kinds.words(model, reference, text, n, recipe, dtype, device, seed), out)
    elif kinds.is_picture_folder(model):
        chosen = kinds.extractors_from(extractor)
        kinds.write(ctx, kinds.folders(model, reference, prompts, n, wanted, chosen, real, batch_size, seed), out)
    elif processes > 1:
        kinds.several(ctx, processes, device)
    else:
        draw = {"steps": steps, "seed": seed, "batch_size": batch_size}
        job = kinds.Job(model, reference, recipe, dtype, device, draw, out, ray, workers)
        chosen = kinds.extractors_from(extractor)
        result = kinds.pipelines(job, prompts, n, wanted, chosen, real)
        if result is not None:
            kinds.write(ctx, result, out)
