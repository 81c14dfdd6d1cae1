"""LoRA on packed layers: peft's adapters run beside them, qgen.fuse_lora moves them into the branch, and both come off bit for bit."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import qgen
from qgen.nn import QuantConv2d, QuantLinear
from qgen.nn.lora import fuse_lora, unfuse_lora
from qgen.recipe import Spec

pytest.importorskip("peft", reason="adapters are peft's")


@pytest.fixture(scope="module")
def tiny():
    from qgen.io import install

    install()
    path = Path(__file__).parents[1] / "io" / "tiny.py"
    spec = importlib.util.spec_from_file_location("qgen_tests_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapter(paths, model, rank=4, seed=0, prefix="transformer.", size=0.3):
    """A LoRA file's tensors for the named layers of a model."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        n, k, *kernel = model.get_submodule(path).weight.shape
        tensors[f"{prefix}{path}.lora_A.weight"] = torch.randn(rank, k, *kernel, generator=g) * size
        tensors[f"{prefix}{path}.lora_B.weight"] = torch.randn(n, rank, *([1] * len(kernel)), generator=g) * size
    return tensors


FLUX = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.proj_mlp",
    "proj_out",
)


@pytest.fixture
def pipe(tiny):
    """A Flux pipeline that is nothing but a quantized transformer; `proj_out` stays float."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from qgen.io import attach

    model = tiny.quantize(tiny.flux())
    attach(model)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


@pytest.fixture
def run(tiny, pipe):
    return lambda: tiny.run_flux(pipe.transformer)


def slots(model):
    """Every packed tensor of a model, by name."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
    return {f"{path.replace('.base_layer', '')}.{s}": t for path, m in layers.items() for s, t in m.canonical().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_one_adapter_adds_its_product(tiny):
    """Against the formula, on one layer: y + s (x Aᵀ) Bᵀ."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.quantize(tiny.bare(), skip=("3",))
    x = torch.randn(7, 64)
    base = model[0](x)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"]), model)
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    with torch.no_grad():
        model[0].lora_A["default"].weight.copy_(a)
        model[0].lora_B["default"].weight.copy_(b)
        torch.testing.assert_close(model[0](x), base + 2 * (x @ a.T) @ b.T, rtol=1e-5, atol=1e-4)


def test_load_and_unload_restore_the_bits(pipe, run):
    want, packed = run(), slots(pipe.transformer)
    pipe.load_lora_weights(adapter(FLUX, pipe.transformer), adapter_name="one")
    assert (run() - want).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(run(), want)
    assert equal(slots(pipe.transformer), packed)


def test_strengths_of_two_adapters(pipe, run):
    want, packed = run(), slots(pipe.transformer)
    for seed, name in enumerate(("one", "two")):
        pipe.load_lora_weights(adapter(FLUX, pipe.transformer, seed=seed), adapter_name=name)
    seen = []
    for strengths in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.25]):
        pipe.set_adapters(["one", "two"], strengths)
        seen.append(run())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(run(), want)
    assert equal(slots(pipe.transformer), packed), "strengths must not touch packed tensors"


def test_flux_loader_finds_shape_and_key(pipe):
    """FluxLoraLoaderMixin asks for `weight.data` and "<name>.weight" in the state dict, also of layers that the LoRA leaves out."""
    layer = pipe.transformer.get_submodule(FLUX[0])
    assert layer.weight.data.shape == (64, 64)
    assert f"{FLUX[0]}.weight" in pipe.transformer.state_dict()
    pipe.load_lora_weights(adapter(FLUX[:1], pipe.transformer), adapter_name="one")
    assert pipe.get_active_adapters() == ["one"]


@pytest.mark.parametrize("rank", [0, 8])
def test_fused_is_what_ran_unfused(tiny, pipe, run, rank):
    if not rank:
        pipe.transformer = tiny.quantize(tiny.flux(), rank=0)
    want, packed = run(), slots(pipe.transformer)
    for seed, name in enumerate(("one", "two")):
        pipe.load_lora_weights(adapter(FLUX, pipe.transformer, rank=3, seed=seed), adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.8, -0.5])
    beside = run()
    fuse_lora(pipe)
    assert torch.allclose(run(), beside, atol=2e-2 * float(beside.abs().max()))
    layer = pipe.transformer.get_submodule(FLUX[0]).get_base_layer()
    assert layer.rank == 16 and layer.fused_from == rank
    unfuse_lora(pipe)
    assert torch.equal(run(), beside)
    pipe.unload_lora_weights()
    assert torch.equal(run(), want) and equal(slots(pipe.transformer), packed)


def test_fused_adapters_outlive_unloading(pipe, run):
    want, packed = run(), slots(pipe.transformer)
    float_weight = pipe.transformer.proj_out.weight.clone()
    pipe.load_lora_weights(adapter(FLUX, pipe.transformer), adapter_name="one")
    fuse_lora(pipe)
    fused = run()
    pipe.unload_lora_weights()
    assert torch.equal(run(), fused) and (fused - want).abs().max() > 0.01
    pipe.load_lora_weights(adapter(FLUX[:1], pipe.transformer, seed=5), adapter_name="more")
    fuse_lora(pipe)
    pipe.unload_lora_weights()
    assert pipe.transformer.get_submodule(FLUX[0]).rank == 32
    unfuse_lora(pipe)
    assert torch.equal(run(), want) and equal(slots(pipe.transformer), packed)
    assert torch.equal(pipe.transformer.proj_out.weight, float_weight)


def test_fused_product_is_the_formula(tiny):
    """The branch of a fused layer against up · down + s B A in float64, within what float16 factors hold."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.quantize(tiny.bare(), skip=("3",))
    before = model[0].dequantize(torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=["0"]), model)
    a, b = torch.randn(4, 64) * 1e-3, torch.randn(96, 4) * 50  # factors of very different size
    with torch.no_grad():
        model[0].lora_A["default"].weight.copy_(a)
        model[0].lora_B["default"].weight.copy_(b)
    fuse_lora(model)
    added = model[0].get_base_layer().dequantize(torch.float32) - before
    want = 0.5 * b @ a
    assert (added - want).norm() < 2e-3 * want.norm()


