"""Timed layers: the right row for each sample, one graph for all steps, and what happens without a timestep."""

import copy
import logging

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.io.into import load_peer
from qgen.methods.dither import Dither
from qgen.methods.lowrank import LowRank
from qgen.methods.temporal import Center, Static, TemporalBias
from qgen.nn import clock as clock_module
from qgen.nn import lora
from qgen.nn.clock import timestep_of
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Spec

TS = (100.0, 300.0, 500.0, 700.0, 900.0)
TIMED = Recipe(Spec("int4_g64", "uint4_g64", (Center(), LowRank(8), TemporalBias()), bins=4))
STATIC = Recipe(Spec("int4_g64", "int8_row", (Center(), LowRank(8), Static(), TemporalBias()), bins=4))
DITHERED = Recipe(
    Spec("int4_g64", "uint4_g64", (Center(curves=0), LowRank(8), Dither(), TemporalBias(curves=0)), bins=32)
)
KINDS = ("timed", "static", "dithered")


class Denoiser(nn.Module):
    """Two layers whose input is scaled and shifted by the timestep, as adaLN does."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.15
        self.register_buffer("direction", torch.randn(64, generator=generator))

    def forward(self, x, timestep):
        t = timestep.reshape(-1, 1, 1) / 500 - 1
        h = self.layers[0](x * torch.exp(1.5 * t) + 3 * t * self.direction)
        return x + self.layers[1](torch.tanh(h) + t)


class Still(Denoiser):
    """Its layers read tokens that hardly change from step to step, whose rounding errors add up."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens", torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) + self.direction)

    def forward(self, x, timestep):
        h = self.layers[0](self.tokens + 0.01 * x)
        return 0.01 * x + self.layers[1](torch.tanh(h))


def kind(name):
    """The float model of a module among `made`."""
    return Still if name == "dithered" else Denoiser


def call(seed, *ts, sample=0):
    x = torch.randn(len(ts), 24, 64, generator=torch.Generator().manual_seed(seed))
    return Call(
        (x,), {"timestep": torch.tensor(ts)}, Moment(sample, step=TS.index(ts[0]) if ts[0] in TS else 9, t=ts[0])
    )


@pytest.fixture(scope="module")
def calls():
    return CalibrationSet(tuple(call(7 * s + i, t, sample=s) for s in range(10) for i, t in enumerate(TS)))


@pytest.fixture(scope="module")
def made(calls):
    recipes = {"timed": TIMED, "static": STATIC, "dithered": DITHERED, "blind": TIMED.set("*", bins=1)}
    return {
        name: qgen.quantize(kind(name)().eval(), recipe, calibration=calls, progress=False)
        for name, recipe in recipes.items()
    }


def test_a_dithered_layer_keeps_curves_in_place_of_rows(made):
    for layer in made["dithered"].layers:
        bins, (rows, curves) = len(layer.t_edges) + 2, layer.t_mix.shape
        assert rows == bins == len(TS) + 1 and len(layer.t_shift) <= curves < bins and len(layer.t_bias) == curves
        shift = table(layer, "t_shift")
        assert float((shift[:-1] - shift[-1]).abs().amax(1).min()) > 0  # every bin is moved
        assert layer.layout.bins == bins and layer.layout.mix == curves and layer.layout.moved == len(layer.t_shift)
    assert all(layer.t_mix is None and not layer.layout.mix for n in ("timed", "static") for layer in made[n].layers)


def table(layer, name):
    """A table with a row for each bin, by the formula."""
    rows = getattr(layer, name).float()
    return (
        rows
        if layer.t_mix is None
        else torch.einsum("tr,rn->tn", layer.t_mix[:, layer.t_mix.shape[1] - len(rows) :], rows)
    )


def error(module, c):
    with torch.no_grad():
        want = c.run(Denoiser())
        return float((c.run(module) - want).square().mean() / want.square().mean())


def test_bins_beat_one_bin_on_unseen_calls(made):
    unseen = [call(1000 + i, t) for i, t in enumerate(TS)]
    errors = {name: sum(error(module, c) for c in unseen) for name, module in made.items()}
    assert errors["timed"] < 0.85 * errors["blind"]


