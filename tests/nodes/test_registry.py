"""The mechanism of the nodes, without ComfyUI: V1 classes, hidden nodes, what the nodes say, how long the pack takes to load."""

import inspect
import json
import logging
import subprocess
import sys

import pytest

from qgen.nodes import registry
from qgen.nodes.registry import Input, Node, Output, Result
from tests.nodes.graphs import ROOT


def add(a, b=1):
    return (a + b,)


def node(**changes):
    told = {"id": "QGenTestAdd", "title": "Add", "about": "Adds.", "run": add}
    told |= {
        "inputs": (Input("a", "INT", "First.", default=2, low=0, high=9), Input("b", "INT", "Second.", optional=True))
    }
    return Node(**(told | {"outputs": (Output("INT", "sum", "Both."),)} | changes))


def test_v1_says_what_comfyui_asks_for():
    made = registry.v1(node(check=lambda a: a < 5 or "a: too large"))
    assert made.INPUT_TYPES() == {
        "required": {"a": ("INT", {"default": 2, "min": 0, "max": 9, "tooltip": "First."})},
        "optional": {"b": ("INT", {"tooltip": "Second."})},
    }
    assert (made.RETURN_TYPES, made.RETURN_NAMES, made.OUTPUT_TOOLTIPS) == (("INT",), ("sum",), ("Both.",))
    assert getattr(made(), made.FUNCTION)(a=3, b=4) == (7,)
    assert inspect.getfullargspec(made.VALIDATE_INPUTS).args == ["cls", "a"]  # ComfyUI passes what it finds there
    assert made.VALIDATE_INPUTS(a=3) is True and made.VALIDATE_INPUTS(a=7) == "a: too large"


def test_results_may_show_something_and_must_fit_the_outputs():
    shown = registry.v1(node(run=lambda a: Result((a,), {"text": ["x"]})))
    assert shown().execute(a=1) == {"ui": {"text": ["x"]}, "result": (1,)}
    with pytest.raises(RuntimeError, match="1 outputs, its function returned 2"):
        registry.v1(node(run=lambda a: (a, a)))().execute(a=1)


def test_what_tells_of_changes_is_told_every_input_and_reads_its_own():
    made = registry.v1(node(changed=lambda a: a * 2))
    assert made.IS_CHANGED(a=3, b=4) == 6  # ComfyUI passes all inputs of the node


def test_choices_are_asked_for_each_time_the_node_is_listed():
    now = ["one"]
    made = registry.v1(node(inputs=(Input("a", "COMBO", "Which.", choices=lambda: now),)))
    assert made.INPUT_TYPES()["required"]["a"][0] == ["one"]
    now.append("two")
    assert made.INPUT_TYPES()["required"]["a"][0] == ["one", "two"]


def test_a_node_without_its_package_is_hidden_with_one_line(monkeypatch, caplog):
    registry.nodes()
    monkeypatch.setattr(registry, "_found", {"A": node(id="A", needs=("no_such_package_here",)), "B": node(id="B")})
    with caplog.at_level(logging.WARNING, "qgen"):
        assert [n.id for n in registry.nodes()] == ["B"]
    assert [r.getMessage() for r in caplog.records if "'Add' is hidden" in r.getMessage()] == [
        "node 'Add' is hidden: it needs no_such_package_here (pip install no_such_package_here)"
    ]


def test_two_nodes_may_not_share_an_id(monkeypatch):
    monkeypatch.setattr(registry, "_found", {})
    registry.register(node())
    registry.register(node())  # the same file, executed again
    with pytest.raises(ValueError, match="QGenTestAdd"):
        registry.register(node(run=lambda a: (a,)))


def test_every_node_names_all_that_its_function_takes():
    for found in registry.nodes():
        names = [one.name for one in found.inputs]
        assert len(set(names)) == len(names) and all(one.tip for one in (*found.inputs, *found.outputs)), found.id
        parameters = inspect.signature(found.run).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert set(names) == set(parameters), found.id
        for function in (found.check, found.changed):
            assert function is None or set(inspect.signature(function).parameters) <= set(names), found.id


def test_loading_takes_torch_alone_and_little_time():
    """In a Python of its own, where every optional package is out of reach."""
    code = f"""
import sys, time, json, importlib.abc
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"diffusers", "transformers", "triton", "gradio", "peft", "comfy", "comfy_api", "folder_paths"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import torch
sys.meta_path.insert(0, Without())
from importlib.util import module_from_spec, spec_from_file_location
start = time.process_time()
spec = spec_from_file_location("qgen", {str(ROOT / "qgen" / "__init__.py")!r}, submodule_search_locations=[{str(ROOT / "qgen")!r}])
sys.modules["qgen"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["qgen"])
from qgen.nodes import registry
offers = registry.offer()
print(json.dumps([sorted(offers["NODE_CLASS_MAPPINGS"]), time.process_time() - start]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, seconds = json.loads(done.stdout.splitlines()[-1])
    assert {"QGenQuantizeModel", "QGenSaveModel", "QGenLoadModel", "QGenAttention"} <= set(shown)
    assert "QGenLoadPipeline" not in shown  # it needs diffusers
    assert seconds < 1.0, seconds  # of processor time; 0.4 s were measured
