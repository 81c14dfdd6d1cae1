"""Every method lowers the objective that it states, leaves the float function alone where it should, and overfits nobody."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from qgen import formats
from qgen.errors import BadData
from qgen.methods import Stats, methods, refine
from qgen.methods.awq import AWQ
from qgen.methods.base import best, sqnr_db
from qgen.methods.bias import BiasCorrection
from qgen.methods.clip import Clip
from qgen.methods.gptq import GPTQ, gptq, hessian
from qgen.methods.lowrank import LowRank, low_rank
from qgen.methods.reconstruct import Reconstruct
from qgen.methods.shift import Shift
from qgen.methods.smooth import Smooth
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K = 96, 128


def rows(m, seed, outliers=True, k=K):
    """Correlated rows; eight channels are thirty times larger, as in the residual stream of transformers."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(99)) * 0.15 + torch.eye(k)
    x = torch.randn(m, k, generator=g) @ mix
    if outliers:
        x[:, ::16] *= 30
    return x


def stats(fit=None, held=None, seed=0):
    fit = rows(1024, 1) if fit is None else fit
    held = rows(256, 2) if held is None else held
    return Stats(fit, held, fit.T @ fit / len(fit), fit.abs().amax(0), fit.abs().mean(0), seed)


def draft(weight="int4_g64", act="int4_g64", methods=(), bias=False, k=K, after="", seed=5):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, k, generator=g) / k**0.5
    site = Site("layer", "linear", "", 0, "x", (N, k), after=after)
    return Draft((site,), Spec(weight, act, tuple(methods)), w, torch.randn(N, generator=g) if bias else None)


def function(d, x):
    """The draft's output in float64 before any rounding: what smoothing, rotation, shift and branch may not change."""
    y = d.inputs(x, quantized=False).double() @ d.target().double().T
    if d.up is not None:
        y = y + x.double() @ d.down.double().T @ d.up.double().T
    if d.shift is not None:
        ones = torch.zeros(1, d.weight.shape[1])
        y = y - d.inputs(ones, quantized=False).double() @ d.target().double().T
    return y


def drift(d, x):
    want = x.double() @ d.weight.double().T
    return float((function(d, x) - want).norm() / want.norm())


# -- smooth and awq ----------------------------------------------------------------------------------------------------
def test_smoothing_lowers_the_output_error_with_outlier_channels():
    d, s = draft(), stats()
    smoothed = Smooth().refine(d, s)
    assert smoothed.smooth is not None and smoothed.error(s.held) < 0.6 * d.error(s.held)
    assert smoothed.error(rows(256, 3)) < 0.6 * d.error(rows(256, 3)), "on rows that nobody has seen"


def test_smoothing_keeps_none_where_none_is_best():
    """With one channel alone alive every factor is 1 up to scale: nothing can be gained."""
    x = torch.zeros(64, K)
    x[:, 3] = torch.randn(64)
    d = draft(act=None)
    chosen = Smooth().refine(d, stats(x, x))
    assert chosen.error(x) <= d.error(x)


@pytest.mark.parametrize("method", [Smooth(), AWQ()], ids=lambda m: m.name)
def test_scaling_leaves_the_float_function_unchanged(method):
    scaled = method.refine(draft(), stats())
    assert scaled.smooth is not None and drift(scaled, rows(64, 4)) < 1e-4


def test_awq_lowers_the_output_error_of_weight_only_layers():
    d, s = draft(act=None), stats()
    scaled = AWQ().refine(d, s)
    assert scaled.error(s.held) < 0.75 * d.error(s.held)
    assert scaled.error(rows(256, 3)) < 0.75 * d.error(rows(256, 3))


def test_smoothing_is_finite_for_dead_channels():
    x = rows(256, 1)
    x[:, :5] = 0
    d = draft()
    d.weight[:, 7] = 0
    smoothed = Smooth().refine(d, stats(x, x))
    assert smoothed.smooth is None or (smoothed.smooth.isfinite().all() and (smoothed.smooth > 0).all())


# -- rotation and shift ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [128, 100])
def test_rotation_leaves_the_float_function_unchanged(k):
    d = replace(draft(k=k), hadamard=32, smooth=torch.rand(k) + 0.5)
    assert d.k_padded % 32 == 0 and drift(d, rows(64, 4, k=k)) < 1e-4


def gelu_rows(m, seed):
    return torch.nn.functional.gelu(rows(m, seed, outliers=False))


