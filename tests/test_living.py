"""A packed model among the rest: offloading, caching, compiling, placing, copying change nothing in what it computes."""

import copy
import pickle

import pytest
import torch

import qgen
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


def test_ip_adapter_and_controlnet_inputs():
    """A UNet with residuals of a ControlNet added: the packed model takes them as the float one does."""
    from tests.coverage.check import sqnr

    model = tiny.unet()
    call = tiny.unet_call()
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 32, 8, 8), (1, 32, 8, 8), (1, 32, 4, 4), (1, 64, 4, 4)]
    down = tuple(torch.randn(*shape, generator=generator) for shape in shapes)
    mid = torch.randn(1, 64, 4, 4, generator=generator)
    extra = {**call.kwargs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    with torch.no_grad():
        plain, want = model(*call.args, **call.kwargs).sample, model(*call.args, **extra).sample
        assert sqnr(plain.double(), want.double()) < 20, "the residuals change the output"
        qgen.quantize(model, "rtn-w4a16", calibration=[call], progress=False)
        assert sqnr(model(*call.args, **extra).sample.double(), want.double()) > 12
