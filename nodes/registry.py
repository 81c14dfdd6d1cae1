"""The nodes, from one plain description each: ComfyUI's V3 interface where this ComfyUI has it, else V1.

To add a node, add a file to this folder that registers a `Node`; nothing else changes:

    def run(model, strength): return (changed(model, strength),)       # logic: a plain function, one value per output

    registry.register(Node("QGenThing", "Thing (qgen)", "What it does.", run=run, needs=("diffusers",),
        inputs=(Input("model", "MODEL", "What goes in."), Input("strength", "FLOAT", "How much.", default=1.0, low=0.0, high=2.0)),
        outputs=(Output("MODEL", "model", "What comes out."),), search=("other", "words")))

Files are imported in alphabetical order when ComfyUI asks, so their top level may import torch and qgen's light parts only; everything
else goes inside functions. A node is hidden, with one line in the log, if a package of `needs` is absent or its file cannot be imported.
`run` may return `Result(values, ui)` to show something; it raises errors as they are, ComfyUI shows their text at the node. Kinds of
inputs: "COMBO" (choices: a tuple, or a function that ComfyUI calls each time it lists the node), "INT", "FLOAT", "BOOLEAN", "STRING", or
the name of anything that travels along a link ("MODEL", "LATENT", …). `check(name, …)` takes the inputs that it names before a prompt is
queued and returns True or what is wrong; `changed(name, …)` returns what stands for the outside world, such as a file's time.
Help pages lie in nodes/web/docs/<id>.md. `offer()` gives the module-level names that ComfyUI looks for: V3's or V1's, never both.
"""

__all__ = ["CATEGORY", "Input", "Node", "Output", "Result", "nodes", "register"]

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

log = logging.getLogger("qgen")
CATEGORY = "qgen"
WIDGETS = ("COMBO", "INT", "FLOAT", "BOOLEAN", "STRING")


@dataclass(frozen=True)
class Input:
    """One input. low, high, step: of numbers. choices: of a "COMBO". advanced: shown when unfolded. multiline: of a "STRING". rolls: of an
    INT called seed, whether the front end may draw a new one after each run: not where that would do long work again."""

    name: str
    kind: str
    tip: str
    default: Any = None
    choices: tuple[str, ...] | Callable[[], list[str]] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    optional: bool = False
    advanced: bool = False
    multiline: bool = False
    rolls: bool = False

    def options(self) -> list[str]:
        """The choices of a "COMBO" now."""
        return list(self.choices() if callable(self.choices) else self.choices)

    @property
    def control(self) -> bool | None:
        """`control_after_generate` in ComfyUI's words. Left out (None), the front end rolls whatever is called seed."""
        return self.rolls if self.kind == "INT" and self.name == "seed" else None

    def widget(self) -> dict[str, Any]:
        """Options of the widget that are set, in V1's words."""
        told = {"default": self.default, "min": self.low, "max": self.high, "step": self.step}
        told |= {"control_after_generate": self.control}
        told |= {"tooltip": self.tip, "advanced": self.advanced or None, "multiline": self.multiline or None}
        return {key: value for key, value in told.items() if value is not None}


@dataclass(frozen=True)
class Output:
    """One output: its kind, its name and what it is."""

    kind: str
    name: str
    tip: str


@dataclass(frozen=True)
class Result:
    """Values of the outputs, and what the node shows, in ComfyUI's words: {"text": [...]} or {"images": [...]}."""

    values: tuple[Any, ...] = ()
    ui: dict[str, Any] | None = None


@dataclass(frozen=True)
class Node:
    """One node. id: for ever. ends: whether it runs without anybody using its outputs. needs: packages beyond torch and ComfyUI's own."""

    id: str
    title: str
    about: str
    run: Callable[..., Any]
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...] = ()
    search: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    ends: bool = False
    experimental: bool = False
    category: str = CATEGORY
    check: Callable[..., bool | str] | None = None
    changed: Callable[..., Any] | None = None


_found: dict[str, Node] = {}


def register(node: Node) -> Node:
    """Adds a node and returns it. ValueError if another one has its id."""
    if node.id in _found and _found[node.id].run.__qualname__ != node.run.__qualname__:
        raise ValueError(f"two nodes are called {node.id!r}; ids are for ever, give the new one another")
    _found[node.id] = node
    return node


def nodes() -> list[Node]:
    """All nodes whose parts are there, by id. Says once for each hidden one why it is hidden."""
    package = importlib.import_module("qgen.nodes")
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        try:
            importlib.import_module(f"qgen.nodes.{name}")
        except ImportError as error:
            log.warning("the nodes of %s.py are hidden: %s", name, error)
    shown = []
    for node in sorted(_found.values(), key=lambda node: node.id):
        absent = [package for package in node.needs if not _there(package)]
        if absent:
            log.warning(
                "node %r is hidden: it needs %s (pip install %s)", node.title, ", ".join(absent), " ".join(absent)
            )
        else:
            shown.append(node)
    return shown