def test_convolutions_take_adapters(tiny):
    model = tiny.quantize(
        tiny.unet(), Spec("int4_g64")
    )  # float activations: 4-bit ones would amplify the rounding of the factors
    paths = ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    assert isinstance(model.get_submodule(paths[0]), QuantConv2d)
    want, packed = tiny.run_unet(model), slots(model)
    model.load_lora_adapter(adapter(paths, model, prefix=""), prefix=None, adapter_name="one")
    beside = tiny.run_unet(model)
    fuse_lora(model)
    assert (beside - want).abs().max() > 0.01
    assert torch.allclose(tiny.run_unet(model), beside, atol=5e-3 * float(beside.abs().max()))
    unfuse_lora(model)
    model.delete_adapters("one")
    assert torch.equal(tiny.run_unet(model), want) and equal(slots(model), packed)


def test_diffusers_own_fusing_is_refused_before_it_changes_anything(pipe, run):
    pipe.load_lora_weights(adapter(FLUX, pipe.transformer), adapter_name="one")
    beside, weight = run(), pipe.transformer.proj_out.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match=r"qgen\.fuse_lora"):
        pipe.fuse_lora()
    assert torch.equal(pipe.transformer.proj_out.get_base_layer().weight, weight) and torch.equal(run(), beside)


def test_diffusers_own_unfusing_names_ours(pipe, run):
    pipe.load_lora_weights(adapter(FLUX, pipe.transformer), adapter_name="one")
    beside = run()
    fuse_lora(pipe)
    with pytest.raises(RuntimeError, match=r"qgen\.unfuse_lora"):
        pipe.unfuse_lora()
    unfuse_lora(pipe)
    assert torch.equal(run(), beside)


