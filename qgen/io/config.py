"""QGenConfig: what `from_pretrained(..., quantization_config=...)` takes, in diffusers and in transformers, and what config.json holds.

One class serves both libraries. They ask for `quant_method` (a member of an Enum), `to_dict` and `from_dict`, not for a base class.
"""

__all__ = ["DATA_FREE", "QGenConfig", "QGenMethod"]

import json
from collections.abc import Iterable
from enum import Enum
from typing import Any

from qgen.errors import unknown
from qgen.recipe import Recipe

DATA_FREE = "rtn-w4a16"


class QGenMethod(str, Enum):
    """The name under which both libraries know us; they read its `.value`."""

    QGEN = "qgen"


class QGenConfig:
    """Quantize while loading 16-bit weights, without calibration.

    Arguments:
        recipe: name of a recipe, a Recipe, or one as a dictionary. It must be data-free: for others use `qgen.quantize`. The default,
            "rtn-w4a16", rounds weights to 4 bits in blocks of 64 and keeps activations in 16 bits.
        skip: globs of module paths that stay float.

    ValueError for an unknown recipe or field.
    """

    def __init__(self, recipe: str | Recipe | dict = DATA_FREE, skip: Iterable[str] = ()):
        self.quant_method = QGenMethod.QGEN
        recipe = _recipe(recipe)
        skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self.recipe = recipe.skip(*skip) if skip else recipe

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `skip` has become rules of the recipe."""
        return {"quant_method": self.quant_method.value, "recipe": json.loads(self.recipe.to_json())}

    @classmethod
    def from_dict(cls, data: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`."""
        data = {key: value for key, value in data.items() if key != "quant_method"}
        for key in data:
            if key not in ("recipe", "skip"):
                raise ValueError(unknown("field of QGenConfig", key, ("recipe", "skip")))
        config = cls(**data)
        return (config, kwargs) if return_unused_kwargs else config

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Both libraries offer what `from_pretrained` was given; nothing of it is ours. Returns what was not used."""
        return kwargs

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QGenConfig) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"QGenConfig(recipe={self.recipe.name!r})"


def _recipe(recipe: str | Recipe | dict) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_json(json.dumps(recipe))
    if isinstance(recipe, str):
        from qgen import recipes

        return recipes.get(recipe)
    raise ValueError(f"recipe must be a name, a Recipe or a dictionary, found {type(recipe).__name__}")
