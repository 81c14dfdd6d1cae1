"""A packed model among the rest: offloading, caching, compiling, placing, copying change nothing in what it computes."""

import copy
import pickle

import pytest
import torch

import qgen
from qgen.calibration.base import Call
from qgen.nn.packed import Packed
from tests import tiny

pytest.importorskip("diffusers", reason="the hooks are diffusers'")


@pytest.fixture
def flux():
    """A quantized tiny Flux and its output on one call."""
    model = qgen.quantize(tiny.flux(), "rtn-int4", calibration=[tiny.flux_call()], progress=False)
    return model, run(model)


def run(model, seed=0):
    with torch.no_grad():
        return tiny.first(tiny.flux_call(seed).run(model))


# Without a GPU both devices are the CPU: the hooks run all the same.
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(flux, kind):
    model, want = flux
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    assert torch.equal(run(model), want) and torch.equal(run(model), want)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_to_disk(flux, kind, tmp_path):
    model, want = flux
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(tmp_path), **options
    )
    assert torch.equal(run(model), want)


def _cpu(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def _disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, torch.device("cpu"))


def _spilled(model, folder):
    """The first block stays, the rest is on disk."""
    from accelerate import dispatch_model

    places = {name: "disk" for name, _ in model.named_children()} | {"transformer_blocks": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def _own_map(model, folder):
    """Hooks that keep the layers' own memory instead of a state dict."""
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, offload_buffers=True)
    return model


@pytest.mark.parametrize("way", [_cpu, _disk, _spilled, _own_map], ids=["cpu", "disk", "spilled", "own map"])
def test_offload_by_accelerate(flux, tmp_path, way):
    """accelerate writes canonical tensors into layers that are packed for a kernel: taken for packed ones, the output is noise."""
    from accelerate.hooks import remove_hook_from_submodules

    model, want = flux
    way(model, tmp_path)
    away = [m for m in model.modules() if isinstance(m, Packed) and m.codes.device.type == "meta"]
    assert away and all(layer.kernel is None for layer in away)
    assert torch.equal(run(model), want) and torch.equal(run(model), want)
    assert all(layer.codes.device.type == "meta" for layer in away), "nothing is kept after the call"
    remove_hook_from_submodules(model)
    assert torch.equal(run(model), want)
    assert all(layer.kernel and layer.codes.device.type == "cpu" for layer in away)


@pytest.mark.parametrize("way", [_cpu, _disk, _own_map], ids=["cpu", "disk", "own map"])
def test_offload_of_convolutions_by_accelerate(tmp_path, way):
    """Their kernels are another op's, and static scales by timestep stand around it: as `pipe.enable_sequential_cpu_offload()` has them."""
    from accelerate.hooks import remove_hook_from_submodules

    calls = [tiny.unet_call(seed) for seed in range(4)]
    model = qgen.quantize(tiny.unet(), "w4a8-static", calibration=calls, progress=False)
    with torch.no_grad():
        want = tiny.first(calls[0].run(model))
        way(model, tmp_path)
        away = [m for m in model.modules() if isinstance(m, qgen.nn.QuantConv2d) and m.codes.device.type == "meta"]
        assert away and all(layer.t_scale is not None for layer in away)
        assert torch.equal(tiny.first(calls[0].run(model)), want) and torch.equal(tiny.first(calls[0].run(model)), want)
        remove_hook_from_submodules(model)
        assert torch.equal(tiny.first(calls[0].run(model)), want)


def test_model_offload(flux):
    """What `pipe.enable_model_cpu_offload()` puts on every part: whole models move there and back."""
    from accelerate import cpu_offload_with_hook

    model, want = flux
    model, hook = cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(run(model), want)
    hook.offload()
    assert torch.equal(run(model), want)


def test_device_map(flux, tmp_path):
    model, want = flux
    qgen.save(model, tmp_path)
    for place in ("cpu", {"": "cpu"}, "auto"):
        loaded = type(model).from_pretrained(tmp_path, device_map=place)
        assert any(isinstance(layer, Packed) for layer in loaded.modules())
        torch.testing.assert_close(run(loaded), want, rtol=1e-6, atol=1e-6)


def test_sharded_loading(flux, tmp_path):
    model, want = flux
    qgen.save(model, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded), want, rtol=1e-6, atol=1e-6)


def test_first_block_cache(flux):
    """A threshold that never skips gives the same bits, and one that always skips reuses the second call's residual."""
    from diffusers import FirstBlockCacheConfig

    model, want = flux
    other = run(model, 1)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert torch.equal(run(model), want) and torch.equal(run(model, 1), other)
    model.disable_cache()
    assert torch.equal(run(model), want)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        assert torch.equal(run(model), want), "the first call fills the cache"
        assert not torch.equal(run(model, 1), other), "the second one skips blocks"


