"""diffusers and transformers know qgen once they are imported; weights are quantized while they load."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qgen import formats
from qgen.errors import QgenError
from qgen.io import QGenConfig, load
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Spec

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_installing_imports_nothing():
    code = "import sys, qgen.io; qgen.io.install(); qgen.io.install(); print(*sys.modules)"
    assert not {"diffusers", "transformers", "peft", "accelerate", "safetensors"} & set(python(code))


LIBRARIES = "import diffusers.quantizers.auto, transformers.quantizers.auto"
INSTALL = "import qgen.io; qgen.io.install(); qgen.io.install()"
IMPORTS = {"before": f"{LIBRARIES}; {INSTALL}", "after": f"{INSTALL}; {LIBRARIES}"}


@pytest.mark.parametrize("when", IMPORTS)
def test_both_libraries_know_us(when):
    pytest.importorskip("diffusers")
    code = f"""{IMPORTS[when]}
import diffusers.quantizers.auto as d, transformers.quantizers.auto as t
for m in (d, t):
    assert m.AUTO_QUANTIZATION_CONFIG_MAPPING["qgen"] is qgen.io.QGenConfig and "qgen" in m.AUTO_QUANTIZER_MAPPING, m
    assert m.__spec__.loader is m.__loader__ and "qgen" not in type(m.__loader__).__module__, m.__loader__
print("known")"""
    assert python(code) == ["known"]


def test_other_imports_pass_by():
    code = """
