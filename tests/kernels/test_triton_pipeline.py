"""The shipped pipeline draws one picture with every quantized layer and every attention in Triton, and it is the reference's picture.

A quantized model magnifies rounding: a code near a tie goes the other way, the next layers follow. How much is measured here on the
reference itself, by letting each layer's output miss by as much as a kernel's may (relative RMS 4e-3); a picture must lie within that.
The sharp check is the one beside it: each layer, given the input that it had during the drawing, equals the reference within 4e-3.
"""

import contextlib
from collections import Counter
from dataclasses import replace

import interpreter
import pytest
import torch

interpreter.needed()
pytest.importorskip("diffusers", reason="the shipped pipeline is a diffusers pipeline")

import qgen
from qgen.kernels import attention_ops, reference, registry
from qgen.kernels.slots import Slots
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.nn import QuantLinear

pytestmark = pytest.mark.slow

TOLERANCE = 4e-3
KERNELS = {"rtn-int4": "triton_w4a4", "w4a8": "triton_w4s_a8", "svdquant-int4": "triton_w4a4"}  # of most layers


def drawn(pipe, kind="pt"):
    """One picture (1, 3, 64, 64), in two steps."""
    g = torch.Generator().manual_seed(0)
    return pipe("noto owl", num_inference_steps=2, generator=g, output_type=kind).images.float()


def quantized(name):
    """A pipeline in bfloat16. Of svdquant's methods those that need no second look at the data."""
    pipe = qgen.demo_pipeline(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    recipe = qgen.recipes.get(name)
    if recipe.default.methods:
        recipe = replace(recipe, default=replace(recipe.default, methods=(Smooth(), LowRank(32, rounds=1))))
    calibration = {"prompts": ["noto owl"], "call_kwargs": {"num_inference_steps": 2}} if recipe.default.methods else {}
    with registry.use("reference"):
        return qgen.quantize(pipe, recipe, progress=False, **calibration)


@contextlib.contextmanager
def attention_by(kernel):
    """Within the block torch's attention is qgen's, in int8, but for heads that the kernels have no tile for (the text encoder's)."""
    stock = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.shape[-1] not in attention_ops.HEAD_DIMS:
            return stock(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return attention_ops.attention(q, k, v, attn_mask, is_causal, scale, "int8", True, False, kernel)[0]

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock


@contextlib.contextmanager
def layers_hooked(pipe, hook):
    handles = [
        m.register_forward_hook(hook) for m in pipe.transformer.modules() if isinstance(m, QuantLinear)
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def off_by_a_kernels_tolerance(layer, inputs, y):
    return y + TOLERANCE * torch.randn_like(y) * y.square().mean().sqrt()


def error(x, want):
    """Relative RMS."""
    return ((x - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", KERNELS)
def test_one_picture_through_the_kernels(name):
    pipe = quantized(name)
    canonical = {m: m.canonical() for m in pipe.transformer.modules() if isinstance(m, QuantLinear)}
    with attention_by("reference"):
        want = drawn(pipe)
        with layers_hooked(pipe, off_by_a_kernels_tolerance):
            moved = max(error(drawn(pipe), want) for _ in range(2))
    misses = []

    def against_reference(layer, inputs, y):
        slots = {
            n: t.float() if n in ("smooth", "down", "up", "bias", "shift") else t for n, t in canonical[layer].items()
        }
        layout = (layer.weight_format, layer.act_format, layer.n, layer.hadamard)
        misses.append(error(y.float(), reference.linear(inputs[0].float(), Slots.of(slots, *layout))))

    with interpreter.on_cpu():
        chosen = qgen.prepare(pipe)
        assert max(chosen, key=chosen.get) == KERNELS[name] and all(kernel.startswith("triton_") for kernel in chosen)
        with attention_by("triton_int8"), layers_hooked(pipe, against_reference), interpreter.launches() as launched:
            picture = drawn(pipe)
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
    assert len(misses) == 2 * len(canonical) and max(misses) <= TOLERANCE
    assert error(picture, want) <= 1.5 * moved, f"moved by {error(picture, want):.3f}, the reference by {moved:.3f}"
    counted = Counter(launched)
    blocks = len(pipe.transformer.transformer_blocks)
    assert counted["_attend"] == 2 * 2 * blocks, "self- and cross-attention of each block, in two steps"
    assert sum(n for kernel, n in counted.items() if kernel.startswith("_gemm")) == len(misses)


@pytest.mark.parametrize("name", ["w4a8", "svdquant-int4"])
def test_a_feed_forward_block_is_three_launches(name):
    pipe = quantized(name)
    block, x = pipe.transformer.transformer_blocks[0].ff, torch.randn(1, 20, 256).bfloat16()
    with interpreter.on_cpu(), torch.no_grad():
        qgen.prepare(pipe)
        want = block(x)
        qgen.prepare(pipe, fuse_mlp=True)
        with interpreter.launches() as launched:
            y = block(x)
    assert len(launched) == 3 and launched[1:] == ["_gemm_requantize", "_gemm"]
    assert type(y) is torch.Tensor and error(y.float(), want.float()) < (1e-2 if name == "w4a8" else 8e-2)


def test_eligible_on_the_cpu_only_within_the_block():
    ask = registry.Ask("linear", "cpu", "int4_g64", "int4_g64", torch.bfloat16, 64, 64)
    with interpreter.on_cpu():
        assert registry.choose(ask).name == "triton_w4a4"
    assert not registry.choose(ask).name.startswith("triton")
