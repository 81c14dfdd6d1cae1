"""ZOODiP's card: the estimator, the projection, a token for a quantized denoiser without any graph, the sampler of timesteps."""

import copy
import math

import torch
from torch import nn

import qgen
from qgen.recipe import Recipe, Spec
from qgen.train.zoodip import Subspace, draw_times, estimate, invert
from tests.train.test_zeroth import Peak


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


def test_many_probes_average_to_the_gradient():
    g = torch.Generator().manual_seed(0)
    m = torch.randn(32, 32, generator=g, dtype=torch.float64)
    v = torch.randn(32, generator=g, dtype=torch.float64, requires_grad=True)
    loss = lambda v: (m @ v).tanh().square().sum() + v.square().mean()  # noqa: E731
    loss(v).backward()
    assert cosine(estimate(loss, v.detach(), g, probes=2000, eps=1e-4), v.grad) >= 0.95


def test_a_true_subspace_makes_the_estimate_point_the_right_way():
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(96, 6, generator=g, dtype=torch.float64))[0]
    loss = lambda v: ((axes.T @ v) - 1).square().sum()  # noqa: E731
    subspace = Subspace(tau=64, nu=1e-6)
    for _ in range(64):
        subspace.push(axes @ torch.randn(6, generator=g, dtype=torch.float64))
    assert subspace.basis.shape == (96, 6)
    plain, better = [], []
    for _ in range(200):
        v = axes @ torch.randn(6, generator=g, dtype=torch.float64)
        true = 2 * axes @ (axes.T @ v - 1)
        found = estimate(loss, v, g)
        kept = subspace.project(found)
        assert float((kept - axes @ (axes.T @ kept)).abs().max()) < 1e-6
        plain.append(cosine(found, true))
        better.append(cosine(kept, true))
    assert sum(better) >= 2.5 * sum(plain), (sum(better) / 200, sum(plain) / 200)


class Told(nn.Module):
    """A denoiser that reads one text embedding."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.out = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, text):
        return self.out(torch.nn.functional.gelu(self.image(x) + self.text(text)))


def test_a_token_is_learned_by_a_packed_model_in_the_memory_of_inference():
    torch.manual_seed(0)
    teacher = Told().eval().requires_grad_(False)
    calls = [(torch.randn(4, 32), torch.randn(1, 32)) for _ in range(8)]
    module = qgen.quantize(copy.deepcopy(teacher), Recipe(Spec("int8_row")), calibration=calls, progress=False)
    codes = {p: m.canonical()["codes"].clone() for p, m in module.named_modules() if hasattr(m, "canonical")}
    x, wanted = torch.randn(16, 4, 32), 2 * torch.randn(32)
    with torch.no_grad():
        targets = [teacher(rows, wanted[None]) for rows in x]
    graphs = []

    def loss(v, step):
        y = module(x[step % 16], v[None])
        graphs.append(y.requires_grad)
        return (y - targets[step % 16]).square().mean()

    def whole(v):
        return sum(float(loss(v, step)) for step in range(16))

    start = torch.randn(32)
    v = invert(loss, start, steps=2000, subspace=Subspace(tau=128), keep_length=False)
    assert whole(v) <= 0.7 * whole(start), (whole(v), whole(start))
    assert not any(graphs) and not v.requires_grad
    assert all(torch.equal(codes[p], m.canonical()["codes"]) for p, m in module.named_modules() if p in codes)
    with torch.no_grad():
        with Peak() as inference:
            module(x[0], start[None])
        with Peak() as learning:
            invert(loss, start, steps=3, subspace=Subspace(tau=128))
    small = 64 * start.nbytes  # the vector, its probes, Adam's two moments, the last values
    assert learning.most <= 1.05 * inference.most + small, (learning.most, inference.most)


def test_the_length_is_kept_and_nan_is_an_error():
    start = torch.randn(16)
    v = invert(lambda v, step: v.sum(), start, steps=20)
    assert math.isclose(float(v.norm()), float(start.norm()), rel_tol=1e-5) and not torch.equal(v, start)
    try:
        invert(lambda v, step: float("nan"), start, steps=2)
    except FloatingPointError as error:
        assert "step 0" in str(error)
    else:
        raise AssertionError("NaN went through")


def test_times_are_uniform_in_the_part_where_text_matters():
    t = draw_times(20000, torch.Generator().manual_seed(0))
    assert float(t.min()) >= 500 and float(t.max()) < 900
    counts = torch.histc(t, 20, 500, 900)
    chi = float(((counts - 1000).square() / 1000).sum())
    assert chi < 43.8, chi  # 19 degrees of freedom, p > 0.001