@pytest.mark.slow
def test_compile_repeated_blocks(flux):
    model, want = flux
    model.compile_repeated_blocks(fullgraph=True)
    got = run(model)
    assert torch.nn.functional.mse_loss(got, want) < 1e-8 * want.square().mean()


def test_deepcopy(flux):
    model, want = flux
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), want)
    with torch.no_grad():
        next(m for m in twin.modules() if isinstance(m, Packed)).scales.zero_()
    assert not torch.equal(run(twin), want) and torch.equal(run(model), want), "the copy has its own weights"


def test_pickling_is_refused(flux, tmp_path):
    model, want = flux
    for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
        with pytest.raises(TypeError, match=r"quantized layers are not pickled: .*qgen\.save\(model, folder\)"):
            save(model)
    assert torch.equal(run(model), want)


def test_controlnet():
    """A ControlNet made from the UNet, both packed: its residuals change the picture as the float one's do."""
    from diffusers import ControlNetModel

    from tests.coverage.check import sqnr

    torch.manual_seed(0)
    unet, call = tiny.unet(), tiny.unet_call()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16)).eval().requires_grad_(False)
    for part in (
        *control.controlnet_down_blocks,
        control.controlnet_mid_block,
        control.controlnet_cond_embedding.conv_out,
    ):
        part.weight.copy_(torch.randn_like(part.weight) * 0.2)  # zeros before training
    edges = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    guiding = Call(call.args, {**call.kwargs, "controlnet_cond": edges, "return_dict": False})

    def draw():
        with torch.no_grad():
            down, mid = guiding.run(control)
            extra = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
            return unet(*call.args, **call.kwargs, **extra).sample.double()

    with torch.no_grad():
        plain, want = unet(*call.args, **call.kwargs).sample.double(), draw()
    assert sqnr(plain, want) < 15, "the residuals change the output"
    qgen.quantize(control, "rtn-w4a16", calibration=[guiding], progress=False)
    assert sqnr(draw(), want) > 20
    qgen.quantize(unet, "rtn-w4a16", calibration=[call], progress=False)
    assert sqnr(draw(), want) > 15


def ip_adapter(unet, seed=4):
    """The weights of an IP-Adapter for a UNet, as its files hold them: a projection of 16-wide image embeddings to four tokens, and keys
    and values of every cross-attention."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator) * shape[-1] ** -0.5  # noqa: E731
    width = unet.config.cross_attention_dim
    made = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            made |= {f"{number}.to_{kind}_ip.weight": rand(inner, width) for kind in "kv"}
    image = {
        "proj.weight": rand(4 * width, 16),
        "proj.bias": rand(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": rand(width),
    }
    return {"image_proj": image, "ip_adapter": made}


@pytest.mark.parametrize("order", ["adapter first", "adapter last"])
@pytest.mark.parametrize("attention", [None, "int8"])
def test_ip_adapter(order, attention):
    """Loaded before quantizing its layers are packed, loaded afterwards they are float: either way the picture follows the image."""
    from tests.coverage.check import sqnr

    unet, call = tiny.unet(), tiny.unet_call()
    state = ip_adapter(unet)
    embeds = 3 * torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(5))
    kwargs = [{**call.kwargs, "added_cond_kwargs": {"image_embeds": [e]}} for e in embeds]

    def draw(model):
        with torch.no_grad():
            return [model(*call.args, **each).sample.double() for each in kwargs]

    twin = tiny.unet()
    twin._load_ip_adapter_weights([state])
    want = draw(twin)
    assert sqnr(want[0], want[1]) < 12, "the image changes the output"
    if order == "adapter first":
        unet._load_ip_adapter_weights([state])
        given = [Call(call.args, each) for each in kwargs]
    else:
        given = [call]
    qgen.quantize(unet, "rtn-w4a16", calibration=given, attention=attention, progress=False)
    if order == "adapter last":
        unet._load_ip_adapter_weights([state])
    keys = [layer for name, layer in unet.named_modules() if "to_k_ip" in name and isinstance(layer, torch.nn.Linear)]
    assert keys and all(isinstance(layer, Packed) == (order == "adapter first") for layer in keys)
    got = draw(unet)
    assert all(sqnr(a, b) > 12 for a, b in zip(got, want, strict=True))
    assert sqnr(got[0] - got[1], want[0] - want[1]) > 7, "what the image changes is what it changed"
    if attention:
        served = [type(m) for m in unet.modules() if "_qgen_attention" in m.__dict__]
        assert len(served) == len(unet.qgen_attention.layers) > 0