@pytest.mark.parametrize("after, bound", [("GELU", 0.171875), ("SiLU", 0.2734375)])
def test_shift_takes_the_bound_of_the_activation_function(after, bound):
    function = {"GELU": torch.nn.functional.gelu, "SiLU": torch.nn.functional.silu}[after]
    lowest = float(function(torch.linspace(-5, 0, 100_001)).min())
    assert -lowest <= bound + 0.006, "the bound leaves out more than rounding would lose"
    x = function(rows(64, 1, outliers=False))
    shifted = Shift().refine(draft(act="uint4p_g64", after=after), stats(x, x))
    assert float(shifted.shift) == bound


@pytest.mark.parametrize("after", ["", "GEGLU", "SwiGLU"])
def test_shift_falls_back_to_the_fitted_minimum(after):
    """The product of a gated unit has no lower bound: a fixed one would cut its negative half off."""
    gate = torch.nn.functional.silu(rows(64, 1, outliers=False)) * rows(64, 2, outliers=False)
    shifted = Shift().refine(draft(act="uint4p_g64", after=after), stats(gate, gate))
    assert abs(float(shifted.shift) + float(gate.min())) < 2e-3 * float(-gate.min())


def test_shift_leaves_the_float_function_unchanged_and_folds_exactly():
    x = gelu_rows(256, 1)
    shifted = replace(
        Shift().refine(draft(act="uint4p_g64", after="GELU", bias=True), stats(x, x)), smooth=torch.rand(K) + 0.5
    )
    assert drift(shifted, x) < 1e-4
    w = shifted.rounded().qweight.dequantize().double()
    want = shifted.bias.double() - w @ (shifted.shift.double() / shifted.smooth.double())
    assert torch.allclose(shifted.folded_bias().double(), want, atol=1e-5)


def test_shift_halves_the_step_of_one_sided_activations():
    x = gelu_rows(512, 1)
    signed, d = draft(act="int4_g64"), draft(act="uint4p_g64", after="GELU")
    shifted = Shift().refine(d, stats(x, x))
    error = lambda d: float((d.inputs(x) - d.inputs(x, quantized=False)).square().mean())  # noqa: E731
    assert error(shifted) < 0.4 * error(signed)


@pytest.mark.parametrize("act", [None, "int4_g64", "uint4_g64"])
def test_shift_refuses_formats_that_cannot_use_it(act):
    with pytest.raises(ValueError, match="shift needs an unsigned activation format without zero points"):
        Shift().refine(draft(act=act), stats())


# -- low rank ----------------------------------------------------------------------------------------------------------
def lowrank_weight(d, rank=16, seed=0):
    """The draft with a few strong directions in its weight, which a branch can take."""
    g = torch.Generator().manual_seed(seed)
    strong = torch.randn(N, rank, generator=g) @ torch.randn(rank, K, generator=g) / rank**0.5
    return replace(d, weight=d.weight + 0.3 * strong)


def test_randomized_svd_is_as_good_as_the_exact_one():
    matrix = lowrank_weight(draft()).weight
    up, down = low_rank(matrix, 16)
    s = torch.linalg.svdvals(matrix.double())
    least = float((s[16:] ** 2).sum().sqrt())
    assert float((matrix - up @ down).norm()) < 1.01 * least
    assert torch.allclose(up.square().sum(0), down.square().sum(1), rtol=1e-3), "singular values are split evenly"


def test_low_rank_lowers_the_weight_error():
    d = lowrank_weight(draft())
    with_branch = LowRank(16, rounds=0).refine(d, Stats(seed=3))

    def weight_error(d):
        whole = d.rounded().qweight.dequantize() + (0 if d.up is None else d.up @ d.down)
        return float((whole - d.weight).square().sum())

    assert with_branch.up.shape == (N, 16) and weight_error(with_branch) < 0.7 * weight_error(d)


def test_low_rank_refits_lower_the_output_error():
    d, s = lowrank_weight(draft(act=None)), stats(rows(512, 1, False), rows(256, 2, False))
    once, refitted = LowRank(16, rounds=0).refine(d, s), LowRank(16, rounds=5).refine(d, s)
    assert refitted.error(s.held) < once.error(s.held) < d.error(s.held)


def test_low_rank_sees_the_raw_input_whatever_the_basis():
    d = replace(lowrank_weight(draft()), smooth=torch.rand(K) + 0.5, hadamard=32)
    assert drift(LowRank(16).refine(d, stats()), rows(64, 4)) < 1e-4


