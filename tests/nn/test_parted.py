"""Layers in parts: where a concatenation was seen, exactly a sum of products, chosen by error, kept by files, undone without a trace."""

import pytest
import torch
from torch import nn

import qgen
from qgen.calibration.base import Call, Moment
from qgen.io.float_layers import dequantize
from qgen.nn.parted import Parted, columns, part, rejoin, repart
from qgen.probe import probe
from qgen.recipe import Recipe, Spec
from tests import tiny

# Channels of h and of the skip connection: they do not meet in the middle, nor between blocks of 64 or of 32.
QUIET, LOUD, N = 40, 88, 80


class Up(nn.Module):
    """The end of a UNet's decoder block: concatenation, norm, activation, two convolutions and a shortcut of 1 x 1."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(8, QUIET + LOUD), nn.SiLU()
        self.conv1, self.conv2 = nn.Conv2d(QUIET + LOUD, N, 3, padding=1), nn.Conv2d(N, N, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(QUIET + LOUD, N, 1)

    def forward(self, h, skip):
        x = torch.cat([h, skip], dim=1)
        return self.conv_shortcut(x) + self.conv2(self.act(self.conv1(self.act(self.norm(x)))))


def made(seed=0, kind=Up):
    """The card's acceptance test: h ~ 0.3 N, skip ~ 6 N, weights scaled inversely."""
    torch.manual_seed(seed)
    model = kind().eval().requires_grad_(False)
    model.conv_shortcut.weight[:, :QUIET] /= 0.3
    model.conv_shortcut.weight[:, QUIET:] /= 6
    return model


def calls(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda size, channels: size * torch.randn(2, channels, 6, 6, generator=g)  # noqa: E731
    return [Call((draw(0.3, QUIET), draw(6, LOUD)), {}, Moment(i)) for i in range(count)]


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_shortcut = nn.Conv2d(QUIET + LOUD, N, 1)

    def forward(self, h, skip):
        return self.conv_shortcut(torch.cat([h, skip], dim=1))


def error(got, want):
    return float((got - want).square().sum() / want.square().sum())


def test_the_probe_sees_the_parts_of_what_was_concatenated():
    found = {site.path: site.parts for site in probe(made(), calls(1)[0])}
    assert found == {"conv1": (QUIET, LOUD), "conv2": (), "conv_shortcut": (QUIET, LOUD)}
    unet = {site.path: site.parts for site in probe(tiny.unet(), tiny.unet_call())}
    joined = {path: parts for path, parts in unet.items() if parts}
    assert joined.pop("time_embedding.linear_1") == (16, 16)  # sines and cosines
    assert set(joined) == {
        f"up_blocks.{i}.resnets.{j}.{layer}" for i in range(2) for j in range(2) for layer in ("conv1", "conv_shortcut")
    }
    assert joined["up_blocks.0.resnets.1.conv1"] == joined["up_blocks.1.resnets.0.conv_shortcut"] == (64, 32)


@pytest.mark.parametrize(
    "spec", [Spec("int4_row", "int4_row", split=True), Spec("int4_g64", "int4_g64", split=True)], ids=str
)
def test_the_acceptance_test_of_split_shortcuts(spec):
    (given,) = calls(1, seed=9)
    model = made(kind=Shortcut)
    want = given.run(model)
    joint = made(kind=Shortcut)
    qgen.quantize(joint, Recipe(Spec(spec.weight, spec.act)), calibration=calls(), progress=False)
    qgen.quantize(model, Recipe(spec), calibration=calls(), progress=False)
    parts = dict(model.conv_shortcut.named_children())
    assert list(parts) == [f"c0_{QUIET}", f"c{QUIET}_{QUIET + LOUD}"] and model.conv_shortcut.sizes == [QUIET, LOUD]
    assert error(given.run(model), want) <= 0.2 * error(given.run(joint), want)
    h, skip = given.args
    first, second = parts.values()
    assert first.bias is not None and second.bias is None and not torch.equal(first.scales[:8], second.scales[:8])
    assert torch.equal(given.run(model), first(h) + second(skip))  # two products, and nothing else
    row = next(row for row in model.qgen_report if row["path"].endswith(f"c0_{QUIET}"))
    assert f"in parts of {QUIET} + {LOUD} channels" in row["why"]


def test_only_what_gains_is_parted_and_only_where_it_is_asked_for():
    model = qgen.quantize(made(), Recipe(Spec("int4_row", "int4_row", split=True)), calibration=calls(), progress=False)
    assert isinstance(model.conv_shortcut, Parted)
    assert not isinstance(model.conv1, Parted) and not isinstance(
        model.conv2, Parted
    )  # the norm made conv1's halves alike
    model = qgen.quantize(made(), Recipe(Spec("int4_row", "int4_row")), calibration=calls(), progress=False)
    assert type(model.conv_shortcut).__name__ == "QuantConv2d"


def test_rules_speak_for_the_layer_as_a_whole():
    recipe = Recipe(Spec("int4_row", "int4_row", split=True)).set("conv_shortcut", weight="int5_row", why="mine")
    model = qgen.quantize(made(), recipe, calibration=calls(), progress=False)
    rows = [row for row in model.qgen_report if row["path"].startswith("conv_shortcut.")]
    assert len(rows) == 2 and all(
        row["spec"] == "int5_row x int4_row" and row["why"].startswith("mine; in") for row in rows
    )
    model = qgen.quantize(made(), recipe.skip("conv_shortcut"), calibration=calls(), progress=False)
    assert type(model.conv_shortcut) is nn.Conv2d
    assert Recipe.from_json(recipe.to_json()) == recipe and '"split": true' in recipe.to_json()


def loud_unet():
    """A UNet whose skip connections are far louder than what they meet, as trained ones have it: conv_in feeds them."""
    model = tiny.unet()
    model.conv_in.weight.mul_(30)
    return model


def test_peft_names_a_layer_in_parts():
    peft = pytest.importorskip("peft", reason="the adapters are peft's")
    recipe = Recipe(Spec("int4_row", "int4_row", split=True))
    model = qgen.quantize(made(), recipe, calibration=calls(), progress=False)
    with pytest.raises(ValueError, match=r"Target module Parted"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["conv_shortcut"], r=4), model)


