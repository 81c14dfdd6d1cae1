"""Conversion, export and import as streams: against on-the-fly quantization, diffusers' own conversions, and models that run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qgen import formats
from qgen.errors import BadCheckpoint, BadData, NotQuantizable, QgenError
from qgen.io import datafree, load, save
from qgen.io.convert import convert, export
from qgen.io.datafree import rounded
from qgen.io.float_layers import dequantize
from qgen.io.into import load_peer
from qgen.io.keys import original as outward_names
from qgen.io.keys import plan
from qgen.io.keys.deferred import Deferred, defer, rows, sources, value
from qgen.io.keys.fused import joined
from qgen.io.onthefly import Step
from qgen.io.parts import check, of_module
from qgen.io.peers.base import Layer, Plain, exporters
from qgen.io.peers.floats import dequantized
from qgen.io.peers.source import open_source
from qgen.io.peers.writer import SafetensorsWriter
from qgen.nn.packed import Layout, Packed
from qgen.recipe import Recipe, Spec, methods
from qgen.site import Site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original():
    spec = importlib.util.spec_from_file_location("qgen_tests_original", Path(__file__).with_name("original.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flux(tiny, original, tmp_path_factory):
    """A folder: flux.safetensors in ComfyUI's layout, float/ in diffusers', and the model itself."""
    folder = tmp_path_factory.mktemp("flux")
    model = tiny.flux()
    named = original.flux(model)
    save_file({f"model.diffusion_model.{name}": t for name, t in named.items()}, folder / "flux.safetensors")
    model.save_pretrained(folder / "float")
    return folder, model, named


def same(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


def run(code, *args, **kwargs):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, timeout=300, **kwargs
    )


# -- names ------------------------------------------------------------------------------------------------------------


def test_flux_names_and_values(flux):
    _, model, named = flux
    shapes = {f"model.diffusion_model.{name}": tuple(t.shape) for name, t in named.items()}
    planned = plan(shapes, dict.fromkeys(shapes, torch.float32), Path("x"))
    assert planned.kind == "FluxTransformer2DModel" and planned.renamed and not planned.unused
    want = model.state_dict()
    assert planned.tensors.keys() == want.keys()
    for name, tensor in planned.tensors.items():
        found = value(tensor, lambda stored: named[stored.removeprefix("model.diffusion_model.")])
        assert torch.equal(found, want[name]), name


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_of_full_width_is_diffusers_own_conversion(guidance):
    """Names and shapes, on meta; and which rows each tensor is made of."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as theirs

    h = 3072
    outer = {
        "img_in": (h, 64),
        "txt_in": (h, 4096),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for name in ("time", "vector", *(["guidance"] if guidance else [])):
        outer |= {f"{name}_in.in_layer": (h, 256), f"{name}_in.out_layer": (h, h)}
    for i in range(2):
        for stream in ("img", "txt"):
            block = {
                "mod.lin": (6 * h, h),
                "attn.qkv": (3 * h, h),
                "attn.proj": (h, h),
                "mlp.0": (4 * h, h),
                "mlp.2": (h, 4 * h),
            }
            outer |= {f"double_blocks.{i}.{stream}_{name}": size for name, size in block.items()}
        single = {"modulation.lin": (3 * h, h), "linear1": (7 * h, h), "linear2": (h, 5 * h)}
        outer |= {f"single_blocks.{i}.{name}": size for name, size in single.items()}
    shapes = {f"{name}.weight": size for name, size in outer.items()} | {
        f"{name}.bias": size[:1] for name, size in outer.items()
    }
    for what in ("query", "key"):
        for i in range(2):
            shapes |= {f"double_blocks.{i}.{s}_attn.norm.{what}_norm.scale": (128,) for s in ("img", "txt")}
            shapes[f"single_blocks.{i}.norm.{what}_norm.scale"] = (128,)
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    planned = plan(shapes, dtypes, Path("x"))
    want = theirs({name: defer(name, shapes[name], dtypes[name]) for name in shapes})
    assert {n: tuple(t.shape) for n, t in planned.tensors.items()} == {n: tuple(t.shape) for n, t in want.items()}
    for name, tensor in want.items():
        if name.endswith(".bias"):
            (mine, taken), (other, wanted) = rows(planned.tensors[name]), rows(tensor)
            assert mine == other and (taken is wanted is None or torch.equal(taken, wanted)), name
        assert sources(planned.tensors[name]) == sources(tensor)
    assert planned.config["num_layers"] == planned.config["num_single_layers"] == 2
    assert planned.config["guidance_embeds"] is guidance
    from diffusers import FluxTransformer2DModel

    from qgen.io.skeleton import without_memory

    with without_memory():
        model = FluxTransformer2DModel.from_config(planned.config)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {n: tuple(t.shape) for n, t in want.items()}


WAN = {
    "head.modulation": (1, 2, 8), "patch_embedding.weight": (8, 4, 1, 2, 2), "time_embedding.0.weight": (8, 8), "head.head.weight": (4, 8),
    "blocks.0.self_attn.q.weight": (8, 8), "blocks.0.cross_attn.o.bias": (8,), "blocks.0.ffn.0.weight": (16, 8),
    "blocks.0.modulation": (1, 6, 8),
}  # fmt: skip
Z_IMAGE = {
    "layers.0.adaLN_modulation.0.weight": (8, 8), "layers.0.attention.qkv.weight": (24, 8), "layers.0.attention.out.weight": (8, 8),
    "layers.0.attention.q_norm.weight": (4,), "final_layer.linear.weight": (8, 8), "x_embedder.weight": (8, 8),
}  # fmt: skip
SANA = {
    "blocks.0.cross_attn.q_linear.weight": (8, 8), "blocks.0.cross_attn.q_linear.bias": (8,),
    "blocks.0.cross_attn.kv_linear.weight": (16, 8), "blocks.0.cross_attn.kv_linear.bias": (16,),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, shapes", [("WanTransformer3DModel", WAN), ("ZImageTransformer2DModel", Z_IMAGE)], ids=["wan", "z-image"]
)
def test_other_families_run_diffusers_conversion_tensor_by_tensor(kind, shapes):
    """The same function on whole tensors is the truth."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    want = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](checkpoint=dict(tensors))
    planned = plan(shapes, dict.fromkeys(shapes, torch.float32), Path("x"))
    assert planned.kind == kind and planned.tensors.keys() == want.keys()
    assert any(name not in tensors for name in want)
    for name, tensor in planned.tensors.items():
        assert torch.equal(value(tensor, tensors.__getitem__), want[name]), name


def test_a_family_with_parts_missing_is_refused():
    pytest.importorskip("diffusers")
    with pytest.raises(BadCheckpoint, match="looks like sana"):
        plan(SANA, dict.fromkeys(SANA, torch.float32), Path("x"))


def test_unknown_families_and_diffusers_names_stay():
    shapes = {"transformer_blocks.0.attn.to_q.weight": (8, 8), "norm.weight": (8,)}
    planned = plan(shapes, dict.fromkeys(shapes, torch.float32), Path("x"))
    assert list(planned.tensors) == list(shapes) and not planned.kind and not planned.renamed


def test_rows_of_deferred_tensors():
    a, b = defer("a", (6, 4), torch.float32), defer("b", (6, 4), torch.float32)
    assert rows(a) == ("a", None)
    assert rows(torch.cat([a.chunk(2)[1], a.chunk(2)[0]]))[1].tolist() == [3, 4, 5, 0, 1, 2]
    assert rows(a.reshape(2, 3, 4).transpose(0, 1).reshape(6, 4))[1].tolist() == [0, 3, 1, 4, 2, 5]
    for other in (torch.cat([a, b]), a.flip(1), a.T, a[:, :2], a.reshape(4, 6)):
        assert isinstance(other, Deferred)
        with pytest.raises(ValueError):
            rows(other)
    with pytest.raises(BadCheckpoint, match="one tensor at a time"):
        a.add_(1)
    with pytest.raises(BadCheckpoint, match="one tensor at a time"):
        bool(a.sum() > 0)


# -- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rtn-int4", "rtn-nvfp4", "fp8"])
def test_convert_gives_what_loading_with_a_config_gives(flux, recipe, tmp_path, tiny):
    """Bit for bit the model that from_pretrained(quantization_config=...) makes; and the same without the model's config."""
    from diffusers import FluxTransformer2DModel

    from qgen import QGenConfig

    folder, model, _ = flux
    want = FluxTransformer2DModel.from_pretrained(folder / "float", quantization_config=QGenConfig(recipe))
    assert convert(folder / "flux.safetensors", recipe, tmp_path / "a", config=folder / "float") == []
    got = load(tmp_path / "a")
    same(got, want)
    same(FluxTransformer2DModel.from_pretrained(tmp_path / "a"), want)
    error = tiny.run_flux(got) - tiny.run_flux(model)
    assert 0 < error.norm() / tiny.run_flux(model).norm() < 0.1
    convert(folder / "flux.safetensors", recipe, tmp_path / "b")
    same(load(tmp_path / "b", into=tiny.flux()), want)
    convert(folder / "float", recipe, tmp_path / "c")
    same(load(tmp_path / "c"), want)


def test_the_report_is_that_of_loading(flux, tmp_path):
    from diffusers import FluxTransformer2DModel

    from qgen import QGenConfig

    folder, _, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a", skip=("*.ff.*",))
    got = load(tmp_path / "a")
    want = FluxTransformer2DModel.from_pretrained(
        folder / "float", quantization_config=QGenConfig("rtn-int4", skip=("*.ff.*",))
    )
    mine = {row["path"]: row for row in got.qgen_report}
    assert mine.keys() == {row["path"] for row in want.qgen_report}
    for row in want.qgen_report:
        for key in ("kind", "shape", "spec", "nbytes", "bytes16", "why"):
            assert mine[row["path"]][key] == row[key]
        assert mine[row["path"]]["log"]["weight_sqnr_db"] == pytest.approx(row["log"]["weight_sqnr_db"], abs=0.02)
    assert got.qgen_recipe == want.qgen_recipe


@pytest.mark.parametrize("spec", ["int4_g64", "nvfp4", "fp8_e4m3_row", "fp8_e4m3_tensor", "int4_s8_g64", "uint4_g64"])
def test_rows_at_a_time_give_the_same_codes(spec, monkeypatch):
    step = Step(Site("x", "linear", "", 0, "x", (50, 192)), Spec(spec), "")
    weight = torch.randn(50, 192).bfloat16()
    whole = rounded(weight, None, step, torch.bfloat16)
    monkeypatch.setattr(datafree, "_AT_ONCE", 192 * 7)
    pieces = rounded(weight, None, step, torch.bfloat16)
    assert whole.slots.keys() == pieces.slots.keys()
    assert all(torch.equal(whole.slots[slot], pieces.slots[slot]) for slot in whole.slots)
    assert whole.row["log"]["weight_sqnr_db"] == pytest.approx(pieces.row["log"]["weight_sqnr_db"], abs=0.01)


def test_names_can_be_kept(flux, tmp_path):
    folder, _, named = flux
    convert(folder / "flux.safetensors", "rtn-int4", tmp_path / "a", keys="keep")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["model.diffusion_model.double_blocks.0.img_attn.qkv.codes"].shape == (192, 32)
    kept = "model.diffusion_model.img_in.weight"
    assert torch.equal(tensors[kept], named["img_in.weight"])


def test_float8_without_scales_counts_as_float(tmp_path):
    names = [f"blocks.{i}.{x}.weight" for i in range(2) for x in "ab"]
    tensors = {name: torch.randn(64, 64).to(torch.float8_e4m3fn) for name in names} | {
        "norm.weight": torch.ones(64).bfloat16()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    wide = {name: t.bfloat16() for name, t in tensors.items()}
    save_file(wide, tmp_path / "y.safetensors")
    for name in "xy":
        convert(tmp_path / f"{name}.safetensors", "rtn-int4", tmp_path / name)
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in "xy")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_tables_and_layers_outside_blocks_stay_float(tmp_path):
    names = {
        "wte.weight": (96, 64),
        "head.weight": (96, 64),
        "blocks.0.q.weight": (64, 64),
        "blocks.0.k.weight": (64, 64),
    }
    save_file({name: torch.randn(size) for name, size in names.items()}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", "rtn-int4", tmp_path / "x")
    held = load_file(tmp_path / "x" / "model.safetensors").keys()
    assert {"wte.weight", "head.weight", "blocks.0.q.codes"} <= held and "blocks.0.q.weight" not in held


def test_a_quantized_file_is_rounded_anew(flux, tmp_path, tiny):
    folder, _, _ = flux
    convert(folder / "float", "fp8", tmp_path / "a")
    convert(tmp_path / "a", "rtn-int4", tmp_path / "b")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    floats = dequantize(load(tmp_path / "a"))
    want = {p: m.weight.detach() for p, m in floats.named_modules() if isinstance(m, nn.Linear)}
    got = load(tmp_path / "b")
    for path, layer in got.named_modules():
        if isinstance(layer, Packed):
            step = Step(Site(path, "linear", "", 0, path, tuple(want[path].shape)), Spec("int4_g64", "int4_g64"), "")
            assert torch.equal(
                layer.canonical()["codes"], rounded(want[path], None, step, torch.float32).slots["codes"]
            )


def test_progress_counts_every_byte_once(flux, tmp_path):
    folder, _, named = flux
    seen = []
    convert(folder / "flux.safetensors", "rtn-int4", tmp_path / "a", progress=lambda *pair: seen.append(pair))
    total = sum(t.nbytes for t in named.values())
    assert seen[-1] == (total, total) and seen == sorted(seen) and {pair[1] for pair in seen} == {total}
    assert len(seen) > 20


def test_mistakes(flux, tmp_path):
    folder, _, _ = flux
    file = folder / "flux.safetensors"
    for arguments, words in (
        ({"to": "comfi"}, "unknown exporter 'comfi'"),
        ({"recipe": "svdquant-int4"}, "fits recorded activations"),
        ({"recipe": "rtn-int5"}, "did you mean 'rtn-int4'"),
        ({"keys": "mine"}, "keys is one of"),
        ({"config": tmp_path / "none"}, "no config"),
        ({"config": {"_class_name": "FluxTransformer2DModel", "num_layers": 3}}, "num_layers|wants"),
        ({"config": {"_class_name": "FluxPipeline"}}, "diffusers cannot read single files of FluxPipeline"),
        ({"skip": ("*",)}, "keeps every layer"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(file, **{"recipe": "rtn-int4", "target": tmp_path / "out", **arguments})
        assert not list(tmp_path.iterdir())


def test_nan_is_refused_and_nothing_is_left(tmp_path):
    bad = torch.randn(64, 64)
    bad[3, 3] = torch.nan
    save_file({"blocks.0.a.weight": torch.randn(64, 64), "blocks.0.b.weight": bad}, tmp_path / "x.safetensors")
    with pytest.raises(BadData, match=r"blocks\.0\.b"):
        convert(tmp_path / "x.safetensors", "rtn-int4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


MEASURED = """
import sys
from qgen.io.convert import convert
def top():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
convert(sys.argv[1], "rtn-int4", sys.argv[3])  # imports what there is to import
before = top()
convert(sys.argv[2], "rtn-int4", sys.argv[4])
print(top() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 400 MB whose largest tensor has 8 MB, in less than 120 MB."""
    pool = torch.randn(2048, 2048).bfloat16()
    for name, count in (("small", 1), ("large", 48)):
        with SafetensorsWriter(tmp_path / f"{name}.safetensors") as writer:
            for i in range(count):
                writer.add(f"blocks.{i}.a.weight", pool.roll(i))
                writer.add(f"blocks.{i}.b.weight", pool[:64])
    done = run(MEASURED, *(tmp_path / name for name in ("small.safetensors", "large.safetensors", "a", "b")))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large.safetensors").stat().st_size > 400e6
    assert int(done.stdout.split()[-1]) < 120e6


def test_ctrl_c_leaves_nothing(tmp_path):
    """The command, interrupted while it writes."""
    with SafetensorsWriter(tmp_path / "x.safetensors") as writer:
        for i in range(400):
            writer.add(f"blocks.{i}.a.weight", torch.randn(512, 512))
            writer.add(f"blocks.{i}.b.weight", torch.randn(512, 512))
    command = [
        sys.executable,
        "-m",
        "qgen",
        "convert",
        str(tmp_path / "x.safetensors"),
        "--recipe",
        "rtn-nvfp4",
        "--out",
        str(tmp_path / "out"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    hears = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  what is run in the background may have it ignored
    process = subprocess.Popen(command, **pipes, env=env, cwd=ROOT, preexec_fn=hears)

    def writing():
        return [p for p in tmp_path.glob(".out.saving-*/.*.writing-*") if p.stat().st_size > 1 << 20]

    deadline = time.monotonic() + 120
    while not writing() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert writing(), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; nothing was changed" in err and "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


FULL = """
import resource, sys
from qgen.errors import QgenError
from qgen.io.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    convert(sys.argv[1], "rtn-int4", sys.argv[2])
except QgenError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX's")
def test_a_full_disk_is_one_line(tmp_path):
    with SafetensorsWriter(tmp_path / "x.safetensors") as writer:
        for i in range(8):
            writer.add(f"blocks.{i}.a.weight", torch.randn(512, 512))
            writer.add(f"blocks.{i}.b.weight", torch.randn(64, 512))
    done = run(FULL, tmp_path / "x.safetensors", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "could not" in line and "nothing was changed" in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# -- export and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "unet", "llama"])
def test_qgens_own_files_come_back(name, tiny, tmp_path):
    """Rank, smoothing, convolutions, tied weights: through the importer, the exporter and the loader."""
    model = tiny.quantize(getattr(tiny, name)(), least=16)
    save(model, tmp_path / "a")
    parts = list(of_module(model))
    assert any(isinstance(part, Layer) and part.kind == "conv2d" for part in parts) == (name == "unet")
    if name != "llama":  # a stream of parts does not tie: the copy becomes a tensor of its own
        export(model, "qgen", tmp_path / "b")
        export(tmp_path / "a", "qgen", tmp_path / "c")
        for folder in "bc":
            again = load(tmp_path / folder)
            same(again, model)
            assert again.qgen_recipe == model.qgen_recipe
            assert {row["path"] for row in again.qgen_report} == {row["path"] for row in model.qgen_report}
        assert torch.equal(getattr(tiny, f"run_{name}")(load(tmp_path / "c")), getattr(tiny, f"run_{name}")(model))
    into = load_peer(tmp_path / "a", getattr(tiny, name)())
    same(into, model)
    assert torch.equal(getattr(tiny, f"run_{name}")(into), getattr(tiny, f"run_{name}")(model))


def test_exported_floats_are_the_dequantized_model(tiny, tmp_path):
    model = tiny.quantize(tiny.flux())
    lines = export(model, "float", tmp_path / "x.safetensors")
    want = dequantize(model).state_dict()
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == want.keys() and all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)
    assert len(lines) > 10 and all("dequantized" in line for line in lines)


def test_pipelines_and_their_folders(make_demo_pipe, tmp_path):
    import qgen

    pipe = qgen.quantize(make_demo_pipe(), "rtn-int4", progress=False)
    qgen.save(pipe, tmp_path / "pipe")
    qgen.export(pipe, "qgen", tmp_path / "a")
    qgen.export(tmp_path / "pipe", "qgen", tmp_path / "b")
    for name in "ab":
        same(load(tmp_path / name, into=make_demo_pipe().transformer), pipe.transformer)
    with pytest.raises(NotQuantizable, match="no quantized layer"):
        export(make_demo_pipe(), "qgen", tmp_path / "c")
    with pytest.raises(ValueError, match="is a whole pipeline"):
        open_source(tmp_path / "pipe")


def test_fused_layers_of_original_files_are_split_into_a_live_model(flux, tiny, tmp_path):
    """The file holds packed qkv under ComfyUI's names. int4 scales belong to rows, so the split layers are those of a split weight."""
    folder, _, _ = flux
    convert(folder / "flux.safetensors", "rtn-int4", tmp_path / "a", keys="keep")
    convert(folder / "flux.safetensors", "rtn-int4", tmp_path / "b", config=folder / "float")
    got, want = load_peer(tmp_path / "a", tiny.flux()), load(tmp_path / "b")
    same(got, want)
    assert torch.equal(tiny.run_flux(got), tiny.run_flux(want))


def test_a_live_model_is_filled_or_left_alone(flux, tiny, tmp_path):
    folder, _, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a")
    other = tiny.pixart()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(BadCheckpoint, match="PixArtTransformer2DModel"):
        load_peer(tmp_path / "a", other)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in before.items())
    with pytest.raises(ValueError, match="quantized already"):
        load_peer(tmp_path / "a", load(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"no kind of quantized file.*Importers: .*qgen's own checkpoint"):
        load_peer(folder / "flux.safetensors", tiny.flux())


def test_one_bit_of_damage_stops_an_export(flux, tmp_path):
    folder, _, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a")
    path = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match="sha256 differs"):
        export(tmp_path / "a", "float", tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("to", sorted(exporters))
def test_every_exporter_leaves_nothing_when_interrupted(to, flux, tmp_path):
    """An interruption in the middle of the parts."""
    from qgen.io.peers.base import Model

    folder, _, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a")
    source = open_source(tmp_path / "a")
    from qgen.io.parts import importer_for, model_of

    def parts():
        for number, part in enumerate(importer_for(source)[1].parts(source)):
            if number == 9:
                raise KeyboardInterrupt
            yield part

    about = Model(model_of(source).kind, model_of(source).config)
    with pytest.raises(KeyboardInterrupt):
        exporters[to].write(parts(), tmp_path / "out.safetensors", about=about)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- the writer and the source ------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(15).reshape(5, 3).bfloat16(),
    "odd": torch.arange(7, dtype=torch.uint8),
    "big": torch.arange(6400.0).reshape(100, 64),
    "one": torch.tensor(1.5),
    "none": torch.empty(0, 3),
    "bool": torch.tensor([True, False, True]),
    "f8": torch.ones(9).to(torch.float8_e4m3fn),
    "f64": torch.tensor([1.0], dtype=torch.float64),
    "c": torch.ones(3, dtype=torch.complex64),
    "strided": torch.arange(12.0).reshape(3, 4).T,
}


def written(path, tensors=TENSORS, **options):
    with SafetensorsWriter(path, {"format": "pt", "ü": "ß"}, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return path


@pytest.mark.parametrize("room", [0, 100, 1 << 14])
def test_what_the_writer_writes_safetensors_and_the_source_read(room, tmp_path, monkeypatch):
    monkeypatch.setattr("qgen.io.peers.writer._CHUNK", 1000)  # data are moved up in several pieces
    path = written(tmp_path / "x.safetensors", room=room)
    source, theirs = open_source(path), load_file(path)
    assert theirs.keys() == TENSORS.keys() == source.shapes.keys()
    assert source.metadata == {"format": "pt", "ü": "ß"}
    for name, tensor in TENSORS.items():
        for found in (theirs[name], source.read(name)):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert (
                found.contiguous().reshape(-1).view(torch.uint8).tolist()
                == tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
            )


def test_tensors_are_aligned_whatever_comes_before(tmp_path):
    path = written(tmp_path / "x.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, claim in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + claim["data_offsets"][0]) % TENSORS[name].dtype.itemsize == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    assert written(tmp_path / "a").read_bytes() == written(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_failed_write_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error), SafetensorsWriter(path) as writer:
        writer.add("a", torch.ones(3))
        raise error
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_the_writer_refuses(tmp_path):
    for name, tensor, words in (
        ("a", torch.ones(2), "called 'a'"),
        ("__metadata__", torch.ones(2), "__metadata__"),
        ("\ud800", torch.ones(2), "UTF-8"),
        ("b", torch.ones(2, dtype=torch.complex128), "cannot hold"),
        ("b", torch.empty(2, device="meta"), "meta device"),
    ):
        with pytest.raises(ValueError, match=words), SafetensorsWriter(tmp_path / "x") as writer:
            writer.add("a", torch.ones(2))
            writer.add(name, tensor)
    with pytest.raises(QgenError, match="is a folder"), SafetensorsWriter(tmp_path):
        pass
    with pytest.raises(QgenError, match="nothing was changed"), SafetensorsWriter(tmp_path / "f" / "g" / ("n" * 300)):
        pass
    assert not list(tmp_path.rglob("*.writing*")) and not (tmp_path / "x").exists()


def test_shards_are_one_source(tiny, tmp_path):
    model = tiny.flux()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    source = open_source(tmp_path)
    state = model.state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and source.config["_class_name"] == "FluxTransformer2DModel"
    assert source.shapes.keys() == state.keys() and all(torch.equal(source.read(name), t) for name, t in state.items())


def test_a_read_tensor_is_a_copy(tmp_path):
    path = written(tmp_path / "x.safetensors")
    source = open_source(path)
    first = source.read("big")
    first.zero_()
    assert torch.equal(source.read("big"), TENSORS["big"])
    path.write_bytes(path.read_bytes()[:-30000])
    with pytest.raises(BadCheckpoint, match="shorter"):
        source.read("big")
    with pytest.raises(ValueError, match="did you mean 'big'"):
        source.read("bi")


@dataclass(frozen=True)
class Narrow:
    """A method that looks at weights alone."""

    name = "narrow_of_tests"

    def needs(self, site):
        return frozenset()

    def refine(self, draft, stats):
        return replace(draft, clip=0.8)


def test_recipes_with_methods_on_weights_alone(tmp_path):
    methods.add(Narrow.name, Narrow)
    weights = {f"blocks.0.{x}.weight": torch.randn(64, 64) for x in "ab"}
    save_file(weights, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", Recipe(Spec("int4_g64", None, (Narrow(),)), name="narrow"), tmp_path / "x")
    got = load_file(tmp_path / "x" / "model.safetensors")
    for name, weight in weights.items():
        want = formats.get("int4_g64").quantize(weight, 0.8)
        assert torch.equal(got[name.replace("weight", "codes")], want.codes)
        assert torch.equal(got[name.replace("weight", "scales")], want.scales)


# -- to the original layout ------------------------------------------------------------------------------------------------


def test_float_parts_get_their_original_names_back(flux):
    _, model, named = flux
    parts = [Plain(name, t) for name, t in model.state_dict().items()]
    for order in (parts, parts[::-1]):
        made = {part.name: part.tensor for part in outward_names(order, "FluxTransformer2DModel")}
        assert made.keys() == named.keys() and all(torch.equal(made[name], t) for name, t in named.items())
    with pytest.raises(BadCheckpoint, match="some of its parts are not there"):
        list(
            outward_names(
                [part for part in parts if not part.name.endswith("attn.to_k.weight")], "FluxTransformer2DModel"
            )
        )
    with pytest.raises(BadCheckpoint, match="no part of FluxTransformer2DModel"):
        list(outward_names([Plain("blocks.0.weight", torch.ones(2))], "FluxTransformer2DModel"))
    with pytest.raises(ValueError, match="no original layout is known"):
        outward_names(parts, "PixArtTransformer2DModel")


def test_packed_layers_are_fused_bit_for_bit(flux, tmp_path):
    """Scales of int4 belong to rows: fusing packed layers is packing the fused weight."""
    folder, _, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a")
    export(tmp_path / "a", "qgen", tmp_path / "b", keys="original")
    convert(folder / "float", "rtn-int4", tmp_path / "c", keys="original")
    convert(folder / "flux.safetensors", "rtn-int4", tmp_path / "d", keys="keep")
    want = load_file(tmp_path / "d" / "model.safetensors")
    for name in "bc":
        got = load_file(next((tmp_path / name).glob("*.safetensors")))
        assert {f"model.diffusion_model.{n}" for n in got} == want.keys()
        assert all(torch.equal(t, want[f"model.diffusion_model.{n}"]) for n, t in got.items())


def test_comfyui_gets_original_names_by_default(flux, tmp_path):
    """From a model of diffusers and from an original file; both are the same layers."""
    folder, _, _ = flux
    convert(folder / "flux.safetensors", "rtn-nvfp4", tmp_path / "a.safetensors", "comfy")
    a = open_source(tmp_path / "a.safetensors")
    assert a.dtypes["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"] == torch.uint8
    convert(folder / "float", "rtn-nvfp4", tmp_path / "q")
    export(tmp_path / "q", "comfy", tmp_path / "b.safetensors", format="nvfp4")
    b = open_source(tmp_path / "b.safetensors")
    assert {f"model.diffusion_model.{name}" for name in b.shapes} == set(a.shapes)
    name = "double_blocks.0.img_mlp.0.weight"  # fused with nothing: the same bytes on both ways
    assert torch.equal(a.read(f"model.diffusion_model.{name}"), b.read(name))


def layer(path, n, k=128, spec="int4_g64", act="int4_g64", rank=0, smooth=None, down=None, bias=True):
    made = rounded(
        torch.randn(n, k),
        torch.randn(n) if bias else None,
        Step(Site(path, "linear", "", 0, "", (n, k)), Spec(spec, act), ""),
        torch.float32,
    )
    more = {"smooth": smooth} if smooth is not None else {}
    if rank:
        more |= {"down": torch.randn(rank, k) / k**0.5 if down is None else down, "up": torch.randn(n, rank)}
    slots = {**made.slots, **more}
    layout = Layout(spec, act or "", rank, 0, tuple(slot for slot in slots if slot not in ("codes", "scales")))
    return check(Layer(path, (n, k), layout, slots, torch.float32))


def weights(layers):
    pairs = [dequantized(part) for part in layers]
    return torch.cat([w for w, _ in pairs]), torch.cat([b if b is not None else torch.zeros(len(w)) for w, b in pairs])


SMOOTH, DOWN = torch.rand(128) + 0.5, torch.randn(4, 128) / 11
FUSED = {  # (layers, whether nothing is rounded anew)
    "plain": (lambda: [layer(x, 32) for x in "qkv"], True),
    "one without bias": (lambda: [layer("q", 32), layer("k", 64, bias=False)], True),
    "zero points": (lambda: [layer(x, 32, spec="uint4_g64", act=None) for x in "qkv"], True),
    "one smoothing, one down": (lambda: [layer(x, 32, rank=4, smooth=SMOOTH, down=DOWN) for x in "qkv"], True),
    "branches of their own": (
        lambda: [layer(x, 32, rank=r, smooth=SMOOTH) for x, r in zip("qkv", (4, 8, 2), strict=True)],
        True,
    ),
    "a branch in one": (lambda: [layer("q", 32, rank=4), layer("k", 32)], True),
    "smoothings of their own": (lambda: [layer(x, 32, rank=4, smooth=torch.rand(128) + 0.5) for x in "qkv"], False),
    "tensor scales of their own": (
        lambda: [layer(x, 32, spec="nvfp4", act="nvfp4_dynamic", rank=4) for x in "qkv"],
        False,
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_layers_mean_their_parts(case):
    make, exact = FUSED[case]
    layers = make()
    (made,) = joined("x", layers)
    weight, bias = dequantized(made)
    wanted, offsets = weights(layers)
    assert made.layout.weight == layers[0].layout.weight and made.layout.act == layers[0].layout.act
    assert torch.allclose(bias, offsets)
    if exact:
        assert torch.equal(made.slots["codes"], torch.cat([part.slots["codes"] for part in layers]))
        assert torch.allclose(weight, wanted, atol=1e-6) and not made.note
    else:
        assert 0 < (weight - wanted).norm() / wanted.norm() < 0.15 and made.note


def test_what_cannot_be_fused_becomes_float():
    layers = [layer("q", 32), layer("k", 32, spec="int4_g32", act="int4_g64")]
    weight, bias = joined("x", layers)
    wanted, offsets = weights(layers)
    assert (weight.name, bias.name) == ("x.weight", "x.bias") and weight.note
    assert torch.equal(weight.tensor, wanted) and torch.equal(bias.tensor, offsets)
    with pytest.raises(ValueError, match="different widths"):
        joined("x", [layer("q", 32), layer("k", 32, k=64)])


def test_packed_and_float_parts_of_a_fused_layer(flux, tmp_path):
    """to_k was skipped: the whole becomes float, and nothing is lost."""
    folder, model, _ = flux
    convert(folder / "float", "rtn-int4", tmp_path / "a", skip=("*.attn.to_k",))
    export(tmp_path / "a", "float", tmp_path / "b.safetensors", keys="original")
    got, state = load_file(tmp_path / "b.safetensors"), dequantize(load(tmp_path / "a")).state_dict()
    for leaf in ("weight", "bias"):
        want = torch.cat([state[f"transformer_blocks.0.attn.to_{x}.{leaf}"] for x in "qkv"])
        assert torch.allclose(got[f"double_blocks.0.img_attn.qkv.{leaf}"], want, atol=1e-6)
    assert torch.equal(
        got["double_blocks.0.img_attn.qkv.weight"][64:128], model.state_dict()["transformer_blocks.0.attn.to_k.weight"]
    )
