"""The commands on the demo pipeline at its smallest settings, and on what users get wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.commands import refused, run

pytest.importorskip("diffusers")

from qgen import recipes
from qgen.cli import app
from qgen.eval.scores import Scores
from qgen.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "2", "--samples", "4", "--keep", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The demo pipeline, quantized without calibration by the command; and what that printed."""
    out = tmp_path_factory.mktemp("cli") / "demo-int4"
    result = run("quantize", "demo", "--recipe", "rtn-int4", "--out", out, "--skip", "*.attn2.*")
    return out, result


def test_quantize_saves_a_pipeline_that_draws_what_the_library_draws(saved, demo_pipe):
    from qgen.engine import quantize
    from qgen.io.checkpoint import load

    quantize(demo_pipe, recipes.get("rtn-int4").skip("*.attn2.*"), progress=False)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    want = demo_pipe("noto owl", generator=torch.Generator().manual_seed(1), **call).images
    got = load(saved[0])("noto owl", generator=torch.Generator().manual_seed(1), **call).images
    assert torch.equal(got, want)


def test_quantize_prints_the_summary_and_writes_the_report(saved):
    out, result = saved
    assert "layers quantized" in result.stdout and "skipped by the user" in " ".join(result.stdout.split())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "qgen quantize demo --recipe rtn-int4" in page and "skipped by the user" in page


def test_inspect_agrees_with_the_loaded_model(saved):
    from qgen.io.checkpoint import load
    from qgen.show.headers import read
    from qgen.show.rows import gather

    shown, loaded = read(saved[0]), gather(load(saved[0]))
    assert shown.totals == loaded.totals
    strip = [[{**row, "kernel": ""} for row in rows] for rows in (shown, loaded)]
    assert strip[0] == strip[1]
    assert f"{loaded.totals['quantized']} of {loaded.totals['layers']} layers" in run("inspect", saved[0]).stdout


def test_inspect_reads_no_weights(saved, monkeypatch):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: pytest.fail("a weight was read"))
    run("inspect", saved[0])


def test_eval_scores_and_writes(saved, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("noto owl\n\n flat penguin \nnoto fox\n", encoding="utf-8")
    out = tmp_path / "scores"
    args = ["--reference", "demo", "--prompts", prompts, "--n", 2, "--metrics", "psnr,ssim", "--steps", 2, "--out", out]
    result = run("eval", saved[0], *args)
    scores = Scores.from_json((out / "scores.json").read_text(encoding="utf-8"))
    assert scores.prompts == ("noto owl", "flat penguin")
    assert 10 < scores["psnr"].value < 60
    assert f"{scores['psnr'].value:.4g}" in result.stdout
    assert {path.name for path in out.iterdir()} == {"scores.json", "before_after.png", "report.html", "samples"}


def test_eval_of_a_model_against_itself_is_perfect(tmp_path):
    result = run("eval", "demo", "--reference", "demo", "--n", 1, "--metrics", "psnr", "--steps", 1, "--out", tmp_path)
    assert re.search(r"PSNR.*\binf\b", result.stdout)
    assert (tmp_path / "report.html").is_file()


def test_demo_draws_compares_and_writes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--recipe", "rtn-int4", "--recipe", "w8a8", "--prompts", 3, *SMALL)
    data = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in data["runs"]] == ["16-bit", "rtn-int4", "w8a8"]
    psnr = [Scores.from_json(json.dumps(entry["scores"]))["psnr"].value for entry in data["runs"][1:]]
    assert 5 < psnr[0] < psnr[1]  # 8 bits stay closer than 4
    sizes = [entry["nbytes"] for entry in data["runs"]]
    assert sizes[1] < sizes[2] < sizes[0]
    assert all(entry["output_sqnr_db"] > 0 for entry in data["runs"][1:])
    for value in psnr:
        assert f"{value:.4g}" in result.stdout
    picture = image.open(out / "before_after.png")
    assert picture.size[0] > 3 * 192 and picture.size[1] > 5 * 192
    assert {"report.html", "report-rtn-int4.html"} <= {path.name for path in out.iterdir()}


def test_recipes_are_listed_and_printed_as_json():
    listed = run("recipes").stdout
    assert all(name in listed for name in recipes.names())
    assert Recipe.from_json(run("recipes", "svdquant-int4").stdout) == recipes.get("svdquant-int4")


