"""A number format and a method of one's own: one file each, a decorator, and they work through `quantize` and a recipe's JSON.

The two files are written into a folder and imported by name, as somebody else's package would be; nothing else is edited.
"""

import importlib
import sys

import pytest
import torch

import qgen
from qgen import Recipe, formats
from qgen.methods import methods
from tests import tiny

FORMAT = '''
"""Balanced quinary digits: -2..2 on a curve, three bits wasted; a block of 16."""

from qgen.formats import Element, NumberFormat
from qgen.formats.base import formats

GRID = (0.0, 1.0, 2.0, 4.0, 7.0, float("nan"), float("nan"), float("nan"), -0.0, -1.0, -2.0, -4.0, -7.0) + (float("nan"),) * 3
CURVE = formats.add("toy_curve", NumberFormat("toy_curve", Element("toy_curve", 4, GRID), 16))
'''

METHOD = '''
"""Rounds with a range that is a little too small."""

from dataclasses import dataclass, replace
from typing import ClassVar

from qgen.recipe import methods


@methods.register("toy-squeeze")
@dataclass(frozen=True)
class Squeeze:
    name: ClassVar[str] = "toy-squeeze"
    by: float = 0.9

    def needs(self, site):
        return frozenset()

    def refine(self, draft, stats):
        return replace(draft, clip=self.by, qweight=None).noted(squeezed=self.by)
'''

RECIPE = """{"name": "toy", "default": {"weight": "toy_curve", "act": "toy_curve", "methods": [{"method": "toy-squeeze", "by": 0.8}]},
 "rules": [{"pattern": "2", "spec": {"weight": "int4_g32", "methods": [{"method": "toy-squeeze"}]}}]}"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somebody")
    (folder / "somebodys_format.py").write_text(FORMAT)
    (folder / "somebodys_method.py").write_text(METHOD)
    sys.path.insert(0, str(folder))
    known = dict(formats.formats._items), dict(methods._items)
    yield importlib.import_module("somebodys_format"), importlib.import_module("somebodys_method")
    sys.path.remove(str(folder))
    formats.formats._items, methods._items = known


def test_a_recipe_in_json_finds_both(toys):
    recipe = Recipe.from_json(RECIPE)
    assert recipe.default.methods == (toys[1].Squeeze(0.8),) and Recipe.from_json(recipe.to_json()) == recipe


def test_quantize_uses_both(toys):
    model = tiny.plain()
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    qgen.quantize(model, Recipe.from_json(RECIPE), progress=False)
    first, second = model.qgen_report
    assert (
        first["spec"] == "toy_curve x toy_curve"
        and first["log"]["squeezed"] == 0.8
        and second["log"]["squeezed"] == 0.9
    )
    grid = torch.tensor([0.0, 1, 2, 4, 7])
    grid = torch.cat([-grid.flip(0), grid])
    scale = (weight.unflatten(1, (4, 16)).abs().amax(-1) * 0.8 / 7).bfloat16().float()[..., None]
    nearest = grid[(weight.unflatten(1, (4, 16)) / scale)[..., None].sub(grid).abs().argmin(-1)]
    assert torch.allclose(model[0].dequantize(torch.float32), (nearest * scale).flatten(1), atol=1e-6)
    x = torch.randn(5, 64)
    want = formats.get("toy_curve").fake(x) @ (nearest * scale).flatten(1).T + bias
    assert (model[0](x) - want).norm() / want.norm() < 0.02


def test_it_is_saved_and_loaded_like_any_other(toys, tmp_path):
    model = qgen.quantize(tiny.plain(), Recipe.from_json(RECIPE), progress=False)
    state = model.state_dict()
    twin = qgen.quantize(tiny.plain(), Recipe.from_json(RECIPE), progress=False)
    twin.load_state_dict(state)
    x = torch.randn(2, 3, 64)
    assert torch.equal(twin(x), model(x))


def test_misspelt_it_is_suggested(toys):
    with pytest.raises(ValueError, match=r"unknown method 'toy-sqeeze' \(did you mean 'toy-squeeze'\?\)"):
        Recipe.from_json(RECIPE.replace("toy-squeeze", "toy-sqeeze", 1))
    with pytest.raises(ValueError, match=r"unknown number format 'toy_curv' \(did you mean 'toy_curve'\?\)"):
        Recipe.from_json(RECIPE.replace("toy_curve", "toy_curv", 1))


def test_a_name_that_is_taken_is_refused(toys):
    with pytest.raises(ValueError, match="number format 'int4_g64' is registered already"):
        formats.formats.add("int4_g64", formats.get("toy_curve"))
    with pytest.raises(ValueError, match="method 'gptq' is registered already"):
        methods.register("gptq")(toys[1].Squeeze)
