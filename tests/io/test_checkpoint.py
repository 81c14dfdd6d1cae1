"""save and load: bit-exact both ways for every kind of model, deterministic bytes, all or nothing."""

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qgen.errors import BadCheckpoint, NotQuantizable, QgenError
from qgen.io import load, save
from qgen.nn.packed import Packed
from qgen.recipe import Spec

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["pixart", "flux", "unet", "llama", "t5"]


def content(folder):
    """Bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_come_back(tiny, tmp_path, name, dtype):
    run = getattr(tiny, f"run_{name}")
    model = tiny.quantize(getattr(tiny, name)(dtype))
    want = run(model, dtype)
    save(model, tmp_path / "a")
    ours, theirs = load(tmp_path / "a"), type(model).from_pretrained(tmp_path / "a", dtype=dtype)
    for found in (ours, theirs):
        assert torch.equal(run(found, dtype), want)
        assert same_state(found, model)
        assert found.qgen_recipe == model.qgen_recipe and found.qgen_report == model.qgen_report
        assert all(m.kernel for m in found.modules() if isinstance(m, Packed))
        assert not found.training


@pytest.mark.parametrize("name", MODELS)
def test_plain_from_pretrained(tiny, tmp_path, name):
    """Without a dtype both libraries load float32 (diffusers) or the file's dtype (transformers)."""
    model = tiny.quantize(getattr(tiny, name)())
    want = getattr(tiny, f"run_{name}")(model)
    save(model, tmp_path / "a")
    assert torch.equal(getattr(tiny, f"run_{name}")(type(model).from_pretrained(tmp_path / "a")), want)