@pytest.mark.parametrize("library", [False, True], ids=["qgen.load", "from_pretrained"])
def test_files_keep_the_parts(library, tmp_path):
    model, given = loud_unet(), [tiny.unet_call(seed) for seed in range(4)]
    qgen.quantize(model, Recipe(Spec("int4_row", "int4_row", split=True)), calibration=given, progress=False)
    parted = {path for path, m in model.named_modules() if isinstance(m, Parted)}
    assert "up_blocks.1.resnets.1.conv_shortcut" in parted
    model.save_pretrained(tmp_path) if library else qgen.save(model, tmp_path)
    back = type(model).from_pretrained(tmp_path) if library else qgen.load(tmp_path)
    assert {path for path, m in back.named_modules() if isinstance(m, Parted)} == parted
    with torch.no_grad():
        assert torch.equal(given[3].run(back)[0], given[3].run(model)[0])
    with pytest.raises(ValueError, match=r"is quantized in parts, which no other format holds"):
        qgen.export(model, "comfy", tmp_path / "other.safetensors")
    qgen.export(model, "qgen", tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(given[3].run(qgen.load(tmp_path / "again"))[0], given[3].run(model)[0])
    plain = dequantize(back)
    assert plain.state_dict().keys() == tiny.unet().state_dict().keys()


def test_whatever_fails_the_layers_are_put_back(monkeypatch):
    from qgen import engine

    model, (given,) = made(), calls(1)
    before, layers = given.run(model), dict(model.named_modules())

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "packed_layer", fail)
    with pytest.raises(KeyboardInterrupt):
        qgen.quantize(model, Recipe(Spec("int4_row", "int4_row", split=True)), calibration=calls(), progress=False)
    after = dict(model.named_modules())
    assert after.keys() == layers.keys() and all(after[path] is layer for path, layer in layers.items())
    assert torch.equal(given.run(model), before)


def test_an_interrupted_run_goes_on_with_its_parts(tmp_path, monkeypatch):
    """The second call reads what the first one has finished, and refines nothing again."""
    from qgen import engine

    recipe = Recipe(Spec("int4_row", "int4_row", split=True))
    whole = qgen.quantize(made(), recipe, calibration=calls(), checkpoint=tmp_path, progress=False)
    monkeypatch.setattr(engine, "packed_layer", None)
    again = qgen.quantize(made(), recipe, calibration=calls(), checkpoint=tmp_path, progress=False)
    (given,) = calls(1, seed=3)
    assert isinstance(again.conv_shortcut, Parted) and torch.equal(given.run(again), given.run(whole))


@pytest.mark.parametrize(
    "layer, shape",
    [(nn.Linear(24, 8), (2, 5, 24)), (nn.Conv1d(24, 8, 3, padding=1), (2, 24, 9)), (nn.Conv2d(24, 8, 3, 2, 1), (2, 24, 9, 7)),
     (nn.Conv3d(24, 8, (3, 1, 1)), (2, 24, 4, 5, 5))],
    ids=["linear", "conv1d", "conv2d", "conv3d"],
)  # fmt: skip
def test_parts_are_the_layer_and_go_back(layer, shape):
    model = nn.ModuleDict({"a": layer.requires_grad_(False)})
    model["b"] = layer
    x = torch.randn(shape)
    made = part(model, "a", (7, 12, 5))
    assert model["a"] is model["b"] is made and made.sizes == [7, 12, 5]
    assert torch.allclose(made(x), layer(x), atol=1e-5)
    cols = columns(layer, (7, 12, 5))
    assert torch.equal(torch.cat([layer.weight.flatten(1)[:, c] for c in cols], 1), layer.weight.flatten(1))
    assert torch.equal(made.joined().weight, layer.weight) and torch.equal(made.joined().bias, layer.bias)
    rejoin(model)
    assert model["a"] is model["b"] is layer


def test_paths_that_do_not_fit_part_nothing():
    model = made()
    for names in (("c0_40",), ("c0_40", "c41_128"), ("c0_40", "c40_127"), ("c0_0", "c0_128"), ("d0_40", "d40_128")):
        repart(model, {f"conv1.{name}" for name in names})
        assert type(model.conv1) is nn.Conv2d
    repart(model, {"conv1.c0_40", "conv1.c40_128", "nowhere.c0_1", "nowhere.c1_2"})
    assert isinstance(model.conv1, Parted)
    with pytest.raises(ValueError, match=r"128 input channels add up to them, found \(64, 32\)"):
        Parted(model.conv_shortcut, (64, 32))
