"""Ranges of channels and groups that end in one scale: the same layer, the same codes, and far less error."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgen
from qgen.calibration.moments import Moments, fine_edges
from qgen.kernels import reference
from qgen.methods.base import Stats, refine
from qgen.methods.reparametrize import Reparametrize, axis, group, grouped, ranges, spread
from qgen.methods.temporal import Center, Static, TemporalBias, begin
from qgen.nn import packed_layer
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K = 48, 96


def normed(m, seed, beta=3.0):
    """What a LayerNorm with unequal gains and large offsets gives."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(77)
    gamma, offset = torch.randn(K, generator=fixed).exp(), beta * torch.randn(K, generator=fixed)
    return F.layer_norm(torch.randn(m, K, generator=g), (K,), gamma, offset)


def stats(fit, held):
    return Stats(fit, held, fit.T @ fit / len(fit), fit.abs().amax(0), fit.abs().mean(0))


def layer(weight, act, methods, seed=5):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5
    return Draft((Site("layer", "linear", "", 0, "x", (N, K)),), Spec(weight, act, tuple(methods)), w)


def timeless(s):
    """Statistics with the moments of calls that have no timestep: one bin."""
    return replace(s, moments=Moments(fine_edges(())))


def run(methods, weight, act="int4_row", beta=3.0):
    s = timeless(stats(normed(2048, 1, beta), normed(512, 2, beta)))
    draft, s = begin(layer(weight, act, methods), s)
    draft = refine(draft, s)
    return draft, s.judge.error(draft), s


FULL = (Center("middle"), Reparametrize(), Static(), TemporalBias())


@pytest.mark.parametrize("groups", [0, 8])
def test_the_float_layer_is_the_same(groups):
    draft, _, _ = run((Center("middle"), Reparametrize(groups=groups)), "fp8_e4m3_row")
    assert draft.smooth is not None and draft.center is not None
    x = normed(64, 9)
    moved = draft.inputs(x + draft.center[:1], quantized=False) @ draft.target().T - draft.center[:1] @ draft.weight.T
    want = x @ draft.weight.T
    assert (moved - want).square().sum() / want.square().sum() < (1e-5) ** 2


def test_one_scale_gives_the_codes_of_a_scale_and_middle_for_every_channel():
    rows = normed(4096, 1)
    low, high = ranges(rows)
    half, middle = (high - low) / 2, (high + low) / 2
    want = ((rows - middle) / (half / 7)).round().clamp(-7, 7)  # a step and a zero for each channel
    r = half / half.mean()
    made = reference.quantize_act(
        reference.transform_act(rows - middle, K, r, None, 0), "int4_row", (half.mean() / 7).reshape(1)
    )
    got = made.dequantize() / made.scales[..., :1]
    assert (got.round() == want).float().mean() >= 0.9999


def test_a_fifth_of_the_error_of_one_range_as_it_comes():
    plain = run((Static(),), "fp8_e4m3_row")[1]
    for groups in (0, 16):
        assert run((Center("middle"), Reparametrize(groups=groups), Static()), "fp8_e4m3_row")[1] <= 0.2 * plain
    assert run(FULL, "int4_row")[1] <= 0.4 * run((Static(),), "int4_row")[1]


def test_modulated_inputs_keep_the_function_for_every_conditioning():
    """adaLN: (1 + scale) n + shift with other scales and shifts in each row."""
    draft, _, _ = run((Center("middle"), Reparametrize()), "fp8_e4m3_row")
    g = torch.Generator().manual_seed(4)
    n = F.layer_norm(torch.randn(200, K, generator=g), (K,))
    x = (1 + torch.randn(200, K, generator=g)) * n + 2 * torch.randn(200, K, generator=g)
    moved = draft.inputs(x + draft.center[:1], quantized=False).double() @ draft.target().double().T
    moved -= draft.center[:1].double() @ draft.weight.double().T
    want = x.double() @ draft.weight.double().T
    assert (moved - want).norm() / want.norm() < 2e-6


def test_it_changes_nothing_where_channels_are_alike():
    rows = torch.randn(2048, K, generator=torch.Generator().manual_seed(0))
    d = layer("int4_row", "int4_row", (Reparametrize(),))
    made = refine(d, stats(rows[:1024], rows[1024:]))
    assert made.smooth is None or float(made.smooth.log().std()) < 0.1