@pytest.mark.parametrize("weight", ["int4_g64", "uint4_g64", "nvfp4", "mxfp4", "fp8_e4m3_row"])
def test_formats_survive_another_dtype(tiny, tmp_path, weight):
    """Scales in bf16, e4m3 and e8m0, and the float16 branch, must not be cast to the dtype that the user asks for."""
    model = tiny.quantize(tiny.pixart(), Spec(weight))
    save(model, tmp_path / "a")
    found = type(model).from_pretrained(tmp_path / "a", dtype=torch.float16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    assert layers and found.dtype == torch.float16
    for path, layer in layers.items():
        other = found.get_submodule(path).canonical()
        for slot, tensor in layer.canonical().items():
            want = tensor.half() if slot == "bias" else tensor
            assert other[slot].dtype == want.dtype and torch.equal(other[slot], want), f"{path}.{slot}"


def test_bare_module(tiny, tmp_path):
    model = tiny.quantize(tiny.bare())
    want = tiny.run_bare(model)
    save(model, tmp_path / "a")
    assert list(content(tmp_path / "a")) == ["model.safetensors"]
    into = tiny.bare()
    assert load(tmp_path / "a", into=into) is into
    assert torch.equal(tiny.run_bare(into), want) and same_state(into, model)
    assert into.qgen_recipe == model.qgen_recipe


def test_tied_parameters_are_stored_once(tiny, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.table, self.head = nn.Linear(64, 64), nn.Embedding(20, 64), nn.Linear(64, 20, bias=False)
            self.head.weight = self.table.weight

    model = tiny.quantize(Tied(), skip=("head",))
    save(model, tmp_path / "a")
    found = load(tmp_path / "a", into=Tied())
    assert found.head.weight is found.table.weight and torch.equal(found.table.weight, model.table.weight)


def test_a_packed_layer_under_two_paths(tiny, tmp_path):
    def shared():
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        model[2] = model[0]
        return model

    model = tiny.quantize(shared())
    model[2] = model[0]
    want = tiny.run_bare(model)
    save(model, tmp_path / "a")
    assert torch.equal(tiny.run_bare(load(tmp_path / "a", into=shared())), want)


@pytest.mark.parametrize("name", ["bare", "pixart", "llama"])
def test_same_model_same_bytes_and_again_after_loading(tiny, tmp_path, name):
    model = tiny.quantize(getattr(tiny, name)())
    for folder in ("a", "b"):
        save(model, tmp_path / folder, max_shard_size="60KB")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    found = load(tmp_path / "a", into=tiny.bare() if name == "bare" else None)
    save(found, tmp_path / "c", max_shard_size="60KB")
    weights = [n for n in content(tmp_path / "a") if "safetensors" in n]
    assert [n for n in weights if content(tmp_path / "a")[n] != content(tmp_path / "c")[n]] == []


@pytest.mark.parametrize("name", ["bare", "flux", "llama"])
def test_shards(tiny, tmp_path, name):
    model = tiny.quantize(getattr(tiny, name)())
    save(model, tmp_path / "a", max_shard_size="6KB" if name == "bare" else "60KB")
    assert len(list((tmp_path / "a").glob("*-of-*.safetensors"))) > 1
    found = load(tmp_path / "a", into=tiny.bare() if name == "bare" else None)
    assert same_state(found, model)
    if name != "bare":
        assert same_state(type(model).from_pretrained(tmp_path / "a"), model)


def test_fewer_shards_leave_no_old_ones(tiny, tmp_path):
    """An old index beside a new file would be read in its place."""
    model = tiny.quantize(tiny.flux())
    save(model, tmp_path / "a", max_shard_size="20KB")
    (tmp_path / "a" / "README.md").write_text("mine")
    (tmp_path / "a" / "pytorch_lora_weights.safetensors").write_bytes(b"mine too")
    other = tiny.quantize(tiny.flux(), rank=0)
    save(other, tmp_path / "a")
    kept = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert list(content(tmp_path / "a")) == kept
    assert same_state(load(tmp_path / "a"), other)
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing may be left beside the folder"


PICTURES = """
import hashlib, sys, torch, qgen.io
torch.set_num_threads(int(sys.argv[3]))
qgen.io.install()
from qgen.demo import register
register()
from diffusers import DiffusionPipeline
folder, dtype = sys.argv[1:3]
makers = {"load": lambda: qgen.io.load(folder)}
makers["dtype"] = lambda: DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
if dtype == "float32":
    makers["plain"] = lambda: DiffusionPipeline.from_pretrained(folder)
for name, make in makers.items():
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    picture = pipe("noto owl", num_inference_steps=2, generator=g, output_type="np").images[0]
    print(name, hashlib.sha256(picture.tobytes()).hexdigest())
"""


def sha256_of_picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    picture = pipe("noto owl", num_inference_steps=2, generator=g, output_type="np").images[0]
    return hashlib.sha256(picture.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pipeline_draws_the_same_picture_in_a_new_process(tiny, tmp_path, make_demo_pipe, dtype):
    pipe = make_demo_pipe()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to(getattr(torch, dtype))
    tiny.quantize(pipe.transformer)
    tiny.quantize(pipe.text_encoder)
    want = sha256_of_picture(pipe)
    save(pipe, tmp_path / "a")
    command = [sys.executable, "-c", PICTURES, str(tmp_path / "a"), dtype, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == dict.fromkeys(["load", "dtype", *(["plain"] if dtype == "float32" else [])], want)


def test_a_pipe_from_the_engine(tmp_path, make_demo_pipe, tiny):
    """qgen.quantize, then the pipe's own save_pretrained (before qgen.save could attach our quantizer), then qgen.save."""
    from qgen.engine import quantize

    pipe = quantize(make_demo_pipe(), "rtn-int4", progress=False)
    want = sha256_of_picture(pipe)
    pipe.save_pretrained(tmp_path / "a")
    save(pipe, tmp_path / "b")
    for folder in ("a", "b"):
        found = load(tmp_path / folder)
        assert sha256_of_picture(found) == want and found.transformer.qgen_recipe.name == "rtn-int4"
        assert json.dumps(found.transformer.qgen_report) == json.dumps(pipe.transformer.qgen_report)


def test_save_pretrained_makes_the_same_folder(tiny, tmp_path, make_demo_pipe):
    from qgen.io import attach

    pipe = make_demo_pipe()
    tiny.quantize(pipe.transformer)
    attach(pipe.transformer)
    save(pipe, tmp_path / "a")
    pipe.save_pretrained(tmp_path / "b")
    assert content(tmp_path / "a").keys() == content(tmp_path / "b").keys()
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert same_state(a.transformer, pipe.transformer) and same_state(b.transformer, pipe.transformer)
    assert same_state(a.vae, pipe.vae)


def test_a_copied_model_saves_itself(tiny, tmp_path):
    """deepcopy, then a change of the copy: what is saved must be the copy's."""
    import copy

    model = tiny.quantize(tiny.flux())
    save(model, tmp_path / "a")
    twin = copy.deepcopy(model)
    layer = next(m for m in twin.modules() if isinstance(m, Packed) and m.bias is not None)
    with torch.no_grad():
        layer.bias.add_(1)
    twin.qgen_report = [{"path": "other"}]
    save(twin, tmp_path / "b")
    found = load(tmp_path / "b")
    assert same_state(found, twin) and not same_state(found, model) and found.qgen_report == [{"path": "other"}]


def test_dequantize_gives_a_float_model(tiny, tmp_path):
    model = tiny.quantize(tiny.flux(), Spec("int4_g64"))
    save(model, tmp_path / "a")
    want = tiny.run_flux(model)
    model.dequantize()
    assert not any(isinstance(m, Packed) for m in model.modules())
    assert torch.allclose(tiny.run_flux(model), want, atol=1e-3)
    model.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert torch.allclose(tiny.run_flux(type(model).from_pretrained(tmp_path / "b")), want, atol=1e-3)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
@pytest.mark.parametrize("name", ["bare", "flux"])
def test_a_failed_save_changes_nothing(tiny, tmp_path, monkeypatch, name, failure, before):
    """The second of several shards cannot be written."""
    import safetensors.torch

    target, size = tmp_path / "a", "6KB" if name == "bare" else "60KB"
    if before == "full":
        save(tiny.quantize(getattr(tiny, name)(), rank=0), target, max_shard_size=size)
        (target / "notes.txt").write_text("mine")
    elif before == "empty":
        target.mkdir()
    then, model = content(tmp_path), tiny.quantize(getattr(tiny, name)())
    real, calls = safetensors.torch.save_file, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(QgenError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        save(model, target, max_shard_size=size)
    assert len(calls) == 2
    if isinstance(failure, OSError):
        assert (
            "No space left" in str(caught.value)
            and "nothing was changed" in str(caught.value)
            and "\n" not in str(caught.value)
        )
    assert content(tmp_path) == then and target.exists() == (before != "absent")
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if before != "absent" else [])
    monkeypatch.undo()
    save(model, target, max_shard_size=size)
    assert same_state(load(target, into=tiny.bare() if name == "bare" else None), model)


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_failed_rename_is_undone(tiny, tmp_path, monkeypatch, at):
    """The files are written, and the disk fails while they are exchanged with the old ones."""
    import os

    target = tmp_path / "a"
    save(tiny.quantize(tiny.flux(), rank=0), target, max_shard_size="40KB")
    then, model, real, calls = content(tmp_path), tiny.quantize(tiny.flux()), os.rename, []

    def failing(source, place):
        calls.append(source)
        if len(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return real(source, place)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(QgenError, match="Input/output error"):
        save(model, target)
    assert len(calls) >= at and content(tmp_path) == then


def test_a_read_only_place(tiny, tmp_path, monkeypatch):
    import tempfile

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(QgenError, match="Permission denied"):
        save(tiny.quantize(tiny.bare()), tmp_path / "a")
    assert not content(tmp_path)


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_way(tiny, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QgenError, match="file"):
        save(tiny.quantize(tiny.bare()), tmp_path / where)
    assert content(tmp_path) == {"file": b"mine"}


def test_nothing_quantized(tiny, tmp_path):
    for x in (tiny.bare(), tiny.flux(), object(), nn.ReLU()):
        with pytest.raises(NotQuantizable, match="no quantized layer"):
            save(x, tmp_path / "a")
    with pytest.raises(NotQuantizable, match="Sequential"):
        save(tiny.quantize(tiny.bare())[0], tmp_path / "a")
    assert not content(tmp_path)


def test_adapters_must_come_off_first(tiny, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    for model, target in ((tiny.quantize(tiny.bare()), "0"), (tiny.quantize(tiny.flux()), "to_q")):
        inject_adapter_in_model(LoraConfig(r=4, target_modules=[target]), model)
        with pytest.raises(ValueError, match=r"qgen\.fuse_lora"):
            save(model, tmp_path / "a")
    assert not content(tmp_path)


def test_bare_module_needs_into(tiny, tmp_path):
    save(tiny.quantize(tiny.bare()), tmp_path / "a")
    with pytest.raises(ValueError, match="into=module"):
        load(tmp_path / "a")
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path / "a", into=tiny.quantize(tiny.bare()))


OTHERS = {
    "wider": lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.BatchNorm1d(128), nn.Linear(128, 40)),
    "longer": lambda: nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.BatchNorm1d(96), nn.Linear(96, 40), nn.Linear(40, 3)
    ),
    "shorter": lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.BatchNorm1d(96)),
    "other-kind": lambda: nn.Sequential(nn.Conv1d(64, 96, 1), nn.GELU(), nn.BatchNorm1d(96), nn.Linear(96, 40)),
    "other-order": lambda: nn.Sequential(nn.GELU(), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 40)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_architecture(tiny, tmp_path, other):
    save(tiny.quantize(tiny.bare()), tmp_path / "a")
    into = OTHERS[other]()
    then, modules = {n: t.clone() for n, t in into.state_dict().items()}, list(into)
    with pytest.raises(BadCheckpoint) as caught:
        load(tmp_path / "a", into=into)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert list(into) == modules and all(torch.equal(t, into.state_dict()[n]) for n, t in then.items())


def test_a_bias_too_few(tiny, tmp_path):
    """A bias more is fine, since bias correction adds one; a bias less would leave the float model's own out."""
    plain = nn.Sequential(nn.Linear(64, 96, bias=False))
    save(tiny.quantize(plain), tmp_path / "a")
    with pytest.raises(BadCheckpoint, match="without a bias"):
        load(tmp_path / "a", into=nn.Sequential(nn.Linear(64, 96)))


def test_no_folder(tmp_path):
    with pytest.raises(QgenError, match="no folder"):
        load(tmp_path / "nothing")


def test_shard_size_is_a_text(tiny, tmp_path):
    for size in ("5", "GB", "-1GB", "0GB", "5 potatoes"):
        with pytest.raises(ValueError, match="max_shard_size"):
            save(tiny.quantize(tiny.bare()), tmp_path / "a", max_shard_size=size)
