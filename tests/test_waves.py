"""Waves: whole blocks within the budget, every site once, one replay each, statistics of what really flows."""

import weakref
from itertools import pairwise

import pytest
import torch

from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.errors import BadData
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.probe import probe
from qgen.recipe import Spec
from qgen.waves import measure, plan, rows_for
from tests import tiny

SPEC = Spec("int4_g64", "int4_g64", (Smooth(), GPTQ()))
silent = iter


def specs(name="pixart", spec=SPEC):
    make, call = tiny.FAMILIES[name]
    return [(site, spec) for site in probe(make(), call()) if site.role == "inside"]


def one_block(pairs):
    return [pair for pair in pairs if pair[0].block == pairs[0][0].block]


@pytest.mark.parametrize("name", ["pixart", "unet", "flux", "llama"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 1.9, 100])
def test_budget_order_and_coverage(name, share, blocks):
    pairs = specs(name, Spec("int4_g64", "int4_g64", (GPTQ(),), share=share))
    budget = int(blocks * plan(one_block(pairs), 1 << 60)[0].nbytes)
    waves = plan(pairs, budget)
    got = [site.path for wave in waves for site in wave.sites]
    assert sorted(got) == sorted(s.path for s, _ in pairs), "every site once"
    orders = [[site.order for site in wave.sites] for wave in waves]
    assert all(max(a) < min(b) for a, b in pairwise(orders)), "in execution order"
    for wave in waves:
        assert wave.nbytes <= budget or len({s.block for s in wave.sites}) == 1, (
            "only a single block may exceed the budget"
        )
    by_block = [{site.block for site in wave.sites} for wave in waves]
    assert sum(map(len, by_block)) == len(set().union(*by_block)), "blocks are not torn"


def test_more_memory_fewer_waves():
    pairs = specs()
    assert [len(plan(pairs, budget)) for budget in (0, 1 << 60)] == [2, 1]


def test_shared_inputs_are_counted_once():
    pairs = [p for p in specs() if p[0].path.startswith("transformer_blocks.0.attn1.to_") and p[0].path[-1] in "qkv"]
    alone = plan(pairs[:1], 1 << 60)[0].nbytes
    assert len(pairs) == 3 and plan(pairs, 1 << 60)[0].nbytes == alone


def test_groups_by_shared_input_only_where_the_spec_says_so():
    apart, together = (plan(specs(spec=Spec("int4_g64", None, share=s)), 1 << 60)[0].groups for s in (False, True))
    assert all(len(g.sites) == 1 for g in apart)
    assert sorted(len(g.sites) for g in together if "attn1" in g.sites[0].path) == [1, 1, 3, 3]
    assert sum(len(g.sites) for g in together) == len(apart)


def test_what_is_observed_is_what_the_methods_ask_for():
    model, calls = tiny.net(), tiny.net_calls(3, 1).hold_out()
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    for methods, names in (
        ((), set()),
        ((LowRank(),), {"rows"}),
        ((Smooth(),), {"rows", "absmax"}),
        ((GPTQ(),), {"rows", "gram"}),
    ):
        (wave,) = plan([(s, Spec("int4_g64", None, methods)) for s in sites], 1 << 60)
        stats = measure(model, wave, calls, 0, silent)
        assert bool(stats) == bool(names)
        for s in stats.values():
            have = {n for n, field in (("rows", s.fit), ("gram", s.gram), ("absmax", s.absmax)) if field is not None}
            assert have == names


def test_what_was_observed_is_freed_when_dropped():
    model, calls = tiny.net(), tiny.net_calls(3, 1).hold_out()
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    (wave,) = plan([(s, SPEC) for s in sites], 1 << 60)
    stats = measure(model, wave, calls, 0, silent)
    first, count = next(iter(stats)), len(stats)
    assert stats[first] is stats[first], "layers that share an input follow each other"
    seen = weakref.ref(stats[first].gram)
    stats.drop(first)
    assert seen() is None and first not in stats and len(stats) == count - 1
    stats.drop(first)