@pytest.mark.parametrize("act", ["int8_row", "int8_g64"])
def test_scales_of_channels_are_refused_by_files_until_they_are_folded(act, tmp_path):
    """QuEST's card, test 3: a scale for each input channel serves no integer product; as smoothing and one scale it is the same layer."""
    rows = normed(512, 1)
    scale = rows.abs().amax(0) / 127  # of each channel
    mean = scale.log().mean().exp()
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(5)) / K**0.5

    def layer_of(smooth, steps):
        ratio = torch.ones(2) if act == "int8_g64" else torch.ones(1)  # K of 96 is padded to 128
        made = replace(
            layer("int8_row", act, ()), weight=w, smooth=smooth, steps=steps, ratio=ratio, dtype=torch.float32
        )
        return nn.Sequential(packed_layer(made, nn.Linear(K, N, bias=False)))

    model = layer_of(None, mean.reshape(1))
    model[0].act_scale = nn.Parameter(scale, requires_grad=False)
    for write in (
        lambda: qgen.save(model, tmp_path / "m"),
        lambda: qgen.export(model, "comfy", tmp_path / "m.safetensors"),
        lambda: qgen.export(model, "qgen", tmp_path / "own"),
    ):
        with pytest.raises(ValueError, match=r"'0' has 96 activation scales.* fold them into the weight, as smoothing"):
            write()
    folded = layer_of(scale / mean, mean.reshape(1))
    qgen.prepare(folded, "reference")
    qgen.save(folded, tmp_path / "m")
    again = qgen.load(tmp_path / "m", into=nn.Sequential(nn.Linear(K, N, bias=False)))
    qgen.prepare(again, "reference")
    by_hand = (rows / scale).round().clamp(-127, 127) * scale @ folded[0].dequantize().T
    error = lambda y: float((y - rows @ w.T).square().sum() / (rows @ w.T).square().sum())  # noqa: E731
    assert abs(error(again(rows)) - error(by_hand)) < 1e-5 and error(by_hand) < 1e-3


# -- DGQ ------------------------------------------------------------------------------------------------------------
def outliers(where, seed):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
    for index, offset in zip((5, 20, 41), (30.0, -18.0, 22.0), strict=True):
        if where == "channel":
            x[:, index] += offset
        else:
            x[index] += offset
    return x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", ["channel", "row"])
def test_groups_along_the_right_axis(where, seed):
    x = outliers(where, seed)
    inner = torch.ones_like(x, dtype=torch.bool)
    if where == "channel":
        inner[:, [5, 20, 41]] = False
    else:
        inner[[5, 20, 41]] = False
    assert axis(x) == where
    whole = grouped(x, torch.zeros(64, dtype=torch.int64), 4)  # one group: the whole tensor
    lost = {"none": (whole - x)[inner].square().sum()}
    for name, t in (("channel", x), ("row", x.T)):
        made = grouped(t, group(*ranges(t), 8), 4)
        lost[name] = ((made if name == "channel" else made.T) - x)[inner].square().sum()
    other = "row" if where == "channel" else "channel"
    assert lost[where] <= 0.1 * lost["none"] and lost[other] >= 0.5 * lost["none"]


def test_centred_outliers_fool_the_spread_and_not_the_choice():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    x[:, 9] *= 30
    by_row, by_channel = spread(*ranges(x.T)), spread(*ranges(x))
    assert axis(x) == "channel" and by_row > 0.5 * by_channel


def test_groups_are_one_product_each():
    """The sum over groups of integer products, each with its own step, is what the values there and back give."""
    x, w = outliers("channel", 7), torch.randn(32, 64, generator=torch.Generator().manual_seed(8)).sign()
    owner = group(*ranges(x), 8)
    total = torch.zeros(256, 32, dtype=torch.float64)
    for index in owner.unique():
        part = x[:, owner == index]
        low, high = part.amin().clamp(max=0), part.amax().clamp(min=0)
        step = (high - low) / 15
        codes = ((part / step).round() + (-low / step).round()).clamp(0, 15) - (-low / step).round()
        total += (codes.long() @ w[:, owner == index].T.long()).double() * step.double()
    got = grouped(x, owner, 4).double() @ w.double().T
    assert (got - total).abs().max() / total.abs().max() < 1e-6


def test_what_cannot_be():
    with pytest.raises(ValueError, match="middle"):
        Center("median")