def _there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a parent package is absent, or something put an unfinished module there
        return False


def _values(node: Node, made: Any) -> Result:
    made = made if isinstance(made, Result) else Result(tuple(made or ()))
    if len(made.values) != len(node.outputs):
        raise RuntimeError(
            f"{node.id} has {len(node.outputs)} outputs, its function returned {len(made.values)} values"
        )
    return made


def _with_class(function: Callable) -> classmethod:
    """The function as a class method whose signature still names its arguments: ComfyUI passes what it sees there."""

    def call(cls, *args, **kwargs):
        return function(*args, **kwargs)

    first = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    call.__signature__ = inspect.Signature([first, *inspect.signature(function).parameters.values()])
    call.__name__ = function.__name__
    return classmethod(call)


def _of_all(function: Callable) -> classmethod:
    """The function as a class method that is told every input and passes on those that it names, as ComfyUI calls what tells of changes."""
    names = inspect.signature(function).parameters

    def call(cls, **inputs):
        return function(**{name: value for name, value in inputs.items() if name in names})

    return classmethod(call)


def v1(node: Node) -> type:
    """The class that V1 of ComfyUI's interface wants."""

    def input_types(cls) -> dict[str, dict[str, tuple]]:
        listed: dict[str, dict[str, tuple]] = {"required": {}, "optional": {}}
        for one in node.inputs:
            kind = one.options() if one.kind == "COMBO" else one.kind
            listed["optional" if one.optional else "required"][one.name] = (kind, one.widget())
        return listed

    def execute(self, **inputs) -> Any:
        made = _values(node, node.run(**inputs))
        return made.values if made.ui is None else {"ui": made.ui, "result": made.values}

    members = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(out.kind for out in node.outputs),
        "RETURN_NAMES": tuple(out.name for out in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(out.tip for out in node.outputs),
        "FUNCTION": "execute",
        "CATEGORY": node.category,
        "DESCRIPTION": node.about,
        "SEARCH_ALIASES": list(node.search),
        "OUTPUT_NODE": node.ends,
        "EXPERIMENTAL": node.experimental,
        "execute": execute,
    }
    if node.check:
        members["VALIDATE_INPUTS"] = _with_class(node.check)
    if node.changed:
        members["IS_CHANGED"] = _of_all(node.changed)
    return type(node.id, (), members)


def v3(node: Node, io: Any) -> type:
    """The class that V3 wants. io: `comfy_api.latest.io`."""

    def input_of(one: Input) -> Any:
        told = {"tooltip": one.tip, "optional": one.optional}
        if one.kind not in WIDGETS:
            return io.Custom(one.kind).Input(one.name, **told)
        told |= {"default": one.default, "advanced": one.advanced or None}
        if one.kind == "COMBO":
            return io.Combo.Input(one.name, options=one.options(), **told)
        if one.kind in ("INT", "FLOAT"):
            number = io.Int if one.kind == "INT" else io.Float
            told |= {"control_after_generate": one.control} if one.kind == "INT" else {}
            return number.Input(one.name, min=one.low, max=one.high, step=one.step, **told)
        if one.kind == "BOOLEAN":
            return io.Boolean.Input(one.name, **told)
        return io.String.Input(one.name, multiline=one.multiline, **told)

    def define_schema(cls) -> Any:
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=node.category,
            description=node.about,
            inputs=[input_of(one) for one in node.inputs],
            outputs=[io.Custom(o.kind).Output(display_name=o.name, tooltip=o.tip) for o in node.outputs],
            search_aliases=list(node.search),
            is_output_node=node.ends,
            is_experimental=node.experimental,
        )

    def execute(cls, **inputs) -> Any:
        made = _values(node, node.run(**inputs))
        return io.NodeOutput(*made.values, ui=made.ui)

    members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if node.check:
        members["validate_inputs"] = _with_class(node.check)
    if node.changed:
        members["fingerprint_inputs"] = _of_all(node.changed)
    return type(node.id, (io.ComfyNode,), members)


def offer() -> dict[str, Any]:
    """The names that ComfyUI looks for in a node pack."""
    try:
        from comfy_api.latest import ComfyExtension, io
    except ImportError:
        found = nodes()
        mappings = {node.id: v1(node) for node in found}
        return {"NODE_CLASS_MAPPINGS": mappings, "NODE_DISPLAY_NAME_MAPPINGS": {n.id: n.title for n in found}}

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [v3(node, io) for node in nodes()]

    async def comfy_entrypoint() -> ComfyExtension:
        return Extension()

    return {"comfy_entrypoint": comfy_entrypoint}


_OFFERS = ("comfy_entrypoint", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")


def __getattr__(name: str) -> Any:
    """The offers, made when ComfyUI first asks: node files import this module, so its own import must not import them."""
    if name in _OFFERS:
        offers = offer()
        globals().update(offers)
        if name in offers:
            return offers[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