@pytest.mark.parametrize("name", KINDS)
def test_samples_of_one_batch_have_their_own_bins(made, name):
    module = made[name]
    together = call(2000, 900.0, 100.0, 500.0)
    with torch.no_grad():
        whole = together.run(module)
        apart = [module(together.args[0][i : i + 1], together.kwargs["timestep"][i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(apart), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_calls_says_nothing(made, name):
    module, some = made[name], [call(3000 + i, t) for i, t in enumerate(TS)]
    with torch.no_grad():
        forth = [c.run(module) for c in some]
        back = [c.run(module) for c in reversed(some)]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))


def test_unseen_timesteps_take_the_bin_they_fall_into(made):
    layer = made["timed"].layers[0]
    edges = layer.t_edges
    assert len(edges) == 3 and bool((edges.diff() > 0).all())
    clock = made["timed"].qgen_clock
    for t in (-50.0, 0.0, 123.0, 640.0, 5000.0):
        clock.t = torch.tensor([t])
        want = sum(t > float(e) for e in edges)
        assert int(clock_module._bins(layer, torch.zeros(1, 2, 64))) == want


@pytest.mark.parametrize("name", KINDS)
def test_tables_are_exact_where_nothing_is_rounded(made, name):
    """y = s_b op((x + c_b) / s_b) + d_b with an unrounded op is the float layer plus its bias correction: checked against the formula."""
    module, layer = made[name], made[name].layers[0]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4))
    module.qgen_clock.t = torch.tensor([150.0, 850.0])
    rows = torch.bucketize(module.qgen_clock.t, layer.t_edges)
    got = clock_module.apply(layer, x, lambda z: z @ layer.dequantize(torch.float32).T)
    want = x.clone()
    for i, row in enumerate(rows.tolist()):
        shift, bias = (table(layer, name)[row] for name in ("t_shift", "t_bias"))
        want[i] = (x[i] + shift) @ layer.dequantize(torch.float32).T + bias
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_one_compiled_graph_serves_all_steps(made, name):
    module = copy.deepcopy(made[name])
    torch._dynamo.reset()
    count = []

    def backend(graph, _):
        count.append("torch.ops.qgen.linear" in graph.code)  # the hook that reads the timestep is a graph of its own
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for i, t in enumerate(TS):
        with torch.no_grad():
            assert torch.equal(call(4000 + i, t).run(compiled), call(4000 + i, t).run(made[name]))
    assert sum(count) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["timed", "dithered"])
def test_without_a_timestep_all_of_them_together_serve_and_it_is_said(made, caplog, name):
    layer = copy.deepcopy(made[name].layers[0])
    x = torch.randn(1, 3, 64)
    layer.clock.t, layer.clock.told = None, False
    with caplog.at_level(logging.WARNING, logger="qgen"):
        y = layer(x)
    assert "without a timestep" in caplog.text
    shift, bias = (clock_module.whole_table(layer, slot)[-1] for slot in ("t_shift", "t_bias"))
    torch.testing.assert_close(shift, table(layer, "t_shift")[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, torch.ops.qgen.linear(x + shift, *layer.record(), layer.kernel) + bias)


def test_a_model_that_takes_no_timestep_falls_back_and_says_so(caplog):
    plain = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    given = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(i)) + 1 for i in range(6)]
    with caplog.at_level(logging.WARNING, logger="qgen"):
        made = qgen.quantize(plain, TIMED, calibration=given, progress=False)
    assert "no recorded call has a timestep" in caplog.text
    assert made.qgen_recipe.default.bins == 1
    assert all(layer.t_edges is None for layer in made.modules() if isinstance(layer, Packed))
    assert "qgen_clock" not in made.__dict__


