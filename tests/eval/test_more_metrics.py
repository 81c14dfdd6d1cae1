"""IS, MS-SSIM, DISTS-like and CLIP-IQA against other people's code or numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from qgen.eval.clip_iqa import clip_iqa
from qgen.eval.dists import structure_texture_distance
from qgen.eval.evaluate import evaluate
from qgen.eval.inception_score import inception_score
from qgen.eval.ms_ssim import WEIGHTS, ms_ssim, scales_that_fit


def test_inception_score_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(60, 10)
    want = fidelity.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits).mean == pytest.approx(want, rel=1e-9)


def test_inception_score_by_hand_and_its_bounds():
    """Half the pictures surely of class 0, half of class 1: exp(log 2) = 2. All alike: 1."""
    sure = 60 * torch.eye(2).repeat(5, 1)
    assert inception_score(sure).mean == pytest.approx(2, rel=1e-9)
    assert inception_score(torch.zeros(4, 3)).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="n >= 2"):
        inception_score(torch.zeros(1, 3))


def test_inception_scores_interval_is_the_jackknife():
    logits = 2 * torch.randn(12, 5)
    drop = [inception_score(torch.cat([logits[:i], logits[i + 1 :]])).mean for i in range(12)]
    found = inception_score(logits)
    assert found.high - found.mean == pytest.approx(1.96 * (11 * np.var(drop)) ** 0.5, rel=1e-6)


def test_ms_ssim_is_a_direct_computation(photos, noisy):
    """Every term from scikit-image's filters, at the three scales that 64 pixels allow."""
    filters = pytest.importorskip("scipy.ndimage")
    x, y = photos[0].double().numpy(), noisy(0.1)[0].double().numpy()
    weights = np.array(WEIGHTS[:3]) / sum(WEIGHTS[:3])
    want = 1.0
    for j, weight in enumerate(weights):

        def blur(z):
            return filters.gaussian_filter(z, (1.5, 1.5, 0), truncate=5 / 1.5)[5:-5, 5:-5]

        mx, my = blur(x), blur(y)
        contrast = (2 * (blur(x * y) - mx * my) + 0.03**2) / (blur(x * x) - mx**2 + blur(y * y) - my**2 + 0.03**2)
        light = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        want *= (contrast * light if j == 2 else contrast).mean() ** weight
        x, y = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2, 3).mean((1, 3)) for z in (x, y))
    assert float(ms_ssim(noisy(0.1)[:1], photos[:1])) == pytest.approx(want, rel=1e-5)


def test_ms_ssim_with_five_scales_is_torchmetrics():
    measure = pytest.importorskip("torchmetrics.functional.image").multiscale_structural_similarity_index_measure
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24), (192, 192), mode="bicubic").clamp(0, 1)
    y = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    found = float(ms_ssim(y.movedim(1, -1), x.movedim(1, -1)))
    # torchmetrics mirrors borders where we, as the paper, use positions inside the picture.
    assert found == pytest.approx(float(measure(y, x, data_range=1.0)), abs=5e-3)


def test_ms_ssim_takes_the_scales_that_fit():
    assert [scales_that_fit(s, 999) for s in (10, 11, 22, 64, 175, 176)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="at least 11"):
        ms_ssim(torch.rand(1, 10, 20, 3), torch.rand(1, 10, 20, 3))


def test_structure_and_texture_by_hand():
    """One channel: x = (0, 2), y = (0, 4). Means 1, 2; variances 1, 4; covariance 2."""
    x, y = (torch.tensor(v).reshape(1, 1, 1, 2) for v in ([0.0, 2.0], [0.0, 4.0]))
    texture, structure = 2 * 1 * 2 / (1 + 4), 2 * 2 / (1 + 4)
    assert float(structure_texture_distance([x], [y])) == pytest.approx(1 - (texture + structure) / 2, abs=1e-5)
    assert float(structure_texture_distance([x, y], [x, y])) == pytest.approx(0, abs=1e-7)


class Towers:
    """CLIP by hand: pictures point along their mean colour, "Good photo." along red and "Bad photo." along green."""

    name, digest, labels = "towers", "0", {"clip_iqa": "CLIP-IQA"}

    def embed_images(self, pictures):
        return pictures.mean((1, 2))

    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0, 0] if "Good" in t else [0, 1.0, 0] for t in texts])


def test_clip_iqa_by_hand():
    pictures = torch.zeros(2, 4, 4, 3)
    pictures[0, ..., 0] = 1
    pictures[1] = torch.tensor([0.6, 0.58, 0.0])
    norm = math.hypot(0.6, 0.58)
    want = [1.0, 1 / (1 + math.exp(100 * (0.58 - 0.6) / norm))]
    assert clip_iqa(pictures, Towers()).tolist() == pytest.approx(want, rel=1e-5)
    scores = evaluate(pictures, pictures.flip(0), metrics=("clip_iqa",), extractor={"clip_iqa": Towers()})
    assert scores["clip_iqa"].reference == pytest.approx(sum(want) / 2, rel=1e-5)
    assert scores["clip_iqa"].difference == pytest.approx(0, abs=1e-7)
