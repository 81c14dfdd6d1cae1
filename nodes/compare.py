r"""Compare: two models draw from the same noise; what differs is shown as pictures, as a map and as numbers.

    PSNR = 10 log₁₀(1 / mean (a − b)²)                 pictures in [0, 1]
    latent SQNR = 10 log₁₀(Σ z_a² / Σ (z_a − z_b)²)     what left the sampler, before the decoder

Two good pictures may still be far apart, so the table ends with a perceptual distance, and with the agreement of each picture with a
prompt where networks for that are on this computer. Nothing is ever downloaded; a row that cannot be measured says why.
"""

__all__ = ["compare", "measured", "sampled"]

import math
from typing import Any

import torch
from torch import Tensor

from qgen.nodes import registry
from qgen.nodes.images import from_pil, stacked, text_picture
from qgen.nodes.inputs import sampling
from qgen.nodes.inputs import seed as seed_input
from qgen.nodes.progress import stop_if_asked
from qgen.nodes.registry import Input, Node, Output, Result

GAIN = 4.0
NETWORKS = ("ssim", "lpips", "clip")


def sampled(model: Any, latent: dict, positive: Any, negative: Any, settings: dict, seed: int) -> Tensor:
    """Latents (B, C, …) as ComfyUI's own KSampler makes them. settings: steps, cfg, sampler_name, scheduler, denoise."""
    import comfy.sample
    import latent_preview

    ratios = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *(r for r in ratios if r is not None))
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model,
        noise,
        settings["steps"],
        settings["cfg"],
        settings["sampler_name"],
        settings["scheduler"],
        positive,
        negative,
        start,
        denoise=settings["denoise"],
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, settings["steps"]),
        disable_pbar=True,
        seed=seed,
    )


def measured(
    before: Tensor, after: Tensor, z_before: Tensor, z_after: Tensor, prompt: str = ""
) -> list[tuple[str, str, str]]:
    """Rows (metric, value, note) about pictures (B, H, W, 3) in [0, 1] and the latents that they were decoded from."""
    same = "equal, bit for bit" if torch.equal(before, after) else ""
    rows = [
        ("PSNR, dB, higher is closer", decibel(torch.ones_like(before), before - after), same),
        ("latent SQNR, dB, higher is closer", decibel(z_before, z_before - z_after), ""),
        ("largest difference of a pixel", f"{float((before - after).abs().max()):.4f}", "of 1"),
    ]
    for metric in NETWORKS:
        if metric != "clip":
            rows.append(_scored(metric, after, before))
        elif prompt.strip():
            rows += [_scored(metric, after, None, prompt, "model_b"), _scored(metric, before, None, prompt, "model_a")]
    return rows


def decibel(signal: Tensor, noise: Tensor) -> str:
    """10 log₁₀(Σ signal² / Σ noise²) as text, "inf" where there is no noise."""
    power, error = float(signal.double().square().sum()), float(noise.double().square().sum())
    return "inf" if not error else f"{10 * math.log10(max(power, 1e-300) / error):.2f}"


def _scored(
    metric: str, pictures: Tensor, reference: Tensor | None, prompt: str = "", whose: str = ""
) -> tuple[str, str, str]:
    """One row out of `qgen.evaluate`; "not measured" with the reason where its network or package is not on this computer."""
    from qgen.errors import QgenError
    from qgen.eval.evaluate import evaluate

    label = f"{metric.upper()} {whose}".strip()
    prompts = [prompt] * len(pictures) if prompt else None
    try:
        row = evaluate(pictures, reference, prompts, metrics=(metric,), progress=False)[metric]
    except (ImportError, QgenError, ValueError) as error:
        return label, "not measured", str(error).splitlines()[0][:90]
    direction = f"{row.better} is better"
    return f"{row.label} {whose}".strip() + f", {direction}", f"{row.value:.4f}", row.extractor or ""


def decoded(vae: Any, latents: Tensor, model: Any) -> Tensor:
    """Pictures (B, H, W, 3): the decoder's, or without one the latents' own colours as ComfyUI's previews show them."""
    if vae is not None:
        pictures = vae.decode(latents)
        return (
            pictures.reshape(-1, *pictures.shape[-3:]).float().cpu().clamp(0, 1)
        )  # frames of a video are pictures too
    shown = model.get_model_object("latent_format")
    factors = getattr(shown, "latent_rgb_factors", None)
    if factors is None:
        raise ValueError(
            f"vae: {type(shown).__name__} has no preview colours, so its latents cannot be shown; connect a VAE"
        )
    flat = latents.float().cpu()
    flat = flat.movedim(2, 1).flatten(0, 1) if flat.ndim == 5 else flat
    colours = torch.tensor(factors)
    bias = getattr(shown, "latent_rgb_factors_bias", None)
    if getattr(shown, "latent_rgb_factors_reshape", None) is not None:
        flat = shown.latent_rgb_factors_reshape(flat)
    rgb = flat.movedim(1, -1) @ colours + (0.0 if bias is None else torch.tensor(bias))
    return ((rgb + 1) / 2).clamp(0, 1)


