"""Small random models on disk and the graphs that use them: what the server's tests share. Not one of them has a trained weight.

A graph is what ComfyUI's /prompt takes: {number: {"class_type": …, "inputs": {…}}}; an input is a value or [number, output].
"""

import json
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import comfy_server

ROOT = Path(__file__).resolve().parents[2]
FLUX, UNET, VAE, LORA, UNET_LORA = (
    "flux.safetensors",
    "unet.safetensors",
    "tiny.safetensors",
    "flux-lora.safetensors",
    "unet-lora.safetensors",
)


def flux(hidden: int = 256) -> dict[str, torch.Tensor]:
    """A small Flux whose output depends on every layer: weights of variance 1 / K, biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    return {name: _drawn(name, shape, generator) for name, shape in comfy_server.flux_shapes(hidden).items()}


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        norm = name.endswith(".scale") or (name.endswith(".weight"))
        return torch.ones(shape) if norm else 0.02 * torch.randn(*shape, generator=generator)
    return torch.randn(*shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5


def unet_shapes(width: int = 320, context: int = 1024) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a UNet of Stable Diffusion 2's family with a single resolution, as ComfyUI tells it from its keys."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def block(name: str, k: int) -> None:
        layer(f"{name}.in_layers.0", k)
        layer(f"{name}.in_layers.2", width, k, 3, 3)
        layer(f"{name}.emb_layers.1", width, 4 * width)
        layer(f"{name}.out_layers.0", width)
        layer(f"{name}.out_layers.3", width, width, 3, 3)
        if k != width:
            layer(f"{name}.skip_connection", width, k, 1, 1)

    def transformer(name: str) -> None:
        layer(f"{name}.norm", width)
        at = f"{name}.transformer_blocks.0"
        for i in (1, 2, 3):
            layer(f"{at}.norm{i}", width)
        for attn, k in (("attn1", width), ("attn2", context)):
            layer(f"{at}.{attn}.to_q", width, width, bias=False)
            layer(f"{at}.{attn}.to_k", width, k, bias=False)
            layer(f"{at}.{attn}.to_v", width, k, bias=False)
            layer(f"{at}.{attn}.to_out.0", width, width)
        layer(f"{at}.ff.net.0.proj", 8 * width, width)
        layer(f"{at}.ff.net.2", width, 4 * width)
        layer(f"{name}.proj_in", width, width)
        layer(f"{name}.proj_out", width, width)

    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    layer("input_blocks.0.0", width, 4, 3, 3)
    block("input_blocks.1.0", width)
    transformer("input_blocks.1.1")
    block("middle_block.0", width)
    transformer("middle_block.1")
    block("middle_block.2", width)
    for i in (0, 1):
        block(f"output_blocks.{i}.0", 2 * width)
        transformer(f"output_blocks.{i}.1")
    layer("out.0", width)
    layer("out.2", 4, width, 3, 3)
    return found


def unet() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: _drawn(name, shape, generator) for name, shape in unet_shapes().items()}


def lora(state: dict[str, torch.Tensor], wanted: str, rank: int = 4, size: float = 0.5) -> dict[str, torch.Tensor]:
    """A LoRA of every weight whose name holds `wanted`; its ΔW has `size` times the weight's own norm."""
    generator, made = torch.Generator().manual_seed(7), {}
    for name, w in state.items():
        if wanted in name and name.endswith(".weight") and w.ndim == 2:
            n, k = w.shape
            up, down = torch.randn(n, rank, generator=generator), torch.randn(rank, k, generator=generator)
            up *= size * w.norm() / (up @ down).norm()
            at = "diffusion_model." + name.removesuffix(".weight")
            made |= {
                f"{at}.lora_up.weight": up,
                f"{at}.lora_down.weight": down,
                f"{at}.alpha": torch.tensor(float(rank)),
            }
    return made


def models(base: Path, where: tuple[Path, Path]) -> None:
    """Writes every model that the graphs name below `base`, where a server will look for it."""
    folders = {name: base / "models" / name for name in ("diffusion_models", "loras", "vae", "qgen", "diffusers")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    state, second = flux(), unet()
    half = {name: t.to(torch.bfloat16).contiguous() for name, t in state.items()}
    save_file(half, folders["diffusion_models"] / FLUX)
    save_file({name: t.half().contiguous() for name, t in second.items()}, folders["diffusion_models"] / UNET)
    save_file(lora(state, "attn.qkv"), folders["loras"] / LORA)
    save_file(lora(second, "attn1.to_q"), folders["loras"] / UNET_LORA)
    code = f"""
import sys
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
torch.manual_seed(0)
parts = {{name: t for name, t in TAESD(latent_channels=16).state_dict().items() if t.ndim}}
save_file({{name: torch.randn(t.shape) / max(1, t[0].numel()) ** 0.5 for name, t in parts.items()}}, {str(folders["vae"] / VAE)!r})
"""
    subprocess.run([str(where[1]), "-c", code], cwd=where[0], check=True, env=comfy_server.clean())


def sampler(model: list, size: int = 64, steps: int = 2, seed: int = 1, cfg: float = 1.0, sixteen: bool = True) -> dict:
    """Conditioning, latent, KSampler (node "s") and a saved latent (node "out") for a model at [number, output]."""
    inputs = {"model": model, "positive": ["c", 0], "negative": ["c", 0], "latent_image": ["l", 0]}
    inputs |= {"seed": seed, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        **conditions(size, sixteen),
        "s": node("KSampler", **inputs),
        "out": node("SaveLatent", samples=["s", 0], filename_prefix="out"),
    }


def conditions(size: int = 64, sixteen: bool = True) -> dict:
    kind = "EmptySD3LatentImage" if sixteen else "EmptyLatentImage"
    return {"c": node("LotusConditioning"), "l": node(kind, width=size, height=size, batch_size=1)}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def loader(name: str) -> dict:
    return {"m": node("UNETLoader", unet_name=name, weight_dtype="default")}


def latent(server: comfy_server.Server, graph: dict, at: str = "out", patience: float = 300.0) -> torch.Tensor:
    """Runs a graph and returns the latent that it saved."""
    saved = server.run(graph, patience)[at]["latents"][-1]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"].float()


def picture(server: comfy_server.Server, saved: dict) -> torch.Tensor:
    """(H, W, 3) in [0, 1] of a picture that a graph saved."""
    import numpy as np
    from PIL import Image

    path = server.base / saved["type"] / saved["subfolder"] / saved["filename"]
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def demo_folder(base: Path) -> None:
    """The demo pipeline as a folder of models/diffusers."""
    shutil.copytree(
        ROOT / "demos" / "assets" / "emoji-pixart", base / "models" / "diffusers" / "emoji", dirs_exist_ok=True
    )


def settings(base: Path) -> None:
    """The user's settings with which the front end greets nobody."""
    (base / "user" / "default").mkdir(parents=True)
    told = {"Comfy.TutorialCompleted": True, "Comfy.ColorPalette": "light"}
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(told))


def workflow(name: str) -> dict:
    return json.loads((ROOT / "example_workflows" / name).read_text())
