"""Recipes named after published methods: their methods help on a small model, and files keep what they made, bit for bit."""

from dataclasses import replace

import pytest
import torch

import qgen
from qgen import recipes
from qgen.recipe import Recipe
from tests import tiny

NAMES = [
    "vidit-q",
    "fp4dit",
    "signround",
    "vq4dit",
    "genie",
    "binarydm",
    "fp-search",
    "repquant",
    "dgq",
    "tfmq",
    "mixdq",
]


def quantized(recipe):
    make, call = tiny.FAMILIES["pixart"]
    return qgen.quantize(make(), recipe, calibration=[call(seed) for seed in range(6)], progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_methods_help_where_they_are_kept_and_files_keep_every_bit(name, tmp_path):
    recipe = recipes.get(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    model = quantized(recipe)
    plain = quantized(replace(recipe, default=replace(recipe.default, methods=())))
    logs = [row["log"].get(recipe.default.methods[-1].name) for row in model.qgen_report if row.get("log")]
    kept = sum(not said.startswith("dropped") for said in logs if said)
    # Random weights are uniform, which int4 likes best: a rotation makes them Gaussian, and is rightly dropped.
    assert kept == 0 if name == "vidit-q" else kept > len(logs) / 2
    lost = plain.qgen_report[-1]["sqnr_db"] - model.qgen_report[-1]["sqnr_db"]
    assert lost < 0.2, "with random weights layers gain and the whole may not"
    make, call = tiny.FAMILIES["pixart"]
    qgen.save(model, tmp_path / "m")
    back = qgen.load(tmp_path / "m", into=make())
    with torch.no_grad():
        assert torch.equal(call(9).run(back)[0], call(9).run(model)[0])