def test_calls_that_a_user_made_tell_their_timestep_by_their_arguments(calls, made, caplog):
    """Calls whose moment says nothing of it give the same layers as recorded ones, and dicts do not count as calls without one."""
    bare = tuple(Call(c.args, c.kwargs, Moment(c.moment.sample, c.moment.step)) for c in calls.calls)
    model = qgen.quantize(Denoiser().eval(), TIMED, calibration=CalibrationSet(bare), progress=False)
    assert all(torch.equal(t, made["timed"].state_dict()[name]) for name, t in model.state_dict().items())
    with caplog.at_level(logging.WARNING, logger="qgen"):
        model = qgen.quantize(
            Denoiser().eval(), TIMED, calibration=[dict(c.kwargs, x=c.args[0]) for c in calls.calls], progress=False
        )
    assert model.qgen_recipe.default.bins == 4 and not caplog.text


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_every_dimension_have_tables(conv):
    """Other widths than pixels, two samples at different timesteps in one call: each as in a call of its own, and near the float model."""

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([conv(64, 96, 3, padding=1)])

        def forward(self, x, timestep):
            return self.layers[0](x * (0.1 + timestep.reshape(-1, *[1] * (x.ndim - 1)) / 500))

    def seen(seed, *ts):
        x = torch.randn(len(ts), 64, *[4] * int(conv.__name__[4]), generator=torch.Generator().manual_seed(seed))
        return Call((x,), {"timestep": torch.tensor(ts)}, Moment(seed, t=ts[0]))

    torch.manual_seed(0)
    model = Timed().eval().requires_grad_(False)
    both, alone = seen(99, 100.0, 900.0), [seen(99, 100.0, 900.0) for _ in range(2)]
    alone = [Call((c.args[0][i : i + 1],), {"timestep": c.kwargs["timestep"][i : i + 1]}) for i, c in enumerate(alone)]
    want = both.run(model)
    fitted = [seen(10 * s + i, t) for s in range(5) for i, t in enumerate(TS)]
    recipe = Recipe(Spec("int8_row", "int8_row", (Static(), TemporalBias()), bins=3))
    qgen.quantize(model, recipe, calibration=fitted, progress=False)
    assert model.layers[0].t_scale is not None and model.layers[0].t_bias is not None
    got = both.run(model)
    assert (got - want).norm() < 0.03 * want.norm()
    torch.testing.assert_close(got, torch.cat([c.run(model) for c in alone]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*KINDS, "blind"])
def test_save_and_load_keep_every_bit(made, name, tmp_path):
    qgen.save(made[name], tmp_path / "m")
    back = qgen.load(tmp_path / "m", into=kind(name)())
    c = call(5000, 900.0, 100.0)
    with torch.no_grad():
        assert torch.equal(c.run(back), c.run(made[name]))
    for a, b in zip(back.layers, made[name].layers, strict=True):
        assert a.layout == b.layout and all(torch.equal(a.canonical()[k], v) for k, v in b.canonical().items())
    qgen.save(back, tmp_path / "again")
    first, second = (sorted((tmp_path / d).glob("*.safetensors")) for d in ("m", "again"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_static_layer_measures_nothing_at_run_time(made):
    layer = made["static"].layers[0]
    assert layer.act_scale is not None and layer.act_scale.numel() == 1 and layer.ask().static == "tensor"
    assert len(layer.t_scale) == len(layer.t_edges) + 2
    assert float(layer.t_scale[:-1].max() / layer.t_scale[:-1].min()) > 2  # amplitudes grow e^3-fold over the steps


def test_a_failed_run_takes_the_clock_off(calls):
    module = Denoiser().eval()
    x, t = torch.full((1, 24, 64), 3e38), torch.tensor([900.0])
    loud = [Call((x,), {"timestep": t}, Moment(sample, 4, 900.0)) for sample in range(90, 96)]
    bad = CalibrationSet((*calls.calls[:20], *loud))
    with pytest.raises(qgen.errors.BadData):
        qgen.quantize(module, TIMED, calibration=bad, progress=False)
    assert "qgen_clock" not in module.__dict__ and not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["timed", "dithered"])
def test_export_to_formats_without_tables_is_refused_and_qgens_own_keeps_them(made, calls, tmp_path, name):
    with pytest.raises(ValueError, match="tables over timesteps"):
        qgen.export(made[name], "comfy", tmp_path / "x.safetensors")
    qgen.export(made[name], "qgen", tmp_path / "own")
    (file,) = (tmp_path / "own").glob("*.safetensors")
    for to in ("comfy", "float"):
        with pytest.raises(ValueError, match="tables over timesteps"):
            qgen.export(file, to, tmp_path / "x.safetensors")
    again = load_peer(file, into=kind(name)())
    for a, b in zip(again.layers, made[name].layers, strict=True):
        assert a.layout == b.layout and all(torch.equal(a.canonical()[k], v) for k, v in b.canonical().items())
    with torch.no_grad():
        assert torch.equal(calls.calls[0].run(again), calls.calls[0].run(made[name]))


@pytest.mark.parametrize(
    "given, wanted",
    [
        (((torch.zeros(1), torch.tensor(5.0)), {}), [5.0]),
        (((torch.zeros(1),), {"timestep": torch.tensor([3, 4])}), [3.0, 4.0]),
        (((torch.zeros(1),), {"timestep": 7}), [7.0]),
        (((torch.zeros(1),), {"timestep": torch.tensor([[0.0, 9.0], [2.0, 1.0]])}), [9.0, 2.0]),
        (((torch.zeros(1),), {}), None),
    ],
    ids=["scalar", "batch", "number", "per token", "none"],
)
def test_timestep_of(given, wanted):
    class Takes(nn.Module):
        def forward(self, x, timestep=None):
            return x

    found = timestep_of(Takes(), *given)
    assert (None if found is None else found.tolist()) == wanted


@pytest.mark.parametrize("name", ["timed", "dithered"])
def test_a_fused_lora_sees_the_raw_input(made, name):
    layer = copy.deepcopy(made[name].layers[0])
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(9)
    a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((4, 64), (64, 4)))
    for t in (torch.tensor([850.0, 150.0]), torch.tensor([300.0]), None):
        layer.clock.t = t
        before = layer(x)
        lora.append_rank(layer, [(a, b)])
        torch.testing.assert_close(layer(x), before + x @ a.T @ b.T, atol=2e-2, rtol=2e-2)
        lora.cut_rank(layer)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["timed", "dithered"])