def picture_of(
    before: Tensor, after: Tensor, gain: float, rows: list[tuple[str, str, str]], names: tuple[str, str]
) -> Any:
    """A PIL picture: both rows of pictures, their difference, and the table below."""
    from qgen.show.pictures import difference, grid

    shown = range(min(len(before), 4))
    lines = [
        (f"{names[0]}\nfirst model", [before[i] for i in shown]),
        (f"{names[1]}\nsecond model", [after[i] for i in shown]),
        (f"difference\n× {gain:g}", [difference(before[i], after[i], gain) for i in shown]),
    ]
    board = grid(lines, [f"picture {i + 1}" for i in shown], "Same noise, two models", least=192)
    return stacked(
        board,
        text_picture(["\t".join(("metric", "value", "network or note")), *map("\t".join, rows)], width=board.width),
    )


def compare(
    model_a: Any,
    model_b: Any,
    positive: Any,
    negative: Any,
    latent_image: dict,
    seed: int = 0,
    steps: int = 20,
    cfg: float = 1.0,
    sampler_name: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
    gain: float = GAIN,
    prompt: str = "",
    vae: Any = None,
) -> Result:
    """Draws with both models from one seed; pictures of each, the difference map, the board and the table as text."""
    from qgen.show.pictures import difference

    settings = {"steps": steps, "cfg": cfg, "denoise": denoise} | {"sampler_name": sampler_name, "scheduler": scheduler}
    z_a = sampled(model_a, latent_image, positive, negative, settings, seed)
    stop_if_asked()
    z_b = sampled(model_b, latent_image, positive, negative, settings, seed)
    if z_a.shape != z_b.shape:
        raise ValueError(
            f"model_b makes latents of shape {tuple(z_b.shape)}, model_a of {tuple(z_a.shape)}: compare models of one family"
        )
    before, after = decoded(vae, z_a, model_a), decoded(vae, z_b, model_b)
    rows = measured(before, after, z_a.float().cpu(), z_b.float().cpu(), prompt)
    board = picture_of(before, after, gain, rows, ("model_a", "model_b"))
    map_ = torch.stack(
        [torch.from_numpy(difference(x, y, gain)).float() / 255 for x, y in zip(before, after, strict=True)]
    )
    text = table_text(rows)
    return Result((before, after, map_, from_pil(board), text), {"text": [text]})


def table_text(rows: list[tuple[str, str, str]]) -> str:
    width = max(len(label) for label, _, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value.rjust(12)}  {note}".rstrip() for label, value, note in rows)


registry.register(
    Node(
        "QGenCompare",
        "Compare Models (qgen)",
        "Draws with two models from the same noise and shows both pictures, where they differ, and how much: PSNR, SSIM, a perceptual "
        "distance and the agreement with a prompt.",
        run=compare,
        inputs=(
            Input("model_a", "MODEL", "The model to compare with, usually the 16-bit one."),
            Input("model_b", "MODEL", "The model to judge, usually the quantized one."),
            Input("positive", "CONDITIONING", "What both models shall draw."),
            Input("negative", "CONDITIONING", "What both models shall avoid; unused at cfg 1."),
            Input("latent_image", "LATENT", "Size and number of the pictures; both models start from it."),
            seed_input("Chooses the noise that both models start from.", rolls=True),
            *sampling("each model"),
            Input(
                "gain",
                "FLOAT",
                "The difference map shows the difference times this.",
                default=GAIN,
                low=1.0,
                high=100.0,
                step=1.0,
            ),
            Input(
                "prompt",
                "STRING",
                "Words to score both pictures with, where a network for that is on this computer; empty = no such row.",
                default="",
                multiline=True,
                advanced=True,
            ),
            Input(
                "vae",
                "VAE",
                "Decodes both results. Without it the latents' preview colours are compared.",
                optional=True,
            ),
        ),
        outputs=(
            Output("IMAGE", "images_a", "Pictures of the first model."),
            Output("IMAGE", "images_b", "Pictures of the second model."),
            Output("IMAGE", "difference", "Absolute difference times gain; black where they are equal."),
            Output("IMAGE", "board", "Both rows of pictures, the difference and the table in one picture."),
            Output("STRING", "table", "The table as text."),
        ),
        search=("diff", "psnr", "ssim", "lpips", "quality", "quantization error", "A/B"),
        ends=True,
        category="qgen/inspect",
    )
)