def test_a_recipe_file_works(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(recipes.get("rtn-int4").skip("*").to_json(), encoding="utf-8")
    assert "keeps all" in refused("quantize", "demo", "--recipe", path, "--out", tmp_path / "out")


def test_doctor_names_this_machines_kernels():
    assert "cpu" in run("doctor", "--device", "cpu").stdout


def test_version_and_help():
    assert re.match(r"qgen \S+\n", run("--version").stdout)
    for command in ("demo", "quantize", "convert", "export", "eval", "inspect", "recipes", "doctor"):
        text = run(command, "--help").stdout
        assert "--help" in text


def test_every_option_has_help():
    import typer

    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize(
    "args, words",
    [
        (["quantize", "demo", "--recipe", "svdquant-int", "--out", "{new}"], "did you mean 'svdquant-int4'?"),
        (["quantize", "demo", "--recipe", "no.json", "--out", "{new}"], "no recipe file no.json"),
        (["quantize", "demo", "--out", "{full}"], "is not empty"),
        (["quantize", "demo", "--out", "{full}/file"], "is a file"),
        (["quantize", "{new}", "--recipe", "rtn-int4", "--out", "{new}"], "no folder"),
        (["quantize", "{full}", "--recipe", "rtn-int4", "--out", "{new}"], "neither model_index.json"),
        (["quantize", "nobody/nothing", "--recipe", "rtn-int4", "--out", "{new}"], "hub did not give it"),
        (["quantize", "demo", "--memory", "lots", "--out", "{new}"], "memory is a positive number"),
        (["quantize", "demo", "--dtype", "floaty", "--out", "{new}"], "unknown --dtype"),
        (["quantize", "demo", "--device", "abacus", "--out", "{new}"], "--device is"),
        (["quantize", "demo", "--prompts", "{full}/empty", "--out", "{new}"], "holds no prompt"),
        (["quantize", "demo", "--prompts", "{new}", "--out", "{new}"], "No such file"),
        (["eval", "demo", "--reference", "demo", "--metrics", "pnsr"], "did you mean 'psnr'?"),
        (["inspect", "{new}"], "no file or folder"),
        (["inspect", "{full}"], "holds no .safetensors file"),
        (["recipes", "w4a17"], "did you mean 'w4a16'?"),
        (["demo", "--recipe", "rtn", "--out", "{new}"], "unknown recipe 'rtn'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_mistakes_get_one_line(args, words, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    (full / "empty").write_text("\n \n")
    line = refused(*(arg.format(new=tmp_path / "new", full=full) for arg in args))
    assert words in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["", "transformer", "text_encoder"])
def test_folders_of_any_kind_are_quantized_and_read_back(part, tmp_path):
    """A pipeline, a diffusers model and a transformers model, in the files' own float16."""
    from qgen.demo import assets_dir
    from qgen.io.checkpoint import load
    from qgen.nn.packed import Packed

    run("quantize", assets_dir() / "emoji-pixart" / part, "--recipe", "rtn-int4", "--out", tmp_path / "out")
    model = load(tmp_path / "out")
    modules = (model if part else model.transformer).named_modules()
    dtypes = {path: layer.compute_dtype for path, layer in modules if isinstance(layer, Packed)}
    exempt = (
        "wo" if part == "text_encoder" else None
    )  # transformers keeps this layer of T5 in float32, whatever one asks for
    assert len(dtypes) > 5
    assert all(dtype == torch.float16 for path, dtype in dtypes.items() if path.split(".")[-1] != exempt)


def test_an_interrupted_calibration_is_taken_up(tmp_path):
    """A second run reads the finished waves: it ends with the same files as an undisturbed one."""
    args = ["quantize", "demo", "--recipe", "w8a8", "--steps", 1, "--samples", 2, "--keep", 1, "--memory", "1KiB"]
    run(*args, "--out", tmp_path / "a", "--checkpoint", tmp_path / "ck")
    waves = sorted((tmp_path / "ck").glob("wave-*"))
    assert len(waves) > 2
    waves[-1].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in waves[:-1]}
    run(*args, "--out", tmp_path / "b", "--checkpoint", tmp_path / "ck")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and waves[-1].exists()
    files = [tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_quantizing_twice_is_refused(saved, tmp_path):
    assert "quantized already" in refused("quantize", saved[0], "--recipe", "rtn-int4", "--out", tmp_path / "again")


def test_force_writes_into_a_full_folder(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    run("quantize", "demo", "--recipe", "rtn-int4", "--out", tmp_path, "--force")
    assert (tmp_path / "keep.txt").read_text() == "mine" and (tmp_path / "model_index.json").exists()


def test_debug_shows_the_error_itself():
    for args in (["--debug", "recipes", "w4a17"], ["recipes", "w4a17", "--debug"]):
        result = CliRunner().invoke(app, args)
        assert isinstance(result.exception, ValueError) and result.exit_code == 1


def test_bugs_are_not_hidden(monkeypatch):
    monkeypatch.setattr(recipes, "get", lambda *_: {}["bug"])
    assert isinstance(CliRunner().invoke(app, ["recipes", "auto"]).exception, KeyError)


@pytest.mark.parametrize(
    "given, words", [([], "with --checkpoint DIR"), (["--checkpoint", "{tmp}/ck"], "goes on from")]
)
def test_ctrl_c_says_how_to_go_on(given, words, tmp_path, monkeypatch):
    from qgen import engine

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "quantize", stop)
    args = [arg.format(tmp=tmp_path) for arg in given]
    result = run("quantize", "demo", "--recipe", "rtn-int4", "--out", tmp_path / "out", *args, code=130)
    assert words in result.stderr and not (tmp_path / "out").exists()


def test_the_module_runs_as_a_program():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qgen", "recipes", "w4a17"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown recipe 'w4a17' (did you mean 'w4a16'?)")


def test_a_budget_by_command(tmp_path):
    """Read before any model is loaded; what it asks for is in the report."""
    assert "a budget is text such as '4.5 bits'" in refused(
        "quantize", "demo", "--recipe", "rtn-int4", "--out", tmp_path / "a", "--budget", "lots"
    )
    assert "a quality is text such as" in refused("quantize", "demo", "--out", tmp_path / "a", "--quality", "good")
