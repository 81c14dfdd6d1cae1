"""What users pass by mistake: one readable line each, and nothing is changed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qgen
from qgen import Recipe, Rule, Spec
from qgen.errors import BadCheckpoint, BadData, NotQuantizable
from qgen.methods.gptq import GPTQ
from tests import tiny

FITTED = Recipe(Spec("int4_g64", None, (GPTQ(),)))


def refused(kind, words, x, *args, **options):
    """Asserts that `quantize` raises `kind` with `words` in one line and leaves the denoiser bit for bit."""
    modules = [m for m in (x, *vars(x).values()) if isinstance(m, nn.Module)] if hasattr(x, "__dict__") else []
    before = [(m, tiny.snapshot(m), [id(c) for c in m.modules()]) for m in modules]
    with pytest.raises(kind, match=words) as error:
        qgen.quantize(x, *args, progress=False, **options)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 700
    for module, state, children in before:
        assert tiny.same(module, state) and [id(c) for c in module.modules()] == children
        assert not hasattr(module, "qgen_recipe") and not hasattr(module, "qgen_report")


# -- the model ---------------------------------------------------------------------------------------------------------
def test_things_that_hold_no_denoiser():
    for thing in (None, "black-forest-labs/FLUX.1-dev", 7, object()):
        refused(NotQuantizable, "has no denoiser to quantize: looked for transformer, unet", thing, "rtn-int4")


def test_a_pipeline_without_denoiser_lists_its_parts():
    upscaler = SimpleNamespace(components={"vae": None, "scheduler": None})
    refused(NotQuantizable, "its components are scheduler, vae", upscaler, "rtn-int4")


def test_a_module_without_layers():
    refused(
        NotQuantizable, r"has no nn\.Linear or convolution layer", nn.Sequential(nn.GELU(), nn.LayerNorm(8)), "rtn-int4"
    )
    refused(NotQuantizable, r"has no nn\.Linear or convolution layer", nn.GELU(), "rtn-int4")


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(32, 32, 3)], ids=["linear", "conv"])
def test_a_lone_layer(layer):
    refused(NotQuantizable, r"a lone (Linear|Conv2d) cannot be replaced in place: .*nn\.Sequential", layer, "rtn-int4")


def test_nothing_left_to_do():
    refused(NotQuantizable, "keeps all 2 layers of Sequential float", tiny.plain(), Recipe(None))
    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    refused(NotQuantizable, "recipe 'rtn-int4' keeps all 2 layers", small, "rtn-int4")


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(BadData, match=r"parameter 0\.weight has no data \(meta device\); load the weights first"):
        qgen.quantize(model, "rtn-int4", progress=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_another_library_packed(dtype):
    model = tiny.plain()
    model[0].weight = nn.Parameter(torch.zeros(96, 64).to(dtype), requires_grad=False)
    with pytest.raises(NotQuantizable, match=f"layer 0 holds {dtype}, packed by another library"):
        qgen.quantize(model, "rtn-int4", progress=False)


# -- the recipe --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "recipe, words",
    [
        ("svdquant-in4", r"unknown recipe 'svdquant-in4' \(did you mean 'svdquant-int4'\?\)"),
        ("", "unknown recipe ''"),
        (None, "unknown recipe 'None'"),
        ("missing.json", "no recipe file missing.json"),
    ],
)
def test_unknown_recipes(recipe, words):
    refused(ValueError, words, tiny.plain(), recipe)


def test_a_recipe_file_that_is_none(tmp_path):
    (tmp_path / "r.json").write_text('{"default": {"weight": "int4_g46"}}')
    refused(
        ValueError, r"unknown number format 'int4_g46' \(did you mean 'int4_g64'\?\)", tiny.plain(), tmp_path / "r.json"
    )
    (tmp_path / "r.json").write_text("weights: int4")
    refused(ValueError, "a recipe is JSON, and this is not", tiny.plain(), tmp_path / "r.json")


def test_a_recipe_from_a_file_works(tmp_path):
    (tmp_path / "r.json").write_text(Recipe(Spec("int8_row"), (Rule("2", None, why="by file"),)).to_json())
    model = qgen.quantize(tiny.plain(), str(tmp_path / "r.json"), progress=False)
    assert [row["spec"] for row in model.qgen_report] == ["int8_row x float", "float"]


# -- calibration -------------------------------------------------------------------------------------------------------
def test_a_bare_module_without_calls():
    refused(
        ValueError,
        r"recipe 'custom' calibrates: pass calibration=\[\.\.\.\] with recorded calls of Net, or use a recipe",
        tiny.net(),
        FITTED,
    )


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompts(prompts):
    refused(ValueError, "calibration needs at least one prompt, found none", tiny.Pipe(), FITTED, prompts=prompts)


def test_no_calls():
    refused(BadData, "calibration holds no calls", tiny.net(), FITTED, calibration=[])


def test_calls_of_the_wrong_kind():
    refused(ValueError, "a calibration call is a tensor, a tuple, a dict", tiny.net(), FITTED, calibration=["a cat"])


def test_a_calibrator_for_a_bare_module():
    from qgen.calibration.recorder import Recorder

    refused(ValueError, "is no pipeline and cannot be driven by prompts", tiny.net(), FITTED, calibration=Recorder())


def test_calls_that_the_module_does_not_take():
    model = tiny.net()
    refused(RuntimeError, "mat1 and mat2", model, FITTED, calibration=[torch.randn(2, 8, 5)])
    refused(TypeError, "unexpected keyword argument 'colour'", model, FITTED, calibration=[{"colour": torch.ones(1)}])


def test_calls_for_another_denoiser():
    refused(ValueError, "calibration never called the denoiser 'transformer'", tiny.Pipe(), FITTED, calibration={})


# -- the other arguments -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [0, -1, "0GiB", "lots", "-2GiB", "2 parsecs", "", True])
def test_memory(memory):
    refused(
        ValueError,
        "memory is a positive number of bytes or text such as '2GiB', found",
        tiny.plain(),
        "rtn-int4",
        memory=memory,
    )


@pytest.mark.parametrize(
    "text, value",
    [(4096, 4096), ("2GiB", 2 << 30), ("800 MB", 800_000_000), ("1.5k", 1500), ("512mib", 512 << 20), (1e6, 10**6)],
)
def test_memory_that_is_understood(text, value):
    from qgen.checks import parse_bytes

    assert parse_bytes(text) == value


@pytest.mark.parametrize("attention", ["int4", "sage"])
def test_attention_that_is_not_known(attention):
    refused(ValueError, f"attention {attention!r}", tiny.plain(), "rtn-int4", attention=attention)


@pytest.mark.parametrize("options", [{"budget": "int4"}, {"budget": 4.5}, {"quality": "good"}])
def test_budgets_and_qualities_that_say_nothing(options):
    words = "a budget is text such as '4.5 bits'" if "budget" in options else "a quality is text such as 'psnr>=30'"
    refused(ValueError, words, tiny.plain(), "rtn-int4", **options)


def test_a_checkpoint_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(
        BadCheckpoint,
        "a checkpoint is a folder in which progress is kept",
        tiny.plain(),
        "rtn-int4",
        checkpoint=tmp_path / "file",
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "differs in: seed"),
        ({"recipe": "rtn-nvfp4"}, "differs in: recipe"),
        ({"calibration": [torch.randn(2, 24, 64)]}, "differs in: calibration"),
    ],
    ids=["seed", "recipe", "calibration"],
)
def test_a_checkpoint_of_another_job(tmp_path, change, words):
    options = {"recipe": "rtn-int4", "calibration": [torch.ones(2, 24, 64)], "checkpoint": tmp_path, "progress": False}
    original = tiny.plain()
    qgen.quantize(copy.deepcopy(original), **options)
    with pytest.raises(BadCheckpoint, match=f"holds the progress of another job \\({words}\\); choose another folder"):
        qgen.quantize(original, **{**options, **change})
    other = tiny.plain()
    other[0].bias += 1
    with pytest.raises(BadCheckpoint, match="differs in: model"):
        qgen.quantize(other, **options)


def test_a_checkpoint_cut_for_another_memory_budget(tmp_path):
    """Files are numbered by wave: read for other waves, they would leave layers out or quantize them twice."""
    options = {"recipe": FITTED, "calibration": tiny.net_calls(2, 1), "checkpoint": tmp_path, "progress": False}
    qgen.quantize(tiny.net(), **options)
    with pytest.raises(BadCheckpoint, match=r"differs in: waves \(memory\)"):
        qgen.quantize(tiny.net(), **options, memory=1)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe not json"], ids=["empty", "other", "binary"])
def test_a_broken_journal(tmp_path, content):
    (tmp_path / "journal-module.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"journal|another job"):
        qgen.quantize(tiny.plain(), "rtn-int4", checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("broken", ["cut", "emptied", "other"])
def test_a_broken_wave_names_its_file(tmp_path, broken):
    qgen.quantize(tiny.plain(), "rtn-int4", checkpoint=tmp_path, progress=False)
    (wave,) = tmp_path.glob("wave-*")
    data = wave.read_bytes()
    wave.write_bytes(
        {"cut": data[: len(data) // 2], "emptied": b"", "other": data.replace(b"fingerprint", b"fingerpaint", 1)}[
            broken
        ]
    )
    model = tiny.plain()
    before = tiny.snapshot(model)
    with pytest.raises(
        BadCheckpoint,
        match=r"wave-module-0000\.safetensors: cannot go on from this file .* delete it to redo its layers",
    ):
        qgen.quantize(model, "rtn-int4", checkpoint=tmp_path, progress=False)
    assert tiny.same(model, before)
    wave.unlink()
    qgen.quantize(model, "rtn-int4", checkpoint=tmp_path, progress=False)
