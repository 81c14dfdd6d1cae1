"""Activations that stay at 16 bits: never more of them than asked for, those that are hurt most, and more budget never hurts."""

import pytest
import torch

import qgen
from qgen.allocate import Budget
from qgen.allocate.candidates import ladder
from qgen.allocate.decouple import mixtures
from qgen.allocate.exceptions import limit_of, offering
from qgen.allocate.milp import Limit, choose
from qgen.allocate.sensitivity import Table, Unit
from qgen.probe import probe
from qgen.recipe import Recipe, Rule, Spec
from qgen.site import Site
from tests import tiny
from tests.allocate.test_milp import brute, of

SPEC = Spec("int4_g64", "int8_row")
STEPS = offering(ladder)(SPEC)  # 4 bits, 8 bits, all at 16 bits, 4 bits with 16-bit activations
BITS = torch.tensor([4.25, 8.0, 16.0, 4.25], dtype=torch.float64)


def table(layers, seed=0):
    """Layers of several sizes, whose damage has a part of the weights and one of the activations, both spread over decades."""
    g = torch.Generator().manual_seed(seed)
    units = []
    for i in range(layers):
        tokens, k = (int(torch.randint(1, top, (), generator=g)) for top in (64, 5))
        units.append(Unit("", (Site(f"l{i}", "linear", "", i, f"x{i}", (64, 64 * k), tokens),), STEPS))
    size = torch.tensor([[unit.numel] for unit in units], dtype=torch.float64)
    spread = lambda: 10 ** (3 * torch.rand(layers, 1, generator=g, dtype=torch.float64))  # noqa: E731
    weights, acts = spread() * torch.tensor([1, 1e-2, 0, 1]), spread() * torch.tensor([1, 1, 0, 0])
    return Table(units, size * BITS, size * BITS / 8, {"output": weights + acts})


def reads(unit):
    return unit.sites[0].tokens * unit.sites[0].shape[1]


def share(found, choice):
    """Share of the activations that a choice leaves at 16 bits."""
    kept = [reads(u) for u, j in zip(found.units, choice, strict=True) if STEPS[j] is None or STEPS[j].act is None]
    return sum(kept) / sum(map(reads, found.units))


def test_the_ladder_offers_the_own_weights_with_float_activations():
    assert [(c and c.weight, c and c.act) for c in STEPS] == [
        ("int4_g64", "int8_row"), ("int8_row", "int8_row"), (None, None), ("int4_g64", None),
    ]  # fmt: skip
    assert offering(ladder)(Spec("uint4_g64")) == ladder(Spec("uint4_g64"))  # nothing rounds its input anyway


def test_a_larger_budget_never_hurts_and_exceptions_stay_within_one_percent():
    """Card MixDQ, test 4, both parts."""
    found = table(200)
    total = float(found.numel.sum())
    free = choose(found.damage["output"], [Limit(found.bits, 5 * total)])
    assert share(found, free) > 0.5, "without a limit of its own it would be most of them"
    lost = []
    for bits in (4.25, 4.5, 5, 6, 7, 8, 12, 16):
        choice = choose(found.damage["output"], [Limit(found.bits, bits * total), limit_of(found, 0.01)])
        assert of(found.bits, choice) <= bits * total * (1 + 1e-9) and 0 < share(found, choice) <= 0.01
        lost.append(of(found.damage["output"], choice))
    assert lost == sorted(lost, reverse=True) and lost[0] > lost[-1]


def test_two_limits_equal_brute_force():
    found = table(6, 3)
    limits = [Limit(found.bits, 6 * float(found.numel.sum())), limit_of(found, 0.3)]
    choice = choose(found.damage["output"], limits)
    assert of(found.damage["output"], choice) == pytest.approx(
        brute(found.damage["output"], [(limit.cost, limit.most) for limit in limits]), rel=1e-9
    )


def test_decoupled_mixtures_keep_both_limits():
    found, member = table(60, 1), torch.arange(60) % 3 == 0
    most = Limit(found.bits, 6 * float(found.numel.sum()))
    damage = found.damage["output"]
    made = mixtures(damage, damage * 1000, member, found.numel, most, more=[limit_of(found, 0.05)])
    assert len(made) > 1 and made == mixtures(damage, damage, member, found.numel, most, more=[limit_of(found, 0.05)])
    for choice in made:
        assert of(found.bits, choice) <= most.most * (1 + 1e-6) and 0 < share(found, choice) <= 0.05


def test_layers_whose_input_the_recipe_leaves_float_are_no_exceptions():
    found = table(3)
    found.units[0] = Unit("", found.units[0].sites, (Spec("uint4_g64"), None))
    limit = limit_of(found, 1.0)
    assert limit.cost[0].tolist() == [0, 0, 0, 0] and limit.most == sum(map(reads, found.units[1:]))


@pytest.mark.parametrize("exceptions", [0.0, -0.1, 1.5])
def test_shares_that_are_none(exceptions):
    with pytest.raises(ValueError, match="share of the activations"):
        Budget(5, "bits", exceptions=exceptions)


def test_quantize_spends_the_exceptions_on_the_input_with_outliers():
    """One layer reads a channel forty times as large as the others; 4-bit activations lose it, 8 % of them may stay."""
    recipe = Recipe(Spec("int4_g64", "int4_row"), (Rule("*", None, role="outside"), Rule("*", None, role="vector")))
    model, calls = tiny.net(), tiny.net_calls()
    norm = model.blocks[0].norm
    norm.weight.data[3] *= 40
    sites = [site for site in probe(model, calls.calls[0]) if site.role == "inside"]
    total = sum(site.tokens * site.shape[1] for site in sites)
    budget = Budget(4.3, "bits", exceptions=0.25)
    qgen.quantize(model, recipe, calibration=calls, budget=budget, progress=False)
    rows = {row["path"]: row.get("spec") for row in model.qgen_report}
    kept = [site for site in sites if rows[site.path] in ("float", "int4_g64 x float")]
    assert 0 < sum(site.tokens * site.shape[1] for site in kept) <= 0.25 * total
    assert {site.path for site in kept} <= {f"blocks.0.{name}" for name in "qkv"} | {"blocks.0.fc1"}
    assert model.qgen_allocation["reached"]["bits"] <= 4.3