def captured(model, calls, path):
    """Inputs of a layer over all fitted calls, by a hook of our own."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    for call in calls.calls:
        if not call.moment.held:
            call.run(model)
    hook.remove()
    return torch.cat(seen)


def test_statistics_are_of_the_rows_that_flow():
    model, calls = tiny.net(), tiny.net_calls(5, 2).hold_out()
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    (wave,) = plan([(s, SPEC) for s in sites], 1 << 60)
    stats = measure(model, wave, calls, 0, silent)
    site = next(s for s in sites if s.path == "blocks.1.fc2")
    x, s = captured(model, calls, site.path), stats[site.shares]
    assert torch.allclose(s.gram, x.T @ x / len(x), atol=1e-5) and torch.equal(s.absmax, x.abs().amax(0))
    assert sorted(s.fit.sum(1).tolist()) == pytest.approx(sorted(x.sum(1).tolist()), abs=1e-4), (
        "all rows fit into the reservoir"
    )
    assert len(s.held) == 2 * 2 * 24


def test_convolutions_are_observed_unfolded():
    make, call = tiny.FAMILIES["unet"]
    model, calls = make(), tiny.calls("unet", 2)
    sites = [s for s in probe(model, call()) if s.path == "mid_block.resnets.0.conv1"]
    (wave,) = plan([(s, SPEC) for s in sites], 1 << 60)
    s = measure(model, wave, calls, 0, silent)[sites[0].shares]
    seen = []
    hook = model.mid_block.resnets[0].conv1.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for c in calls.calls:
        c.run(model)
    hook.remove()
    x = torch.nn.functional.unfold(torch.cat(seen), 3, padding=1).mT.reshape(-1, 576)
    assert torch.allclose(s.gram, x.T @ x / len(x), atol=1e-4)


def test_one_replay_per_wave_that_ends_after_its_last_layer():
    model, calls = tiny.net(3), tiny.net_calls(3, 1)
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    waves = plan([(s, SPEC) for s in sites], 0)
    assert len(waves) == 3
    starts, heads = [], []
    model.embed.register_forward_pre_hook(lambda m, a: starts.append(1))
    model.blocks[1].register_forward_pre_hook(lambda m, a: heads.append(1))
    measure(model, waves[0], calls, 0, silent)
    assert (len(starts), len(heads)) == (3, 0), "each call once, and not beyond the first block"
    measure(model, waves[2], calls, 0, silent)
    assert (len(starts), len(heads)) == (6, 3)


def test_later_waves_see_earlier_errors():
    """Statistics come from the live model: a change upstream shows in them."""
    model, calls = tiny.net(2), tiny.net_calls(2, 1)
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    second = plan([(s, SPEC) for s in sites], 0)[1]
    before = measure(model, second, calls, 0, silent)
    model.blocks[0].fc2.weight.mul_(1.5)
    after = measure(model, second, calls, 0, silent)
    assert all(not torch.equal(before[k].gram, after[k].gram) for k in before)


def test_nan_inside_names_the_layer_and_leaves_no_hook():
    model, calls = tiny.net(2), tiny.net_calls(2, 1)
    model.blocks[0].fc1.register_forward_hook(lambda m, a, y: y * float("nan"))
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    (wave,) = plan([(s, SPEC) for s in sites], 1 << 60)
    with pytest.raises(
        BadData, match=r"layer blocks\.0\.fc2: its input holds NaN or infinity on calibration call .*sample=0"
    ):
        measure(model, wave, calls, 0, silent)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("methods", [(GPTQ(),), (Smooth(),)], ids=["gram", "absmax"])
def test_a_layer_that_only_held_out_calls_reach_is_an_error(methods):
    model = tiny.net(1)
    calls = CalibrationSet((Call(tiny.net_call().args, {}, Moment(held=True)),))
    sites = [s for s in probe(model, calls.calls[0]) if s.role == "inside"]
    (wave,) = plan([(s, Spec("int4_g64", None, methods)) for s in sites], 1 << 60)
    with pytest.raises(BadData, match=r"no calibration call that may be fitted reaches layer blocks\.0\.q"):
        measure(model, wave, calls, 0, silent)


@pytest.mark.parametrize("k", [16, 768, 3072, 12288, 1 << 20])
def test_reservoirs_hold_two_million_values_within_bounds(k):
    assert rows_for(k) == min(8192, max(1024, 2**21 // k))
