"""`qgen convert`, `qgen export` and `qgen inspect` of other projects' files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgen.io.peers.base import exporters, importers
from qgen.io.peers.source import open_source
from tests.cli.commands import refused, run


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of bfloat16 weights in no family's layout: two blocks of two layers, a norm, and a head outside."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "model.safetensors"
    tensors = {
        f"blocks.{i}.{x}.{leaf}": torch.randn(128, 128)[: (None if leaf == "weight" else 1)]
        for i in (0, 1)
        for x in "ab"
        for leaf in ("weight", "bias")
    }
    tensors = {name: (t[0] if name.endswith("bias") else t).bfloat16().contiguous() for name, t in tensors.items()}
    tensors |= {"norm.weight": torch.ones(128).bfloat16(), "head.weight": torch.randn(64, 128).bfloat16()}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def quantized(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "int4"
    run("convert", file, "--recipe", "rtn-int4", "--out", out)
    return out


def test_convert_shows_a_bar_and_writes_what_the_library_writes(file, tmp_path):
    from qgen.io.convert import convert

    result = run("convert", file, "--recipe", "rtn-nvfp4", "--out", tmp_path / "a", "--skip", "blocks.1.*")
    assert ("convert" in result.stderr and "MB" in result.stderr.upper()) or "KB" in result.stderr.upper()
    convert(file, "rtn-nvfp4", tmp_path / "b", skip=("blocks.1.*",))
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    names = load_file(a).keys()
    assert "blocks.0.a.codes" in names and {"blocks.1.a.weight", "head.weight"} <= names


@pytest.mark.parametrize("to", [name for name in sorted(exporters) if name not in ("nunchaku-lite", "nunchaku")])
def test_every_exporter_is_reached_and_its_file_inspected(to, quantized, tmp_path):
    """Of those that take any model. What is written is recognized by an importer, which names itself and the layers' formats."""
    if to == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out.safetensors")
    run("export", quantized, "--to", to, "--out", out, *(("--format", "nvfp4") if to == "comfy" else ()))
    if to == "float":
        line = refused("inspect", out)
        assert "no kind of quantized file" in line and all(name in line for name in importers)
        return
    text = run("inspect", out).stdout
    assert "blocks.0.a" in text.replace("\n", "") or "blocks" in text
    if to != "qgen":
        kept = [name for name in importers if f"{name}: " in text]
        assert len(kept) == 1 and "quantized layers and" in text
        assert "bits per quantized weight" in text


def test_a_format_is_handed_on(quantized, tmp_path):
    run("export", quantized, "--to", "comfy", "--format", "nvfp4", "--out", tmp_path / "x.safetensors")
    text = run("inspect", tmp_path / "x.safetensors").stdout
    assert "comfy: " in text and text.count("nvfp4 x") == 4 and "4.5" in text


def test_inspect_reads_no_codes(quantized, tmp_path, monkeypatch):
    run("export", quantized, "--to", "comfy", "--format", "nvfp4", "--out", tmp_path / "x.safetensors")
    from qgen.io.peers.source import SafetensorsSource
    from qgen.show import headers

    whole = SafetensorsSource.read
    monkeypatch.setattr(headers, "_SMALL", 1000)

    def beside(self, name):
        assert not name.endswith(".weight") or self.dtypes[name] != torch.uint8, f"{name} was read"
        return whole(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", beside)
    assert "nvfp4 x" in run("inspect", tmp_path / "x.safetensors").stdout


def test_inspect_of_a_bare_file_of_ours(quantized):
    text = run("inspect", quantized / "model.safetensors").stdout
    assert "qgen: qgen's own checkpoint" in text and "4 quantized layers and" in text


def test_convert_from_and_to_other_projects(quantized, tmp_path):
    """A quantized file of somebody else's in, rounded anew."""
    run("export", quantized, "--to", "comfy", "--format", "fp8", "--out", tmp_path / "x.safetensors")
    run(
        "convert",
        tmp_path / "x.safetensors",
        "--recipe",
        "rtn-nvfp4",
        "--to",
        "comfy",
        "--keys",
        "keep",
        "--out",
        tmp_path / "y.safetensors",
    )
    source = open_source(tmp_path / "y.safetensors")
    assert source.dtypes["blocks.0.a.weight"] == torch.uint8 and "blocks.0.a.comfy_quant" in source.shapes
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "y.safetensors"}


@pytest.mark.parametrize(
    "args, words",
    [
        (["export", "{quantized}", "--to", "comfi", "--out", "{new}"], "did you mean 'comfy'?"),
        (
            ["export", "{quantized}", "--to", "float", "--format", "x", "--out", "{new}"],
            "--format says nothing to --to float",
        ),
        (["export", "{file}", "--to", "float", "--out", "{new}"], "no kind of quantized file"),
        (["export", "{new}", "--to", "float", "--out", "{new}"], "no file or folder"),
        (["export", "{quantized}", "--to", "float", "--out", "{file}"], "is there already"),
        (["convert", "{file}", "--to", "comfi", "--out", "{new}"], "did you mean 'comfy'?"),
        (["convert", "{file}", "--recipe", "svdquant-int4", "--out", "{new}"], "fits recorded activations"),
        (["convert", "{file}", "--recipe", "none.json", "--out", "{new}"], "no recipe file"),
        (["convert", "{file}", "--keys", "theirs", "--out", "{new}"], "keys is one of"),
        (["convert", "{file}", "--config", "{new}", "--out", "{new}"], "no config"),
        (["convert", "{pickle}", "--out", "{new}"], "is a pickle"),
        (["inspect", "{pickle}"], "is a pickle"),
        (["inspect", "{file}"], "Importers: "),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value[:20],
)
def test_mistakes_get_one_line(args, words, file, quantized, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}.")
    named = {"file": file, "quantized": quantized, "new": tmp_path / "new", "pickle": tmp_path / "model.ckpt"}
    assert words in refused(*(arg.format(**named) for arg in args))
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_force_writes_over_a_file(quantized, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_text("old")
    run("export", quantized, "--to", "float", "--out", target, "--force")
    assert load_file(target)["blocks.0.a.weight"].shape == (128, 128)


def test_one_component_of_a_pipeline(make_demo_pipe, tmp_path):
    import qgen

    qgen.save(qgen.quantize(make_demo_pipe(), "rtn-int4", progress=False), tmp_path / "pipe")
    run("export", tmp_path / "pipe", "--to", "float", "--out", tmp_path / "floats")
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert config["_class_name"] == "PixArtTransformer2DModel" and "quantization_config" not in config
