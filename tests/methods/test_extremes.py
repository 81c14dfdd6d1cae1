"""VQ4DiT, sums of binary bases and pre-shifted exponents: what their cards ask for."""

from dataclasses import replace

import pytest
import torch

from qgen import formats
from qgen.formats.base import QTensor
from qgen.formats.vq import VectorQuantizer
from qgen.methods.base import Stats, refine
from qgen.methods.gptq import hessian
from qgen.methods.learned_bases import LearnedBases
from qgen.methods.preshift import PreShift, shifts
from qgen.methods.vq4dit import VQ4DiT
from qgen.nn import packed_layer
from qgen.recipe import Spec
from qgen.site import Draft, Site


def correlated(m, seed, k):
    mix = torch.randn(16, k, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, 16, generator=g) @ mix + 0.1 * torch.randn(m, k, generator=g)


def stats(fit, held):
    return Stats(fit, held, fit.T @ fit / len(fit), fit.abs().amax(0), fit.abs().mean(0))


def layer(weight, act=None, n=32, k=64):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(5)) / k**0.5
    return Draft((Site("layer", "linear", "", 0, "x", (n, k)),), Spec(weight, act), w)


# -- VQ4DiT ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained():
    """(draft, stats, {n: refined}) with 2-bit vectors of two weights and 16 words: few words for many vectors."""
    k = 64
    seen = stats(correlated(1024, 1, k), correlated(512, 2, k))
    d = layer("vq2_d2")
    return d, seen, {n: VQ4DiT(candidates=n).refine(d, seen) for n in (1, 2, 3)}


def test_trained_assignments_beat_the_codebook_alone_and_that_beats_kmeans(trained):
    d, seen, made = trained
    kmeans, book, both = (x.error(seen.held) for x in (d.rounded(), made[1], made[2]))
    assert both <= 0.8 * book and book <= kmeans, (both / kmeans, book / kmeans)


def test_assignments_really_move_and_stay_among_the_candidates(trained):
    d, _, made = trained
    fmt = formats.get("vq2_d2")
    start = d.rounded().qweight
    vectors = fmt.normalize(d.target(), start.scales, None, None).reshape(-1, 2)
    order = torch.cdist(vectors, start.global_scale).argsort(-1)
    found = fmt.unpack(made[2].qweight.codes).reshape(-1).long()
    rank = (order == found[:, None]).float().argmax(-1)
    assert int(rank.max()) <= 1, "one of the two nearest words of the first codebook"
    assert float((rank == 1).float().mean()) >= 0.1
    assert made[2].log["moved"] == f"{float((rank == 1).float().mean()):.1%}"
    assert made[1].log["moved"] == "0.0%"


def test_one_candidate_is_training_the_codebook_alone(trained):
    """No index moves, bit for bit, and the words are those of torch's RMSprop on the codebook under fixed indices."""
    d, seen, made = trained
    fmt, start = formats.get("vq2_d2"), d.rounded().qweight
    assert torch.equal(made[1].qweight.codes, start.codes) and torch.equal(made[1].qweight.scales, start.scales)
    again = VQ4DiT(candidates=1, ratio_rate=10.0, weight=5.0, freeze=0.0).refine(d, seen)  # nothing of which it has
    assert torch.equal(again.qweight.global_scale, made[1].qweight.global_scale)
    index, gram = fmt.unpack(start.codes).reshape(-1).long(), hessian(d, seen)
    book = start.global_scale.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([book], lr=VQ4DiT.book_rate, alpha=0.9, eps=1e-20)
    first, best = None, None
    for step in range(VQ4DiT.steps + 1):
        error = d.target() - book[index].view(d.target().shape) * start.scales
        loss = ((error @ gram) * error).sum()
        lost = float(loss.detach())
        first = first or lost
        if step % 10 == 0 and (best is None or lost < best[0]):
            best = lost, book.detach().clone()
        optimizer.zero_grad()
        (loss / first).backward()
        optimizer.step()
    words = made[1].qweight.global_scale
    assert (
        float((words - best[1]).norm() / best[1].norm())
        < 0.01
        < float((words - start.global_scale).norm() / words.norm())
    )


def test_what_is_stored_are_indices_and_a_codebook(trained):
    d, _, made = trained
    q = made[2].qweight
    rows = (q.dequantize() / q.scales).view(-1, 2)
    assert float(torch.cdist(rows, q.global_scale).amin(-1).max()) < 1e-3, "each vector is one of 16 rows"
    assert q.nbytes == 32 * 64 * 2 // 8 + 16 * 2 * 4 + 32 * 4
    assert isinstance(formats.get(q.format), VectorQuantizer) and formats.get("vq2_d2").fake(d.target()).shape == (
        32,
        64,
    )


def test_fitted_error_never_rises_and_two_stages_pass(trained):
    d, seen, made = trained
    for refined in made.values():
        assert refined.error(seen.fit) <= d.rounded().error(seen.fit)
    for name in ("vq2_d8", "int4_g64"):
        other = layer(name)
        assert VQ4DiT().refine(other, seen) is other


# -- sums of binary bases ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, left", [("binary_row", 0.363), ("binary2_row", 0.131), ("binary3_row", 0.05)])
def test_energy_that_is_left_of_gaussian_weights(name, left):
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    lost = float((formats.get(name).fake(x) - x).square().sum() / x.square().sum())
    assert lost == pytest.approx(left, abs=0.01)


