"""`qgen eval` on everything that it scores: pipelines, a recipe, folders of pictures, clips, scenes and language models."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from qgen.eval.scores import Scores
from tests.cli.commands import refused, run

Image = pytest.importorskip("PIL.Image")


def scores_in(folder):
    return Scores.from_json((folder / "scores.json").read_text(encoding="utf-8"))


def folder_of(where, pictures):
    where.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray((picture * 255).round().to(torch.uint8).numpy()).save(where / f"{i}.png")
    return where


def test_a_recipe_on_the_demo_resumes_and_repeats_its_numbers(tmp_path):
    args = ["eval", "demo", "--recipe", "rtn-int4", "--n", 2, "--metrics", "psnr,ssim", "--steps", 1, "--out", tmp_path]
    run(*args)
    first = scores_in(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"scores.json", "before_after.png", "report.html", "samples"}
    drawn = sorted((tmp_path / "samples").rglob("*.png"))
    times = [p.stat().st_mtime_ns for p in drawn]
    run(*args)
    assert scores_in(tmp_path) == first and len(drawn) == 4
    assert [p.stat().st_mtime_ns for p in drawn] == times
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "qgen eval demo --recipe rtn-int4" in text and "held-out prompts, 2 of them" in text


def test_folders_of_pictures(tmp_path):
    a = torch.rand(4, 16, 16, 3)
    one, two = folder_of(tmp_path / "a", a), folder_of(tmp_path / "b", (a + 0.1 * torch.randn_like(a)).clamp(0, 1))
    assert re.search(r"PSNR.*\binf\b", run("eval", one, "--reference", one, "--metrics", "psnr,ssim").stdout)
    run("eval", two, "--reference", one, "--metrics", "psnr,ms_ssim", "--out", tmp_path / "out")
    assert 15 < scores_in(tmp_path / "out")["psnr"].value < 25


def test_clips_and_scenes(tmp_path):
    clip = torch.rand(3, 16, 16, 3)
    for name in ("a", "b"):
        folder_of(tmp_path / name / "clip", clip)
    assert "flicker" in run("eval", tmp_path / "a", "--reference", tmp_path / "b", "--video").stdout
    np.savez(tmp_path / "x.npz", depth=np.ones((2, 3, 3)), points=np.random.rand(5, 3))
    out = run("eval", tmp_path / "x.npz", "--reference", tmp_path / "x.npz", "--geometry").stdout
    assert "chamfer" in out and "abs-rel" in out


def test_a_language_model_and_a_recipe_for_it(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=300
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # sure enough of itself that four bits do not change every token
    model.save_pretrained(tmp_path / "llm")
    words = {word: i for i, word in enumerate(["[UNK]", "the", "fox", "dog", "jumps", "over"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "llm")
    text = tmp_path / "text.txt"
    text.write_text("the fox jumps over the dog\n\nthe dog jumps over the fox the fox\n", encoding="utf-8")
    run("eval", tmp_path / "llm", "--text", text, "--recipe", "rtn-int4", "--out", tmp_path / "out")
    found = scores_in(tmp_path / "out")
    assert {row.metric for row in found.rows} == {"perplexity", "agreement", "tokens_per_second", "kv_bytes"}
    assert found["perplexity"].difference != 0 and 0 <= found["agreement"].value <= 100
    assert found["kv_bytes"].value == 2 * 2 * 64 * 4
    run("eval", tmp_path / "llm", "--text", text, "--recipe", "gptq-w4a16", "--out", tmp_path / "fitted")
    assert "text.txt, 1 paragraphs, calibrated on 1 others" in (tmp_path / "fitted" / "report.html").read_text(
        encoding="utf-8"
    )
    run("quantize", tmp_path / "llm", "--recipe", "gptq-w4a16", "--prompts", text, "--out", tmp_path / "small")
    assert "SQNR on held-out calls" in run("inspect", tmp_path / "small").stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder with the demo pipeline at 4 bits, and the arguments that score it."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("several")
    run("quantize", "demo", "--recipe", "rtn-int4", "--out", folder / "model")
    return folder, [
        "eval",
        folder / "model",
        "--reference",
        "demo",
        "--n",
        5,
        "--batch-size",
        2,
        "--metrics",
        "psnr,ssim",
        "--steps",
        1,
    ]


WITNESS = """
import os, sys
if "RANK" in os.environ and "qgen" in sys.orig_argv:
    open(os.path.join(os.environ["WITNESS"], os.environ["RANK"]), "w").close()
"""


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(quantized, tmp_path):
    """Every process writes its rank down when it starts, so that one which does all the work is found out."""
    pytest.importorskip("accelerate")
    folder, args = quantized
    run(*args, "--out", folder / "one")
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        "WITNESS": str(tmp_path),
    }
    command = [
        sys.executable,
        "-m",
        "qgen",
        *map(str, args),
        "--out",
        str(folder / "two"),
        "--processes",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    assert done.stdout.count("PSNR") == 1, "one table, not one of every process"
    assert scores_in(folder / "two") == scores_in(folder / "one")
    wrong = [*command[:-4], "--processes", "2", "--metrics", "pnsr"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 2 and done.stderr.count("did you mean 'psnr'") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_ray_cluster_gives_the_numbers_of_one_process(quantized):
    pytest.importorskip("ray", reason="drawing on several machines needs the package ray")
    folder, args = quantized
    run(*args, "--out", folder / "alone")
    run(*args, "--out", folder / "ray", "--ray", "local", "--workers", 2)
    assert scores_in(folder / "ray") == scores_in(folder / "alone")


def test_bad_wishes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["demo"], "--reference MODEL is wanted"),
        (["demo", "--reference", "demo", "--metrics", "pnsr"], "did you mean 'psnr'"),
        (["demo", "--reference", "demo", "--prompts", "buildin"], "did you mean 'builtin'"),
        (["demo", "--reference", "demo", "--processes", "2"], "need --out"),
        (["demo", "--recipe", "rtn-int4", "--ray", "local", "--out", tmp_path / "o"], "quantize first"),
        (
            ["demo", "--reference", "demo", "--metrics", "fid", "--extractor", "fid=inception:/absent"],
            "--extractor fid=",
        ),
        ([tmp_path / "empty", "--reference", "demo"], "holds no pictures"),
        ([tmp_path / "empty", "--video"], "holds no clips"),
        (["x.npz", "--geometry"], "--geometry needs --reference"),
        (["x", "--video", "--geometry"], "exclude each other"),
        (["demo", "--text", tmp_path / "absent.txt"], "cannot be read"),
    ):
        assert message in refused("eval", *args)
