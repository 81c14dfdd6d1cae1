"""Sections over timesteps: well-formed, escaped, and empty where there is nothing to show."""

import xml.etree.ElementTree as xml

import pytest
import torch
from torch import nn

from qgen.nn import QuantLinear, clock
from qgen.nn.packed import Layout
from qgen.show.timesteps import ranges, trajectory


def layer(steps, edges):
    slots = ("act_scale", "t_edges", "t_scale", "t_bias")
    made = QuantLinear(64, 32, Layout("int4_g64", "int8_row", slots=slots, bins=len(steps)), torch.float32)
    slots = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in made.slots().items()}
    made.fill({**slots, "t_scale": torch.tensor(steps), "t_edges": torch.tensor(edges)})
    return made


def test_strips_are_cut_at_the_edges_and_darkest_at_the_largest():
    module = nn.Sequential(layer([1.0, 4.0, 2.0, 3.0], [250.0, 500.0]))
    clock.wind(module)
    page = ranges(module)
    cells = [node for node in xml.fromstring(page).iter() if node.tag == "rect"]
    assert [float(c.get("width")) for c in cells] == [75.0, 75.0, 150.0]
    assert [float(c.get("fill-opacity")) for c in cells] == [0.28, 0.95, 0.5]
    assert ranges(nn.Sequential(nn.Linear(4, 4))) == ""


def test_curves_are_drawn_as_the_rows_they_stand_for():
    """Two curves over four bins, of which the last moves the input: by 1, 2, 0, 4 times a row of RMS 3."""
    slots = ("t_edges", "t_mix", "t_shift", "t_bias")
    made = QuantLinear(64, 32, Layout("int4_g64", "uint4_g64", slots=slots, bins=5, mix=2, moved=1), torch.float32)
    found = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in made.slots().items()}
    assert found["t_shift"].shape == (1, 64) and found["t_bias"].shape == (2, 32) and found["t_mix"].shape == (5, 2)
    mix = torch.tensor([[9.0, 1.0], [7.0, -2.0], [5.0, 0.0], [3.0, 4.0], [1.0, 100.0]])
    made.fill(
        {**found, "t_mix": mix, "t_shift": torch.full((1, 64), 3.0), "t_edges": torch.tensor([250.0, 500.0, 750.0])}
    )
    module = nn.Sequential(made)
    clock.wind(module)
    page = ranges(module)
    cells = [node for node in xml.fromstring(page).iter() if node.tag == "rect"]
    assert [float(c.get("width")) for c in cells] == [75.0] * 4
    assert [float(c.get("fill-opacity")) for c in cells] == [0.28, 0.5, 0.05, 0.95]
    assert "centre 0 to 12" in page


def test_lines_of_errors():
    page = trajectory({"<blind>": [0.01, 0.1], "aware": [0.01, 0.05]})
    root = xml.fromstring(page)
    points = [
        [tuple(map(float, p.split(","))) for p in n.get("points").split()] for n in root.iter() if n.tag == "polyline"
    ]
    assert points[0][0] == points[1][0] and points[0][1][1] < points[1][1][1]  # a larger error is higher up
    assert "&lt;blind&gt;" in page and "<blind>" not in page
    assert trajectory({}) == "" and trajectory({"exact": [0.0, 0.0]}) == ""
    with pytest.raises(ValueError, match="finite"):
        trajectory({"bad": [float("nan")]})