@pytest.mark.parametrize("name", ["binary2_row", "binary2_g64", "binary3_g64"])
def test_planes_are_the_sum_of_their_scales(name):
    fmt = formats.get(name)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    x[0, :3] = 0.0
    q = fmt.quantize(x)
    codes, want = fmt.unpack(q.codes), torch.zeros_like(x)
    group = torch.arange(128) // (fmt.block or 128)
    for i in range(fmt.bits):
        scale = q.scales if i == 0 else q.zero[:, i - 1 :: fmt.bits - 1]
        want += torch.where((codes >> i) & 1 == 1, 1.0, -1.0) * scale.float()[:, group]
    assert torch.equal(q.dequantize(), want) and bool((q.scales.float() > 0).all())
    slots = {"codes": q.codes, "scales": q.scales, "zero": q.zero}
    assert {name: (tuple(t.shape), t.dtype) for name, t in slots.items()} == fmt.shapes(5, 128)
    assert fmt.bits_per_value(128) == pytest.approx(8 * q.nbytes / x.numel())


def test_signs_of_zero_are_plus_one_and_a_layer_keeps_its_bits():
    q = formats.get("binary2_row").quantize(torch.zeros(2, 8))
    assert q.dequantize().tolist() == [[0.0] * 8] * 2 and int(formats.get("binary2_row").unpack(q.codes)[0, 0]) == 3
    d = layer("binary2_g64").rounded()
    new = packed_layer(d, torch.nn.Linear(64, 32, bias=False))
    new.prepare()
    x = torch.randn(3, 64)
    assert torch.allclose(new(x), x @ d.qweight.dequantize().T, atol=1e-5)
    state = {k: v for k, v in new.state_dict().items() if k != "weight"}
    assert torch.equal(
        QTensor(state["codes"], state["scales"], None, state["zero"], "binary2_g64").dequantize(),
        d.qweight.dequantize(),
    )


def fitted(draft, seen):
    """The output error over all fitted rows, by their second moment."""
    lost = draft.target() - draft.rounded().qweight.dequantize()
    return float(((lost @ hessian(draft, seen)) * lost).sum())


def test_a_hundred_steps_lower_the_error_and_two_bases_stay_ahead_of_one():
    seen = stats(correlated(1024, 1, 64), correlated(512, 2, 64))
    errors = {}
    for name in ("binary2_g64", "binary3_g64"):
        d = layer(name)
        made = LearnedBases().refine(d, seen)
        errors[name] = fitted(made, seen)
        assert errors[name] <= 0.95 * fitted(d, seen) and made.error(seen.held) < d.rounded().error(seen.held)
        before, after = d.rounded().qweight, made.qweight
        for old, new in ((before.scales, after.scales), (before.zero, after.zero)):
            assert not torch.equal(old, new) and bool((new > 0).all())
    one = layer("binary_g64")
    assert errors["binary3_g64"] < errors["binary2_g64"] < fitted(one, seen)


def test_learned_bases_are_what_the_file_holds_and_other_formats_pass():
    seen = stats(correlated(256, 1, 64), correlated(128, 2, 64))
    d = layer("int4_g64")
    assert LearnedBases().refine(d, seen) is d
    made = refine(replace(layer("binary2_g64"), spec=Spec("binary2_g64", None, (LearnedBases(),))), seen)
    new = packed_layer(made, torch.nn.Linear(64, 32, bias=False))
    assert torch.equal(new.dequantize(), made.qweight.dequantize())
    dead = LearnedBases(steps=5).refine(replace(layer("binary2_g64"), weight=torch.zeros(32, 64)), seen)
    assert bool((dead.qweight.dequantize() == 0).all())


# -- pre-shifted exponents ---------------------------------------------------------------------------------------------
def test_shifting_is_exact_in_floating_point():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(64) % 5)
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    k = shifts(x.abs().amax(0), float(x.abs().amax(0).min()), 2)
    assert torch.equal(k, k.round()) and int(k.min()) >= 0 and int(k.max()) == 3
    s = torch.exp2(k)
    assert torch.equal((w * s) / s, w) and torch.equal((x / s) * s, x)
    per_channel = formats.get("fp4_e2m1_row").fake(x / s) * s
    assert torch.equal(per_channel.double() @ w.double().T, (per_channel / s).double() @ (w * s).double().T)


def test_shifts_help_where_channels_differ_and_do_no_harm_elsewhere():
    g = torch.Generator().manual_seed(3)
    size = torch.exp2(torch.arange(64) % 5)
    x = torch.randn(800, 64, generator=g) * size
    seen = stats(x[:500], x[500:])
    d = layer("int8_row", "fp4_e2m1_row")
    shifted = PreShift().refine(d, seen)
    assert torch.equal(shifted.smooth.log2(), shifted.smooth.log2().round())
    assert shifted.error(seen.held) <= 0.75 * d.error(seen.held)
    flat = torch.randn(800, 64, generator=g)
    seen = stats(flat[:500], flat[500:])
    assert PreShift().refine(d, seen).error(seen.held) <= d.error(seen.held)


def test_one_enormous_channel_and_dead_ones():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(600, 64, generator=g)
    x[:, 5] *= 1024
    x[:, 9] = 0
    seen = stats(x[:400], x[400:])
    d = layer("int8_row", "fp4_e2m1_row")
    assert PreShift().refine(d, seen).error(seen.held) <= d.error(seen.held)
    dead = replace(seen, absmax=torch.zeros(64))
    assert PreShift().refine(d, dead) is d
