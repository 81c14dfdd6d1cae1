"""Recipes are data: later rules win, JSON and back, unknown or wrong words are refused with the nearest."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen import Recipe, Rule, Spec, recipes
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.site import Site

SPEC, OTHER = Spec("int4_g64", "int4_g64"), Spec("nvfp4", "nvfp4_dynamic", (Smooth(alphas=(0.5,)), LowRank(16), GPTQ()))


def site(path="blocks.0.ff.fc1", kind="linear", shape=(64, 64), role="inside", after=""):
    return Site(path, kind, "blocks.0", 0, "x", shape, 16, after, role)


@pytest.mark.parametrize(
    "rule, matching, other",
    [
        (Rule("*.ff.*", None), site(), site("blocks.0.attn.q")),
        (Rule("*", None, kind="conv2d"), site(kind="conv2d"), site()),
        (Rule("*", None, kind="conv*"), site(kind="conv3d"), site()),
        (Rule("*", None, role="vector"), site(role="vector"), site()),
        (Rule("*", None, after="*GELU*"), site(after="GELU"), site(after="SiLU")),
        (Rule("*", None, below=32), site(shape=(16, 64)), site(shape=(32, 64))),
        (Rule("*.ff.*", None, kind="linear", role="inside"), site(), site(role="outside")),
        (Rule("blocks.?.FF.*", None), site("blocks.1.FF.x"), site("blocks.1.ff.x")),
    ],
    ids=["path", "kind", "kinds", "role", "after", "below", "all", "case"],
)
def test_a_rule_matches_when_every_condition_does(rule, matching, other):
    assert rule.matches(matching) and not rule.matches(other)


def test_later_rules_win_and_tell_why():
    recipe = Recipe(SPEC, (Rule("*", None, why="first"), Rule("*.ff.*", OTHER, why="second"), Rule("nothing", None)))
    assert recipe.resolve(site()) == (OTHER, "second") and recipe.resolve(site("head")) == (None, "first")
    assert Recipe(SPEC).resolve(site()) == (SPEC, "default") and Recipe(None).spec_for(site()) is None


def test_set_and_skip_return_new_recipes():
    recipe = Recipe(SPEC)
    changed = recipe.set("*.ff.*", act="int8_row").skip("*.fc2", "head")
    assert recipe.rules == () and changed.spec_for(site()) == Spec("int4_g64", "int8_row")
    assert changed.spec_for(site("blocks.0.ff.fc2")) is None and changed.spec_for(site("head")) is None
    assert changed.resolve(site("head"))[1] == "skipped by the user"


def test_set_refuses():
    with pytest.raises(ValueError, match=r"unknown field of Spec 'wieght' \(did you mean 'weight'\?\)"):
        Recipe(SPEC).set("*", wieght="nvfp4")
    with pytest.raises(ValueError, match=r"unknown number format 'nvpf4' \(did you mean 'nvfp4'\?\)"):
        Recipe(SPEC).set("*", weight="nvpf4")
    with pytest.raises(ValueError, match="no default spec"):
        Recipe(None).set("*", act=None)


@pytest.mark.parametrize("name", [n for n in recipes.names() if n != "auto"])
def test_named_recipes_go_to_json_and_back(name):
    recipe = recipes.get(name)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and hash(again) == hash(recipe) and again.to_json() == recipe.to_json() and recipe.about


@pytest.mark.parametrize("name", ["svdquant-int4", "rtn-nvfp4", "w4a8", "w4a8-static", "temporal-int4"])
def test_convolutions_of_unets_have_eight_bits_unless_asked(name):
    recipe = recipes.get(name)
    for path, kind in (
        ("up_blocks.0.resnets.1.conv1", "conv2d"),
        ("output_blocks.3.0.in_layers.2", "conv2d"),
        ("m.temp", "conv3d"),
    ):
        eight, why = recipe.resolve(site(path, kind))
        assert (eight.weight, eight.act) == ("int8_row", "int8_row") and "convolution" in why
        assert recipe.without("conv*").spec_for(site(path, kind)) == recipe.default
    assert eight.bins == (32 if name == "w4a8-static" else 1)  # static scales are fixed by bin in convolutions, too
    assert recipe.spec_for(site("blocks.1.ff.conv_point", "conv2d")) == recipe.default  # Sana's are linear layers
    assert recipe.spec_for(site("conv_in", "conv2d", role="outside")) is None
    assert recipe.spec_for(site("b.conv1", "conv2d", shape=(64, 27))) is None
    assert recipe.spec_for(site()) == recipe.default == recipe.without("conv*").spec_for(site())
    with pytest.raises(ValueError, match=r"unknown kind of layer with a rule of its own 'conv2d'.*conv\*"):
        recipe.without("conv2d")


def test_a_transformer_resolves_as_without_rules_for_convolutions():
    from qgen.probe import static_sites
    from tests import tiny

    for name in ("pixart", "flux", "sana", "wan"):
        for s in static_sites(tiny.FAMILIES[name][0]()):
            for recipe in map(recipes.get, ("svdquant-int4", "rtn-int4", "w4a8")):
                assert recipe.spec_for(s) == recipe.without("conv*").spec_for(s)


def test_everything_goes_to_json_and_back():
    recipe = Recipe(
        OTHER, (Rule("*", SPEC, "linear", "inside", "*GELU*", 32, "because"), Rule("a", None)), "mine", "about"
    )
    assert Recipe.from_json(recipe.to_json(indent=None)) == recipe


def test_auto_is_integer_on_the_cpu():
    auto = recipes.get("auto", torch.device("cpu"))
    assert auto.name == "auto" and auto.default == recipes.get("w4a8").default


def test_unknown_recipe_suggests():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'svdquant-int' \(did you mean 'svdquant-int4'\?\); known: auto"
    ):
        recipes.get("svdquant-int")


GOOD = json.loads(Recipe(OTHER, (Rule("*", SPEC), Rule("a", None))).to_json())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.update(colour="red"), "unknown key of Recipe 'colour'"),
        (lambda d: d["default"].update(weights="nvfp4"), r"unknown key of Spec 'weights' \(did you mean 'weight'\?\)"),
        (lambda d: d["default"].update(weight="nvfp5"), r"unknown number format 'nvfp5' \(did you mean 'nvfp4'\?\)"),
        (lambda d: d["default"].update(weight=4), "weight of Spec is str, found 4"),
        (lambda d: d["default"].update(weight=""), "unknown number format ''"),
        (lambda d: d["default"].pop("weight"), "a Spec needs the key 'weight'"),
        (lambda d: d["default"].update(bins=0), "at least 1 and at most 1024, found bins=0"),
        (lambda d: d["default"].update(bins="many"), "bins of Spec is int, found 'many'"),
        (
            lambda d: d["default"]["methods"][1].update(method="lowrnk"),
            r"unknown method 'lowrnk' \(did you mean 'lowrank'\?\)",
        ),
        (lambda d: d["default"]["methods"][1].update(rank="big"), "rank of LowRank is int, found 'big'"),
        (lambda d: d["default"]["methods"][1].update(size=3), "unknown key of LowRank 'size'"),
        (lambda d: d["default"]["methods"].append("gptq"), "a method is a JSON object with its name"),
        (lambda d: d["default"].update(methods=3), "methods of Spec is .*tuple.*, found 3"),
        (lambda d: d["rules"][0].pop("pattern"), "a Rule needs the key 'pattern'"),
        (lambda d: d["rules"][0].update(spec="int4"), "spec of Rule is .* found 'int4'"),
        (lambda d: d["rules"].append(7), "rules of Recipe is .* found"),
        (lambda d: d["rules"][1].update(below=None), "below of Rule is int, found None"),
    ],
)
def test_wrong_json_is_one_readable_line(change, words):
    data = json.loads(json.dumps(GOOD))
    change(data)
    with pytest.raises(ValueError, match=words):
        Recipe.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"rtn"', "NaN"])
def test_what_is_no_recipe_at_all(text):
    with pytest.raises(ValueError, match="JSON"):
        Recipe.from_json(text)


_leaves = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.sampled_from(["int4_g64", "*", "lowrank"])
)
_values = st.recursive(
    _leaves, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_json_of_strangers_gives_a_recipe_or_a_value_error(data):
    """Any one place of a good recipe replaced by anything."""
    tree = json.loads(json.dumps(GOOD))
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
        else:
            break
    node[key] = data.draw(_values)
    try:
        recipe = Recipe.from_json(json.dumps(tree))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.from_json(recipe.to_json()) == recipe