import sys, qgen.io
qgen.io.install()
finder = next(f for f in sys.meta_path if "qgen" in type(f).__module__)
assert finder.find_spec("json") is None and finder.find_spec("transformers") is None
import importlib.util
assert importlib.util.find_spec("no_such_module_at_all") is None
print("ok")"""
    assert python(code) == ["ok"]


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_the_private_api_is_what_we_rely_on(library):
    pytest.importorskip(library)
    import importlib

    importlib.import_module(f"qgen.io.{library}_hook").check()


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_changed_private_api_is_named(tiny, tmp_path, monkeypatch, library):
    import importlib

    hook = importlib.import_module(f"qgen.io.{library}_hook")
    base = hook.quantizer().__bases__[1]
    monkeypatch.setattr(base, "postprocess_model", lambda self, other: None)
    with pytest.raises(QgenError, match=r"postprocess_model\(model\), found \((self, )?other\)"):
        hook.check()
    model = tiny.quantize(tiny.flux() if library == "diffusers" else tiny.llama())
    with pytest.raises(QgenError, match="postprocess_model"):
        hook.attach(model)


def rounded(weight):
    """Codes and scales of a weight by the format alone."""
    flat = weight.float().flatten(1)
    return formats.get("uint4_g64").quantize(nn.functional.pad(flat, (0, -flat.shape[1] % 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["pixart", "flux", "unet", "llama", "t5"])
def test_on_the_fly(tiny, tmp_path, name, dtype):
    """From sharded float files; every layer against its weight rounded by the format, the rest untouched."""
    model = getattr(tiny, name)()
    model.save_pretrained(tmp_path / "float", max_shard_size="200KB")
    found = type(model).from_pretrained(tmp_path / "float", quantization_config=QGenConfig(), dtype=dtype)
    layers = {path: m for path, m in found.named_modules() if isinstance(m, Packed)}
    assert len(layers) >= 14 and len(found.qgen_report) == len(layers)
    for path, layer in layers.items():
        old, q = model.get_submodule(path), rounded(model.get_submodule(path).weight.to(dtype))
        slots = layer.canonical()
        assert torch.equal(slots["codes"], q.codes) and torch.equal(slots["scales"], q.scales), path
        assert (old.bias is None) == ("bias" not in slots)
        assert old.bias is None or torch.equal(slots["bias"], old.bias.to(dtype)), path
        assert layer.kernel and not any(p.requires_grad for p in layer.parameters())
    for path, tensor in model.state_dict().items():
        if path.rpartition(".")[0] not in layers:
            assert torch.equal(found.state_dict()[path], tensor.to(dtype) if tensor.is_floating_point() else tensor), (
                path
            )
    want = getattr(tiny, f"run_{name}")(found, dtype)
    found.save_pretrained(tmp_path / "packed")
    for again in (load(tmp_path / "packed"), type(model).from_pretrained(tmp_path / "packed", dtype=dtype)):
        states = again.state_dict(), found.state_dict()
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
        assert torch.allclose(
            getattr(tiny, f"run_{name}")(again, dtype), want, atol=1e-5 if dtype == torch.float32 else 2e-2
        )


def test_skip_and_recipes(tiny, tmp_path):
    tiny.flux().save_pretrained(tmp_path / "float")
    config = QGenConfig(Recipe(Spec("nvfp4")), skip=("*.ff*", "proj_out"))
    found = type(tiny.flux()).from_pretrained(tmp_path / "float", quantization_config=config)
    layers = {path: m for path, m in found.named_modules() if isinstance(m, Packed)}
    assert layers and not any(".ff" in path or path == "proj_out" for path in layers)
    assert {m.weight_format for m in layers.values()} == {"nvfp4"}


@pytest.mark.parametrize("name", ["flux", "llama"])
def test_calibrating_recipes_are_refused(tiny, tmp_path, name):
    model = getattr(tiny, name)()
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"qgen\.quantize\(pipe, recipe='w4a16'\)"):
        type(model).from_pretrained(tmp_path / "float", quantization_config=QGenConfig("w4a16"))


def test_broken_weights_are_refused(tiny, tmp_path):
    model = tiny.flux()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q.*NaN"):
        type(model).from_pretrained(tmp_path / "float", quantization_config=QGenConfig())


def test_pipeline_mapping(tiny, tmp_path, make_demo_pipe):
    from diffusers import DiffusionPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    from qgen.demo import register

    register()
    make_demo_pipe().save_pretrained(tmp_path / "float")
    mapping = {"transformer": QGenConfig(), "text_encoder": QGenConfig(Recipe(Spec("nvfp4")))}
    for config in (
        PipelineQuantizationConfig(quant_mapping=mapping),
        PipelineQuantizationConfig(
            quant_backend="qgen", quant_kwargs={"recipe": "rtn-nvfp4"}, components_to_quantize=["transformer"]
        ),
    ):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
        pipe.set_progress_bar_config(disable=True)
        kinds = {
            n: {m.weight_format for m in c.modules() if isinstance(m, Packed)}
            for n, c in pipe.components.items()
            if isinstance(c, nn.Module)
        }
        if config.quant_mapping:
            assert kinds == {"transformer": {"uint4_g64"}, "text_encoder": {"nvfp4"}, "vae": set()}
        else:
            assert kinds == {"transformer": {"nvfp4"}, "text_encoder": set(), "vae": set()}
    assert torch.tensor(pipe("noto owl", num_inference_steps=1, output_type="np").images).isfinite().all()


def test_config_is_json_and_back():
    config = QGenConfig(skip=("a.*",))
    again = QGenConfig.from_dict(config.to_dict())
    assert again == config and again.recipe == config.recipe and config.quant_method.value == "qgen"
    with pytest.raises(ValueError, match="did you mean 'recipe'"):
        QGenConfig.from_dict({"recipes": "w4a16"})
    with pytest.raises(ValueError, match="did you mean 'w4a16'"):
        QGenConfig("w4a61")
    with pytest.raises(ValueError, match="recipe must be"):
        QGenConfig(4)


def test_bits_of_eight_are_refused(tiny, tmp_path):
    tiny.flux().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="16 or 32 bits"):
        type(tiny.flux()).from_pretrained(
            tmp_path / "float", quantization_config=QGenConfig(), dtype=torch.float8_e4m3fn
        )


def test_a_quantized_folder_without_its_weights(tiny, tmp_path):
    """Float files under a config that says they are quantized."""
    from qgen.io import save

    save(tiny.quantize(tiny.flux()), tmp_path / "a")
    tiny.flux().save_pretrained(tmp_path / "b")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(QgenError, match="not written by qgen"):
        type(tiny.flux()).from_pretrained(tmp_path / "a")
