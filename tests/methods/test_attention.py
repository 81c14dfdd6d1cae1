"""The adaptive choice of attention: measured errors, the budget, first and last steps, forced modes, refusals, the summary."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgen
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.engine import record
from qgen.errors import BadData
from qgen.kernels.attention_reference import attention_float
from qgen.methods.attention import AttentionSpec, as_spec, choose, quantize_attention
from qgen.nn.attention import remove
from tests.tiny import FAMILIES, calls


class Layer(nn.Module):
    """Attention whose keys carry an offset that moves with the timestep, per channel: smoothing takes it out, softmax does not see it."""

    def __init__(self, sharp=1.0):
        super().__init__()
        self.sharp = sharp
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.seen = []

    def forward(self, x, timestep):
        q, k, v = (f(x).unflatten(-1, (2, 32)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = q * self.sharp * (1 + timestep.reshape(-1)[0] / 100)
        out = F.scaled_dot_product_attention(q, k, v)
        self.seen.append((q, k, v, out))
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, sharps=(1.0, 8.0)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(s) for s in sharps)

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states, timestep)
        return hidden_states


def recorded(samples=3, steps=10):
    g = torch.Generator().manual_seed(1)
    made = [
        Call((torch.randn(1, 70, 64, generator=g) * 2, torch.tensor([100.0 * t])), {}, Moment(s, steps - t, 100.0 * t))
        for s in range(samples)
        for t in range(steps)
    ]
    return CalibrationSet(tuple(made))


@pytest.fixture
def model():
    return Model().eval().requires_grad_(False)


@pytest.mark.parametrize("budget", [0.004, 0.01, 0.02, 0.05])
def test_no_call_is_worse_than_the_budget(model, budget):
    """Every attention of every recorded call, against float64 computed here."""
    found = recorded()
    spec = AttentionSpec("auto", budget=budget, calls=len(found.calls))
    quantize_attention(model, spec, found)
    worst = 0.0
    for call in found.calls:
        for block in model.blocks:
            block.seen.clear()
        call.run(model)
        for block in model.blocks:
            q, k, v, out = block.seen[0]
            want = attention_float(q.double(), k.double(), v.double())[0]
            worst = max(worst, float((out - want).norm() / want.norm()))
    assert worst <= budget  # errors were measured with the layers before in float: hence the margin


def test_the_budget_moves_the_choice_by_layer_and_timestep(model):
    sizes = {}
    for budget in (1e-6, 0.008, 0.02, 1.0):
        choices, _ = choose(model, AttentionSpec("auto", budget=budget), recorded())
        sizes[budget] = choices
    assert sizes[1e-6].layers == {}
    cheapest = ("", *["int8_fp8"] * 4, "")
    assert sizes[1.0].layers == dict.fromkeys(("blocks.0", "blocks.1"), cheapest)
    middle = {s for layer in (*sizes[0.008].layers.values(), *sizes[0.02].layers.values()) for s in layer}
    assert "int8" in middle
    assert not any("_qgen_attention" in m.__dict__ for m in model.modules())


def test_first_and_last_step_are_kept(model):
    choices, _ = choose(model, AttentionSpec("auto", budget=1.0), recorded(steps=10))
    assert choices.edges[0] == 50.0 and choices.edges[-1] == 850.0 and choices.argument == "timestep"
    few, _ = choose(model, AttentionSpec("auto", budget=1.0), recorded(steps=4))
    assert all(all(specs) for specs in few.layers.values())
    forced, _ = choose(model, AttentionSpec("int8"), recorded(steps=10))
    assert all(all(specs) for specs in forced.layers.values())


def test_fp8_values_only_within_the_budget(model):
    tight, _ = choose(model, AttentionSpec("int8", budget=1e-6), recorded())
    loose, _ = choose(model, AttentionSpec("int8", budget=1.0), recorded())
    assert {s for specs in tight.layers.values() for s in specs} == {"int8"}
    assert {s for specs in loose.layers.values() for s in specs} == {"int8_fp8"}


def test_summary_lists_what_stays_as_it_is(capsys):
    model = FAMILIES["sana"][0]()
    qgen.quantize(model, "fp8", calibration=calls("sana"), attention="auto", progress=False)
    found = qgen.summary(model)
    text = " ".join(capsys.readouterr().out.split())
    assert "attention: 2 of 4 in low bits" in text
    for i in range(2):
        assert f"untouched: transformer_blocks.{i}.attn1" in text
    assert [row["spec"] == "float" for row in found.attention] == [False, False, True, True]
    assert not any(row["kind"] == "attention" for row in found)


def test_a_recipe_without_calibration_still_measures_attention(make_demo_pipe):
    pipe = make_demo_pipe()
    few = record(pipe, ["noto owl", "flat apple"], steps=4, progress=False)
    qgen.quantize(pipe, "rtn-int4", calibration=few, attention="int8", progress=False)
    assert len(pipe.transformer.qgen_attention.layers) == 10
    assert pipe("noto owl", output_type="np", num_inference_steps=2).images.shape[0] == 1


def test_refusals_change_nothing():
    model = FAMILIES["pixart"][0]()
    with pytest.raises(ValueError, match="int8"):
        qgen.quantize(model, "rtn-int4", calibration=calls("pixart"), attention="int9", progress=False)
    with pytest.raises(ValueError, match="calibration"):
        qgen.quantize(model, "rtn-int4", attention="int8", progress=False)
    for options in ({"mode": "fp5"}, {"budget": 0.0}, {"margin": 0.0}, {"margin": 1.5}, {"ranges": 0}, {"calls": 0}):
        with pytest.raises(ValueError):
            AttentionSpec(**options)
    assert as_spec(None) is None and as_spec("int8") == AttentionSpec("int8")
    assert not any(isinstance(m, qgen.nn.packed.Packed) for m in model.modules())
    assert not hasattr(model, "qgen_attention")


def test_a_failure_in_attention_undoes_the_layers(monkeypatch):
    model = FAMILIES["pixart"][0]()
    broken = list(calls("pixart").calls)

    def explode(*args, **kwargs):
        raise BadData("attention of x: its output holds NaN or infinity; nothing was changed")

    monkeypatch.setattr("qgen.methods.attention.observe", explode)
    with pytest.raises(BadData):
        qgen.quantize(model, "rtn-int4", calibration=broken, attention="int8", progress=False)
    assert not any(isinstance(m, qgen.nn.packed.Packed) for m in model.modules())
    remove(model)  # nothing to remove, nothing raised
