"""LoRA on pipelines shaped like Flux, SDXL, Wan and Qwen-Image, through diffusers' own loaders: load, scale, fuse, unload.

The quantized pipeline with a LoRA is compared with the float one with the same LoRA: the adapter may cost no quality beside what the
quantization costs anyway (within 1 dB). After unloading every bit is as before.
"""

import math

import pytest
import torch

import qgen
from qgen.nn.packed import Packed
from tests import tiny
from tests.coverage import denoisers
from tests.coverage.check import sqnr

pytest.importorskip("peft", reason="adapters are peft's")
pytest.importorskip("diffusers", reason="the pipelines are diffusers'")


def _flux(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


def _sdxl(model):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return StableDiffusionXLPipeline(scheduler=EulerDiscreteScheduler(), unet=model, add_watermarker=False, **nothing)


def _wan(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, vae=None, text_encoder=None, tokenizer=None
    )


def _qwen(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, vae=None, text_encoder=None, tokenizer=None
    )


SIZE = 0.07  # of B: the adapter moves the output a little further than rounding the weights does

# Pipeline around a tiny denoiser, class of the denoiser, layers that the LoRA touches.
FAMILIES = {
    "flux": (_flux, "FluxTransformer2DModel", ("attn.to_q", "attn.to_out.0", "ff.net.2", "proj_mlp")),
    "sdxl": (_sdxl, "UNet2DConditionModel", ("attn1.to_q", "attn2.to_k", "ff.net.2", "proj_in", "resnets.0.conv1")),
    "wan": (_wan, "WanTransformer3DModel", ("attn1.to_q", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2")),
    "qwen": (_qwen, "QwenImageTransformer2DModel", ("attn.to_q", "attn.add_k_proj", "img_mlp.net.2", "txt_mlp.net.2")),
}


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def adapter(model, ends, name, seed, rank=4):
    """A LoRA file's tensors for every layer whose path ends in one of `ends`; small, so that it steers and does not drown."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in model.named_modules():
        if path.endswith(ends) and hasattr(layer, "weight"):
            n, k, *kernel = layer.weight.shape
            fan = k * math.prod(kernel)
            tensors[f"{name}.{path}.lora_A.weight"] = torch.randn(rank, k, *kernel, generator=generator) / fan**0.5
            tensors[f"{name}.{path}.lora_B.weight"] = (
                torch.randn(n, rank, *[1] * len(kernel), generator=generator) * SIZE
            )
    assert len(tensors) >= 4
    return tensors


@pytest.fixture(params=FAMILIES)
def family(request):
    """(float pipeline, quantized pipeline, run, LoRA tensors by seed)."""
    build, kind, ends = FAMILIES[request.param]
    make, call = denoisers.model_and_call(kind)
    float_pipe, packed_pipe = build(make()), build(make())
    qgen.quantize(denoiser(packed_pipe), "rtn-w4a16", calibration=[call], progress=False)
    prefix = "unet" if getattr(float_pipe, "unet", None) is not None else "transformer"

    def run(pipe):
        with torch.no_grad():
            return tiny.first(call.run(denoiser(pipe))).double()

    return float_pipe, packed_pipe, run, lambda seed: adapter(denoiser(float_pipe), ends, prefix, seed)


def load(pipe, tensors, name):
    pipe.load_lora_weights(dict(tensors), adapter_name=name)


def slots(pipe):
    return {
        f"{path.replace('.base_layer', '')}.{slot}": t.clone()
        for path, layer in denoiser(pipe).named_modules()
        if isinstance(layer, Packed)
        for slot, t in layer.canonical().items()
    }


def test_load_scale_and_unload(family):
    float_pipe, packed_pipe, run, lora = family
    plain, want, before = run(float_pipe), run(packed_pipe), slots(packed_pipe)
    base = sqnr(want, plain)
    for pipe in (float_pipe, packed_pipe):
        load(pipe, lora(1), "one")
        load(pipe, lora(2), "two")
    for strengths in ([1.0, 0.0], [0.5, -0.7]):
        for pipe in (float_pipe, packed_pipe):
            pipe.set_adapters(["one", "two"], strengths)
        adapted = run(float_pipe)
        assert sqnr(adapted, plain) < base - 1, "the adapter changes the output more than rounding does"
        assert sqnr(run(packed_pipe), adapted) > base - 1
    packed_pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(run(packed_pipe), want)
    packed_pipe.unload_lora_weights()
    now = slots(packed_pipe)
    assert torch.equal(run(packed_pipe), want)
    assert now.keys() == before.keys() and all(torch.equal(now[name], t) for name, t in before.items())


def test_fuse_and_unfuse(family):
    _, packed_pipe, run, lora = family
    want, before = run(packed_pipe), slots(packed_pipe)
    load(packed_pipe, lora(1), "one")
    beside = run(packed_pipe)
    qgen.fuse_lora(packed_pipe)
    assert sqnr(run(packed_pipe), beside) > 45, "factors are stored in 16 bits"
    qgen.unfuse_lora(packed_pipe)
    assert torch.equal(run(packed_pipe), beside)
    packed_pipe.unload_lora_weights()
    now = slots(packed_pipe)
    assert torch.equal(run(packed_pipe), want) and all(torch.equal(now[name], t) for name, t in before.items())
