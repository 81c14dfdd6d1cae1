"""The demo pipeline answers a plain call, before and after diffusers saved and loaded it; its prompts are honestly
split."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from qgen import assets, demo
from qgen.errors import QgenError

pytest.importorskip("diffusers")
PROMPT = "noto owl"


@pytest.fixture(scope="module")
def pipe():
    pipe = demo.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe(PROMPT, generator=generator, output_type="np", **options).images[0])


@pytest.fixture(scope="module")
def owl(pipe):
    return draw(pipe)


def test_plain_call_gives_a_picture(pipe):
    picture = pipe(PROMPT).images[0]
    assert picture.size == (64, 64)
    assert np.asarray(picture).std() > 20


def test_plain_call_equals_the_base_class_with_every_option_spelled_out(pipe, owl):
    from diffusers import PixArtSigmaPipeline

    base = PixArtSigmaPipeline(**pipe.components)
    base.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
    expected = draw(base, num_inference_steps=20, guidance_scale=3.0, height=64, width=64, **options)
    assert np.array_equal(owl, expected)


@pytest.mark.parametrize("options", [{"num_inference_steps": 3}, {"guidance_scale": 1.0}], ids=["steps", "guidance"])
def test_caller_wins(pipe, owl, options):
    assert not np.array_equal(draw(pipe, **options), owl)


def test_positional_arguments_win(pipe):
    seen = []
    pipe(PROMPT, "", 4, generator=torch.Generator().manual_seed(3), callback=lambda step, t, x: seen.append(step))
    assert len(seen) == 4


def test_caller_may_ask_another_size(pipe):
    assert draw(pipe, height=32, width=96, num_inference_steps=2).shape == (32, 96, 3)


def test_it_draws_an_owl(owl):
    """The Noto owl is a brown bird on white: corners white, middle coloured, brown overall (red > green > blue)."""
    assert owl[:6, :6].mean() > 0.9
    red, green, blue = owl[20:50, 16:48].reshape(-1, 3).mean(0)
    assert red > green > blue
    assert red - blue > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_close_to_32_bit(owl, dtype):
    pipe = demo.demo_pipeline(dtype)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype
    pipe.set_progress_bar_config(disable=True)
    psnr = -10 * np.log10(((draw(pipe) - owl) ** 2).mean())
    assert psnr > 28


def test_saved_pipeline_comes_back_through_diffusers(pipe, owl, tmp_path):
    from diffusers import DiffusionPipeline

    pipe.save_pretrained(tmp_path)
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), type(pipe).from_pretrained(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert np.array_equal(draw(loaded), owl)


@pytest.mark.parametrize("first", ["diffusers", "qgen.demo"])
def test_a_new_process_finds_the_class_in_either_order_of_imports(first):
    second = {"diffusers": "qgen.demo", "qgen.demo": "diffusers"}[first]
    code = f"""
import sys, {first}
if "{first}" == "qgen.demo":
    assert "diffusers" not in sys.modules and "transformers" not in sys.modules
    qgen.demo.register()
import {second}
if "{second}" == "qgen.demo":
    qgen.demo.register()
before = set(sys.modules)
assert "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma" not in sys.modules
qgen.demo.register()
assert diffusers.EmojiPixArtPipeline.__module__ == "qgen.emoji_pipeline"
assert diffusers.DiffusionPipeline.__module__.startswith("diffusers")
try:
    diffusers.NoSuchThing
except AttributeError:
    pass
else:
    raise SystemExit("an unknown name was found")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_prompts_are_split_by_concept():
    calibration, held_out = demo.demo_prompts("calibration"), demo.demo_prompts("held_out")
    assert len(calibration) >= 256
    assert len(held_out) >= 128
    assert len(set(calibration)) == len(calibration)

    def name(prompt):
        style, name = prompt.split(" ", 1)
        assert style in ("noto", "flat")
        return name

    assert not {name(p) for p in calibration} & {name(p) for p in held_out}
    assert len({name(p) for p in calibration + held_out}) == 462


def test_prompts_do_not_depend_on_the_process():
    code = "from qgen.demo import demo_prompts; print(demo_prompts('held_out')[:5])"
    lines = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert lines == {f"{demo.demo_prompts('held_out')[:5]}\n"}


def test_unknown_split_and_dtype_are_refused():
    with pytest.raises(ValueError, match="calibration, held_out"):
        demo.demo_prompts("test")
    with pytest.raises(ValueError, match=r"floating torch\.dtype"):
        demo.demo_pipeline(torch.int8)


def test_assets_are_found_beside_the_checkout_and_inside_a_wheel(monkeypatch, tmp_path):
    package = tmp_path / "site" / "qgen"
    monkeypatch.setattr(assets, "__file__", str(package / "assets.py"))
    with pytest.raises(QgenError, match="demo assets wanted"):
        demo.assets_dir()
    for place in (package / "_assets", tmp_path / "site" / "demos" / "assets"):
        (place / "emoji-pixart").mkdir(parents=True)
        (place / "emoji-pixart" / "model_index.json").write_text("{}")
        assert demo.assets_dir() == place