def test_a_fused_lora_is_exported_with_its_tables(made, name, tmp_path):
    """The file knows of no LoRA: what it makes of the shifts has gone into the stored biases."""
    module = copy.deepcopy(made[name])
    generator = torch.Generator().manual_seed(9)
    for layer in module.layers:
        a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((4, 64), (64, 4)))
        lora.append_rank(layer, [(a, b)])
    c = call(6000, 900.0, 100.0)
    with torch.no_grad():
        plain, want = c.run(made[name]), c.run(module)
        assert float((want - plain).norm()) > 0.1 * float(plain.norm())
        qgen.export(module, "qgen", tmp_path / "fused")
        assert torch.equal(c.run(module), want)  # the model itself is left as it was
        (file,) = (tmp_path / "fused").glob("*.safetensors")
        back = load_peer(file, into=kind(name)())
        assert all(a.fused_from is None and a.rank == b.rank for a, b in zip(back.layers, module.layers, strict=True))
        torch.testing.assert_close(c.run(back), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_casts_keep_the_tables(made, name):
    """A deep copy answers alike and has a clock of its own; a cast to 16 bits changes the biases alone, and little of the output."""
    module, c = copy.deepcopy(made[name]), call(7000, 900.0, 100.0)
    assert module.qgen_clock is not made[name].qgen_clock
    assert all(layer.clock is module.qgen_clock for layer in module.layers)
    with torch.no_grad():
        want = c.run(made[name])
        assert torch.equal(c.run(module), want)
        module.to(torch.bfloat16)
        for cast, layer in zip(module.layers, made[name].layers, strict=True):
            assert cast.layout == layer.layout
            for slot, t in cast.canonical().items():
                was = layer.canonical()[slot]
                assert t.dtype == (torch.bfloat16 if slot in ("bias", "t_bias") else was.dtype), slot
                assert torch.equal(t, was.to(t.dtype)), slot
        got = module(c.args[0].bfloat16(), c.kwargs["timestep"])
    assert (
        float((got.float() - want).norm() / want.norm()) < 0.1
    )  # inputs near the middle of two codes take the other one


def test_state_dicts_carry_curves_and_refuse_others(made):
    module, other = copy.deepcopy(made["dithered"]), copy.deepcopy(made["dithered"])
    state = {name: t.clone() for name, t in module.state_dict().items() if not name.endswith(".weight")}
    state["layers.0.t_mix"] *= 2
    other.load_state_dict(state, strict=False)
    assert torch.equal(other.layers[0].t_mix, 2 * module.layers[0].t_mix)
    state["layers.0.t_mix"] = state["layers.0.t_mix"][:, :-1]
    with pytest.raises(RuntimeError, match=r"layers\.0\.t_mix: expected"):
        other.load_state_dict(state, strict=False)