def test_low_rank_is_capped_and_seeded():
    d = draft()
    assert LowRank(1000).refine(d, Stats()).up.shape[1] == N // 4
    a, b, c = (LowRank(8, rounds=0).refine(d, Stats(seed=s)).up for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_layer_takes_the_smallest_rank_that_serves_it():
    """Four strong directions: the fourth counts, more of them do not. Nothing is decided where there are no rows to judge by."""
    g, s = torch.Generator().manual_seed(5), stats()
    strong = torch.randn(N, 4, generator=g) @ torch.randn(4, K, generator=g)
    d = replace(draft(), weight=strong + 0.05 * torch.randn(N, K, generator=g))
    method = LowRank(12, smaller=(0, 2, 4, 8), slack=0.5)
    made = method.refine(d, s)
    assert made.up.shape[1] == made.log["rank"] == 4
    assert s.judge.error(made) <= 1.5 * s.judge.error(LowRank(12).refine(d, s))
    assert LowRank(12, smaller=(0, 2), slack=0.5).refine(d, s).up.shape[1] == 12
    assert replace(method, slack=1e6).refine(d, s).up is None, "no branch at all"
    assert method.refine(d, Stats()).up.shape[1] == 12
    for wrong in ({"smaller": (12,)}, {"smaller": (-1,)}, {"slack": -0.1}, {"rank": 0}):
        with pytest.raises(ValueError, match="smaller ones lie below it"):
            replace(method, **wrong)


# -- gptq --------------------------------------------------------------------------------------------------------------
def test_gptq_beats_rounding_to_nearest_on_fitted_rows():
    d, s = draft(act=None), stats()
    assert GPTQ().refine(d, s).error(s.fit) < 0.7 * d.error(s.fit)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_gains_from_correlation_and_loses_little_without(seed):
    """MR-GPTQ: half of rounding to nearest on inputs of low rank, no more than 5 % above it on white ones, both on rows not seen."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, K, generator=g)
    low = torch.randn(1536, 16, generator=g) @ mix + 0.1 * torch.randn(1536, K, generator=g)
    white = torch.randn(8192 + 512, K, generator=g)
    for x, most in ((low, 0.5), (white, 1.05)):
        d, s = draft(act=None, seed=seed), stats(x[:-512], x[-512:])
        assert GPTQ().refine(d, s).error(s.held) <= most * d.error(s.held)


def objective(codes_weight, weight, gram):
    lost = (codes_weight - weight).double()
    return float((lost @ gram.double() * lost).sum())


def tiny_problem(seed):
    """A 1 x 3 weight, correlated inputs, and the objective of the best of all 15³ codes, of GPTQ, and of rounding to nearest."""
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(1, 3, generator=g), torch.randn(50, 1, generator=g) + 0.3 * torch.randn(50, 3, generator=g)
    gram, row = x.T @ x / 50, formats.get("int4_row")
    codes = torch.tensor(list(itertools.product(range(-7, 8), repeat=3))) * (float(weight.abs().max()) / 7)
    lost = (codes - weight).double()
    least = float(((lost @ gram.double()) * lost).sum(1).min())
    wide, wide_gram = (
        torch.nn.functional.pad(weight, (0, 1)),
        torch.nn.functional.pad(gram, (0, 1, 0, 1)),
    )  # whole bytes
    found, nearest = gptq(wide, wide_gram, row, 1e-6).dequantize()[:, :3], row.fake(wide)[:, :3]
    return least, objective(found, weight, gram), objective(nearest, weight, gram)


def test_gptq_against_brute_force_on_three_weights():
    """Never better than the best codes, near to them, and far nearer than rounding to nearest."""
    problems = torch.tensor([tiny_problem(seed) for seed in range(30)], dtype=torch.float64)
    least, found, nearest = problems.T
    assert (found >= least * (1 - 1e-5)).all()
    assert (found / least).mean() < 1.05 and (nearest / least).mean() > 1.15
    assert ((found / least).mean() - 1) < 0.3 * ((nearest / least).mean() - 1)


def test_gptq_with_a_diagonal_gram_is_rounding_to_nearest():
    weight = draft().weight
    for name in ("int4_g64", "nvfp4", "uint4_g32", "int8_row"):
        fmt = formats.get(name)
        got = gptq(weight, torch.diag(torch.rand(K) + 0.1), fmt, damp=0.0)
        assert (got.dequantize() - fmt.fake(weight)).abs().max() <= 1e-6 + 1.01 * fmt.step(
            got.scales, got.global_scale
        ).max() * 1e-4


@pytest.mark.parametrize("name", ["int4_g64", "uint4_g64", "nvfp4", "mxfp4", "int4_s8_g64", "int8_row", "fp8_e4m3_row"])
def test_gptq_serves_every_kind_of_format(name):
    d, s = draft(name, None), stats()
    fitted = GPTQ().refine(d, s)
    assert fitted.qweight.format == name and fitted.error(s.fit) < d.error(s.fit)


@pytest.mark.parametrize("block", [16, 128, 1024])
def test_gptq_does_not_depend_on_how_updates_are_batched(block):
    d, s = draft(act=None), stats()
    h = hessian(d, s)
    a, b = (
        gptq(d.target(), h, formats.get("int4_g64"), block=block),
        gptq(d.target(), h, formats.get("int4_g64"), block=1),
    )
    assert (a.codes != b.codes).float().mean() < 0.005  # float32 sums in another order may move a tie


def by_the_inverse(weight, gram, damp):
    """GPTQ as published: columns by descending diagonal, errors pushed on by the upper Cholesky factor of the inverse, float64."""
    fmt, w = formats.get("int4_g64"), weight.double()
    step = fmt.step(fmt.quantize(weight).scales, None).double().repeat_interleave(64, 1)
    h = gram.double() + damp * gram.diagonal().mean() * torch.eye(len(gram))
    order = gram.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, step, out = w[:, order].clone(), step[:, order], torch.zeros_like(w)
    for k in range(len(gram)):
        out[:, k] = (w[:, k] / step[:, k]).round().clamp(-7, 7) * step[:, k]
        w[:, k:] -= ((w[:, k] - out[:, k]) / upper[k, k])[:, None] * upper[k, k:]
    back = torch.empty_like(out)
    back[:, order] = out
    return back


def test_gptq_without_the_inverse_gives_the_published_codes():
    d, s = draft(act=None), stats()
    h = hessian(d, s)
    found, want = gptq(d.target(), h, formats.get("int4_g64"), 0.05).dequantize(), by_the_inverse(d.target(), h, 0.05)
    assert ((found - want).abs() > 1e-4).float().mean() < 0.005
    assert objective(found, d.target(), h) == pytest.approx(objective(want.float(), d.target(), h), rel=2e-3)


def test_gptq_is_the_same_with_and_without_a_compiler(monkeypatch):
    from qgen.kernels import cpu_columns

    d, s = draft(act=None), stats()
    h = hessian(d, s)
    for name in ("int4_g64", "uint4_g64", "nvfp4"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_columns, "lacking", lambda: "is not wanted")
            plain = gptq(d.target(), h, formats.get(name), 0.05)
        assert (gptq(d.target(), h, formats.get(name), 0.05).codes != plain.codes).float().mean() < 0.01


def test_hessian_is_the_second_moment_of_what_the_weight_sees():
    d, s = replace(draft(act=None), smooth=torch.rand(K) + 0.5, hadamard=32), stats()
    xh = d.inputs(s.fit, quantized=False).double()
    assert torch.allclose(hessian(d, s).double(), xh.T @ xh / len(xh), rtol=1e-3, atol=1e-3 * float(xh.square().mean()))


def test_rank_deficient_gram_is_no_trouble():
    x = rows(8, 1)
    assert GPTQ().refine(draft(act=None), stats(x, x)).rounded().qweight.dequantize().isfinite().all()


def test_a_gram_of_nan_is_an_error_and_no_endless_loop():
    with pytest.raises(BadData, match="NaN or infinity"):
        gptq(draft().weight, torch.full((K, K), float("nan")), formats.get("int4_g64"))


# -- reconstruct, clip, bias -------------------------------------------------------------------------------------------
def test_reconstruction_lowers_the_held_out_error_of_a_branch():
    s = stats()
    d = GPTQ().refine(LowRank(16).refine(lowrank_weight(draft()), s), s)
    better = Reconstruct().refine(d, s)
    assert better.error(s.held) < 0.95 * d.error(s.held) and better.up.shape == d.up.shape
    assert better.error(rows(256, 3)) < d.error(rows(256, 3))


def test_reconstruction_without_a_branch_does_nothing():
    d = draft()
    assert Reconstruct().refine(d, stats()) is d


def test_clipping_lowers_the_diagonal_error_per_block():
    d, s = draft(act=None), stats()
    clipped, fmt, h = Clip().refine(d, s), formats.get("int4_g64"), s.gram.diagonal()
    cost = lambda clip: fmt.blocks((fmt.fake(d.target(), clip) - d.target()).square() * h).sum(-1)  # noqa: E731
    assert (cost(clipped.clip) <= cost(1.0) * (1 + 1e-5)).all() and cost(clipped.clip).sum() < 0.95 * cost(1.0).sum()


def test_bias_correction_removes_the_mean_error():
    x = gelu_rows(1024, 1)
    d, s = draft(bias=True), stats(x, gelu_rows(256, 2))
    fixed = BiasCorrection().refine(d, s)
    mean = lambda d, x: (d.output(x) - x @ d.weight.T - d.bias).mean(0).norm()  # noqa: E731
    assert mean(fixed, x) < 1e-3 * mean(d, x) and mean(fixed, s.held) < mean(d, s.held)


# -- the rule that a refinement must help where it was not fitted --------------------------------------------------------
def test_a_method_that_overfits_is_dropped():
    """One fitted row: the mean error on it says nothing about others, and GPTQ fits that row alone."""
    fit, held = rows(1, 1, False), rows(512, 2, False)
    d = draft(methods=(BiasCorrection(),))
    s = stats(fit, held)
    assert BiasCorrection().refine(d, s).error(fit) < d.error(fit) and BiasCorrection().refine(d, s).error(
        held
    ) > d.error(held)
    kept = refine(d, s)
    assert kept.bias_fix is None and kept.log["bias"].startswith("dropped (held-out error ")
    assert kept.error(held) == d.rounded().error(held)


@methods.register("test-spoiler")
@dataclass(frozen=True)
class Spoiler:
    name: ClassVar[str] = "test-spoiler"
    optional: ClassVar[bool] = True

    def needs(self, site):
        return frozenset({"rows"})

    def refine(self, draft, stats):
        return replace(draft, bias_fix=torch.full((N,), float("nan")))


def test_a_method_that_makes_nan_is_dropped():
    kept = refine(draft(methods=(Spoiler(),)), stats())
    assert kept.bias_fix is None and "dropped" in kept.log["test-spoiler"]


def test_a_method_that_helps_is_kept_and_says_how_much():
    s = stats()
    kept = refine(draft(methods=(Smooth(), GPTQ())), s)
    assert kept.qweight is not None and float(kept.log["gptq"]) == pytest.approx(kept.error(s.held), rel=0.01)
    assert float(kept.log["gptq"]) < float(kept.log["smooth"])


def test_svdquant_beats_rounding_to_nearest_by_decibels():
    s = stats()
    chain = (Smooth(), LowRank(16), GPTQ(), Reconstruct(), BiasCorrection())
    plain, svd = refine(draft(), s), refine(draft(methods=chain), s)
    unseen = rows(512, 7)
    assert sqnr_db(svd.error(unseen)) > sqnr_db(plain.error(unseen)) + 6


def test_data_free_methods_need_nothing():
    assert LowRank(8, rounds=0).needs(None) == frozenset()
    made = refine(draft(methods=(LowRank(8, rounds=0),)), Stats())
    assert made.qweight is not None and made.up is not None


def test_methods_leave_their_draft_as_it_is():
    d, s = draft(bias=True), stats()
    before = d.weight.clone(), d.bias.clone()
    for method in (Smooth(), AWQ(), LowRank(16), GPTQ(), Clip(), BiasCorrection()):
        method.refine(d, s)
    assert torch.equal(d.weight, before[0]) and torch.equal(d.bias, before[1])
    assert (d.smooth, d.up, d.qweight, d.bias_fix, d.log) == (None, None, None, None, {})


def test_best_takes_the_first_of_equals_and_the_first_without_rows():
    a, b = draft(), draft()
    assert best([a, b], None) is a and best([a, b], stats().judge) is a


def test_the_judge_agrees_with_the_drafts_own_error():
    s = stats()
    d = replace(LowRank(8).refine(draft(bias=True), s), bias_fix=torch.randn(N) / 100)
    assert s.judge.error(d) == pytest.approx(d.error(s.held), rel=1e-4)


def test_every_method_is_data():
    for name, kind in methods.items():
        if not name.startswith("test"):
            assert (
                kind.name == name
                and kind() == kind()
                and kind().needs(Site("", "linear", "", 0, "", (64, 64)))
                <= {"rows", "gram", "absmax", "moments", "paths", "known"}
            )
