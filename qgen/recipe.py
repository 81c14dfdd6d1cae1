"""Spec, Rule, Recipe: what goes where, as frozen data that is JSON and back.

A recipe is a default Spec and rules; later rules win. A rule matches a site by a glob on its path, by kind, and by the layer's shape.
Nothing here runs anything: print a recipe, diff it, keep it in a checkpoint's header.
"""

__all__ = ["Recipe", "Rule", "Spec"]

import fnmatch
import json
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from qgen import formats
from qgen.errors import unknown
from qgen.registry import Registry
from qgen.site import Site

methods: Registry[type] = Registry("method", "qgen.methods")


@dataclass(frozen=True)
class Spec:
    """How one layer is quantized. weight, act: names of number formats (act None = activations stay float).

    methods: in the order in which they refine the draft. bins: timestep bins of activation parameters. share: what layers that read one
    input have in common: nothing (False, each is best by itself); "smoothing" and all else that is done to the input, so that it is
    quantized once for all of them; or True, the low-rank input as well, in one draft, as fused kernels and Nunchaku's files want.
    split: whether a layer that was seen to read a concatenation (a UNet's shortcut) becomes one layer for each of its parts, where that
    lowers the error; such a layer takes no LoRA. It is seen when `qgen.quantize` has calls to run.
    """

    weight: str
    act: str | None = None
    methods: tuple[Any, ...] = ()
    bins: int = 1
    share: bool | str = False
    split: bool = False

    def __post_init__(self) -> None:
        formats.get(self.weight)
        if self.act:
            formats.get(self.act)
        if not 1 <= self.bins <= 1024:
            raise ValueError(f"bins of timesteps are at least 1 and at most 1024, found bins={self.bins}")

        if self.share not in (False, True, "smoothing"):
            raise ValueError(f'layers share nothing (False), "smoothing", or all (True), found share={self.share!r}')

    def __str__(self) -> str:
        return f"{self.weight} x {self.act or 'float'}"

    def to_dict(self) -> dict:
        listed = [{"method": m.name, **asdict(m)} for m in self.methods]
        data = {"weight": self.weight, "act": self.act, "methods": listed, "bins": self.bins, "share": self.share}
        return {**data, "split": True} if self.split else data

    @classmethod
    def from_dict(cls, data: dict) -> "Spec":
        _check_keys(cls, data)
        return cls(**{**data, "methods": tuple(_method(m) for m in data.get("methods", ()))})


@dataclass(frozen=True)
class Rule:
    """`spec` (None = keep float) for the sites that match every condition.

    pattern: glob on the path. kind: glob on the site's kind, "linear", "conv2d" or "conv*". role: of the site, see `Site`. after: glob on
    the class of the module that made the input ("*GELU*"). below: K or N smaller than this. why: shown in the report.
    """

    pattern: str
    spec: Spec | None
    kind: str | None = None
    role: str | None = None
    after: str | None = None
    below: int = 0
    why: str = ""

    def matches(self, site: Site) -> bool:
        return (
            fnmatch.fnmatchcase(site.path, self.pattern)
            and (self.kind is None or fnmatch.fnmatchcase(site.kind, self.kind))
            and self.role in (None, site.role)
            and (self.after is None or fnmatch.fnmatchcase(site.after, self.after))
            and (not self.below or min(site.shape) < self.below)
        )

    def to_dict(self) -> dict:
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "spec": self.spec and self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: dict) -> "Rule":
        _check_keys(cls, data)
        return cls(**{**data, "spec": data["spec"] and Spec.from_dict(data["spec"])})


@dataclass(frozen=True)
class Recipe:
    """What goes where. `name` is a label; `default` serves what no rule matches (None = keep float)."""

    default: Spec | None
    rules: tuple[Rule, ...] = ()
    name: str = "custom"
    about: str = ""

    def resolve(self, site: Site) -> tuple[Spec | None, str]:
        """The spec for a site and the reason: the last rule that matches, or the default."""
        for rule in reversed(self.rules):
            if rule.matches(site):
                return rule.spec, rule.why or f"rule {rule.pattern}"
        return self.default, "default"

    def spec_for(self, site: Site) -> Spec | None:
        """The spec for a site; None = stays float."""
        return self.resolve(site)[0]

    def set(self, pattern: str, why: str = "", **changes: Any) -> "Recipe":
        """A new recipe whose sites matching `pattern` use the default spec with `changes`, e.g. `set("*.ff.*", act="int8_row")`."""
        if self.default is None:
            raise ValueError("this recipe has no default spec to change; add a Rule with a whole Spec")
        unknown_keys = set(changes) - {f.name for f in fields(Spec)}
        if unknown_keys:
            raise ValueError(unknown("field of Spec", unknown_keys.pop(), [f.name for f in fields(Spec)]))
        return replace(self, rules=(*self.rules, Rule(pattern, replace(self.default, **changes), why=why)))

    def skip(self, *patterns: str, why: str = "skipped by the user") -> "Recipe":
        """A new recipe that keeps the sites matching any pattern in float."""
        return replace(self, rules=(*self.rules, *(Rule(p, None, why=why) for p in patterns)))

    def without(self, *kinds: str) -> "Recipe":
        """A new recipe without the rules for these kinds: after `without("conv*")` convolutions are treated as linear layers are.

        ValueError if there is no rule for a kind.
        """
        known = sorted({rule.kind for rule in self.rules if rule.kind})
        for kind in kinds:
            if kind not in known:
                raise ValueError(unknown("kind of layer with a rule of its own", kind, known))
        return replace(self, rules=tuple(rule for rule in self.rules if rule.kind not in kinds))

    def to_json(self, indent: int | None = 2) -> str:
        data = {"name": self.name, "about": self.about, "default": self.default and self.default.to_dict()}
        return json.dumps({**data, "rules": [r.to_dict() for r in self.rules]}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of `to_json`; ValueError for unknown keys, formats or methods, each with the nearest known name."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a recipe is JSON, and this is not: {error}") from None
        _check_keys(cls, data)
        rules = tuple(Rule.from_dict(r) for r in data.get("rules", ()))
        return cls(**{**data, "default": data.get("default") and Spec.from_dict(data["default"]), "rules": rules})


def _method(data: dict) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise ValueError(f"a method is a JSON object with its name under 'method', found {data!r}")
    data = dict(data)
    kind = methods[data.pop("method")]
    if not is_dataclass(kind):
        raise TypeError(f"method {kind} must be a dataclass to live in a recipe")
    _check_keys(kind, data)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _check_keys(kind: type, data: Any) -> None:
    """ValueError unless `data` is an object with the keys of the dataclass `kind`, each of its type. Files from strangers come this way."""
    if not isinstance(data, dict):
        raise ValueError(f"a {kind.__name__} is a JSON object, found {data!r}")
    known, types = {f.name: f for f in fields(kind)}, get_type_hints(kind)
    for key, value in data.items():
        if key not in known:
            raise ValueError(unknown(f"key of {kind.__name__}", key, known))
        if not _fits(value, types[key]):
            raise ValueError(
                f"{key} of {kind.__name__} is {getattr(types[key], '__name__', types[key])}, found {value!r}"
            )
    for key, f in known.items():
        if key not in data and f.default is MISSING and f.default_factory is MISSING and key != "default":
            raise ValueError(f"a {kind.__name__} needs the key {key!r}, found {', '.join(data) or 'none'}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value can stand for a field annotated with `kind`."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if is_dataclass(kind):
        return isinstance(value, dict)
    return isinstance(value, kind) if isinstance(kind, type) and kind is not Any else True