@pytest.mark.parametrize("safe", [False, True], ids=["in-place", "safe"])
def test_peft_merging_is_refused(tiny, safe):
    """`safe_merge` adds to a copy and assigns it: into a placeholder that would be lost without a word."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.quantize(tiny.bare())
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)
    with pytest.raises(RuntimeError, match=r"qgen\.fuse_lora"):
        model[0].merge(safe_merge=safe)


def test_nothing_to_fuse(pipe):
    with pytest.raises(ValueError, match="load_lora_weights"):
        fuse_lora(pipe)
    with pytest.raises(ValueError, match="no fused LoRA"):
        unfuse_lora(pipe)


def test_dora_is_refused(tiny):
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(64, 64), tiny.quantize(tiny.bare())[0])
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], use_dora=True), model)
    with pytest.raises(ValueError, match="use_dora"):
        fuse_lora(model)


def test_placeholder_reads_as_zeros_and_takes_no_memory(tiny):
    layer = tiny.quantize(tiny.bare())[0]
    weight = layer.weight
    assert weight.shape == (96, 64) and not weight.any() and weight.untyped_storage().nbytes() == 4
    for write in (lambda: weight.zero_(), lambda: weight.data.add_(1), lambda: torch.zeros(96, 64).copy_(weight)):
        with pytest.raises(RuntimeError, match="placeholder"):
            write()


@pytest.mark.slow
def test_adapters_cost_no_quality(make_demo_pipe):
    """Two random adapters of rank 8: quantized + adapters is as close to float + adapters as the two are without (within 1 dB)."""
    import qgen
    from qgen.demo import demo_prompts
    from qgen.eval.generate import generate
    from qgen.eval.psnr import psnr

    prompts = demo_prompts("held_out")[:16]
    float_pipe, packed_pipe = make_demo_pipe(), make_demo_pipe()
    qgen.quantize(packed_pipe, "rtn-int4", progress=False)

    def draw():
        return [generate(p, prompts, steps=10, progress=False) for p in (float_pipe, packed_pipe)]

    plain = draw()
    for p in (float_pipe, packed_pipe):
        two_adapters(p.transformer)
    adapted = draw()
    assert psnr(adapted[0], plain[0]).mean() < 35, "the adapters change the pictures"
    assert abs(psnr(*adapted).mean() - psnr(*plain).mean()) < 1


def two_adapters(model):
    """Two active random adapters of rank 8 on every attention and MLP layer, the same for every model of this architecture."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    where = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    for name in ("one", "two"):
        inject_adapter_in_model(
            LoraConfig(r=8, lora_alpha=8, target_modules=where, init_lora_weights=False), model, name
        )
    g = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.04
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(["one", "two"])


def test_a_fused_adapter_survives_saving_where_inputs_are_shifted(tmp_path):
    """It is meant for the input without the shift: what it makes of the shift is off the bias in the file, too."""
    from qgen.methods.dither import Dither
    from qgen.methods.temporal import Center, TemporalBias
    from qgen.nn.lora import append_rank

    recipe = qgen.Recipe(qgen.Spec("int4_g64", "uint4_g64", (Center(), Dither(), TemporalBias()), bins=4))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 16, 64, generator=generator) + 3 for _ in range(5)]
    model = qgen.quantize(nn.Sequential(nn.Linear(64, 96)).eval(), recipe, calibration=given, progress=False)
    (layer,) = model
    assert layer.t_shift is not None and float(layer.t_shift.abs().mean()) > 1
    x, before = given[0], model(given[0])
    down, up = torch.randn(4, 64, generator=generator) * 0.2, torch.randn(96, 4, generator=generator) * 0.2
    append_rank(layer, [(down, up)])
    fused = model(x)
    torch.testing.assert_close(fused, before + x @ down.T @ up.T, atol=2e-2, rtol=2e-2)
    back = qgen.load(qgen.save(model, tmp_path / "m"), into=nn.Sequential(nn.Linear(64, 96)))
    assert torch.equal(back(x), fused)
