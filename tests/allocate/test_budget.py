"""Budgets in words, and `quantize(budget=…, quality=…)` on small models: what is kept, what is refused, what the report shows."""

import pytest
import torch

import qgen
from qgen.allocate import Budget, Quality
from qgen.allocate.candidates import bits_of, ladder
from qgen.allocate.latency import Stopwatch
from qgen.allocate.sensitivity import swapped
from qgen.nn.packed import Packed
from qgen.probe import probe
from qgen.recipe import Recipe, Rule, Spec
from qgen.show.report import report
from qgen.site import Site
from tests import tiny

RTN = Recipe(Spec("int4_g64", "int8_row"), (Rule("*", None, role="outside"),), "small")


@pytest.mark.parametrize(
    "text, amount, unit",
    [("4.5 bits", 4.5, "bits"), ("5bit", 5, "bits"), ("6 GiB", 6 * 2**30, "bytes"), ("800MB", 8e8, "bytes"), ("12 ms", 0.012, "seconds")],
)  # fmt: skip
def test_budgets_are_read(text, amount, unit):
    found = Budget.parse(text)
    assert (found.amount, found.unit) == (pytest.approx(amount), unit)
    assert Budget.parse(str(found)).amount == pytest.approx(amount, rel=1e-3)


@pytest.mark.parametrize("text", ["", "4.5", 4.5, "bits", "-4 bits", "0 bits", "4 bananas", "nan bits"])
def test_budgets_that_say_nothing(text):
    with pytest.raises(ValueError, match="a budget is"):
        Budget.parse(text)


def test_qualities_are_read():
    assert Quality.parse("psnr>=30") == Quality("psnr", 30.0) == Quality.parse(" PSNR >= 30 dB")
    wrong = {
        "psnr": "text such as",
        "psnr<=3": "text such as",
        "pnsr>=30": "did you mean 'psnr'",
        "ssim>=90": "at most 1",
    }
    for text, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            Quality.parse(text)


def test_metric_names_are_checked():
    with pytest.raises(ValueError, match="did you mean 'latent'"):
        Budget(5, "bits", metric="latents")


def test_ladders_go_up_in_kind_and_down_on_request():
    assert [c and c.weight for c in ladder(Spec("int4_g64", "uint4_g64"))] == ["int4_g64", "int8_row", None]
    assert [c and c.weight for c in ladder(Spec("nvfp4", "nvfp4_dynamic"))] == ["nvfp4", "fp8_e4m3_row", None]
    narrow = ladder(Spec("int4_g64"), narrow=True)
    assert [c and c.weight for c in narrow] == ["int4_g64", "int8_row", None, "uint3_g64", "uint2_g64"]
    assert narrow[1].act is None
    eight = ladder(Spec("int8_row", "int8_row"), narrow=True)
    assert [c and c.weight for c in eight] == ["int8_row", None, "int4_s8_g64", "uint3_g64", "uint2_g64"]
    assert bits_of(narrow[0], Site("a", "linear", "", 0, "x", (64, 100))) == pytest.approx(4.25 * 128 / 100)


def model_and_calls():
    model, call = tiny.FAMILIES["pixart"]
    return model(), [call(seed) for seed in range(5)]


def stored_bits(model):
    """Bits per weight as the layers really hold them, by codes, scales and zeros; float layers that a recipe covers count 16."""
    bits = weights = 0
    for row in model.qgen_report:
        if row["path"] == "(output)" or row["role"] == "outside":
            continue
        layer = model.get_submodule(row["path"])
        n, k = row["shape"]
        weights += n * k
        parts = ("codes", "scales", "global_scale", "zero")
        bits += (
            sum(8 * t.nbytes for name, t in layer.slots().items() if name in parts)
            if isinstance(layer, Packed)
            else 16 * n * k
        )
    return bits / weights


@pytest.mark.parametrize("amount", [5.0, 6.5, 9.0])
def test_bits_are_kept_and_used(amount):
    model, calls = model_and_calls()
    qgen.quantize(model, RTN, calibration=calls, budget=f"{amount} bits", progress=False)
    found = stored_bits(model)
    assert amount - 0.8 < found <= amount + 1e-6
    assert found == pytest.approx(model.qgen_allocation["reached"]["bits"], abs=1e-6)
    assert any("allocated for" in row["why"] for row in model.qgen_report if row["path"] != "(output)")


def test_more_bits_lower_the_error_and_the_recipe_alone_repeats_it():
    rows = []
    for amount in (4.6, 6.0, 12.0):
        model, calls = model_and_calls()
        qgen.quantize(model, RTN, calibration=calls, budget=f"{amount} bits", progress=False)
        rows.append(model.qgen_report[-1]["sqnr_db"])
    assert rows == sorted(rows) and rows[-1] > rows[0] + 3
    again, calls = model_and_calls()
    qgen.quantize(again, Recipe.from_json(model.qgen_recipe.to_json()), calibration=calls, progress=False)
    assert tiny.same(again, tiny.snapshot(model))


def test_narrow_formats_come_in_where_the_budget_asks():
    model, calls = model_and_calls()
    qgen.quantize(model, RTN, calibration=calls, budget="4 bits", progress=False)
    assert stored_bits(model) <= 4 and any(r["spec"].startswith("uint3") for r in model.qgen_report if "spec" in r)


def test_bytes_are_of_the_whole_denoiser():
    model, calls = model_and_calls()
    whole = sum(2 * p.numel() for p in model.parameters())
    budget = int(0.6 * whole)
    qgen.quantize(model, RTN, calibration=calls, budget=f"{budget}B", progress=False)
    from qgen.show.rows import gather

    assert 0.5 * whole < gather(model).totals["nbytes"] <= budget


@pytest.mark.parametrize(
    "budget, words",
    [("1 bits", r"smallest possible is 2\.\d+ bits"), ("9 KiB", r"smallest possible is at least [\d.]+ KiB")],
)
def test_a_budget_that_cannot_be_met_says_the_smallest_possible(budget, words):
    model, calls = model_and_calls()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=words):
        qgen.quantize(model, RTN, calibration=calls, budget=budget, progress=False)
    assert tiny.same(model, before) and not hasattr(model, "qgen_recipe")


def test_the_smallest_model_of_a_quality():
    sizes = {}
    for least in (25, 44):
        model, calls = model_and_calls()
        qgen.quantize(model, RTN, calibration=calls, quality=f"sqnr>={least}", progress=False)
        sizes[least] = model.qgen_allocation["reached"]["bytes"]
        assert model.qgen_report[-1]["sqnr_db"] > least - 0.7  # judged on other held-out calls than it was chosen by
    assert sizes[25] < sizes[44]
    model, calls = model_and_calls()
    with pytest.raises(ValueError, match=r"quality sqnr>=60 is not reached within 5 bits: the best found is sqnr \d"):
        qgen.quantize(model, RTN, calibration=calls, quality="sqnr>=60", budget="5 bits", progress=False)


def test_pictures_need_a_pipeline():
    model, calls = model_and_calls()
    for options in ({"quality": "psnr>=30"}, {"budget": Budget(5, "bits", metric="latent")}):
        with pytest.raises(ValueError, match="measured on what a pipeline draws"):
            qgen.quantize(model, RTN, calibration=calls, progress=False, **options)


def test_swapping_is_undone_after_an_error():
    model, _ = model_and_calls()
    path = "transformer_blocks.0.attn1.to_q"
    old = model.get_submodule(path)
    with pytest.raises(KeyError), swapped(model, {path: torch.nn.Identity()}):
        assert isinstance(model.get_submodule(path), torch.nn.Identity)
        raise KeyError
    assert model.get_submodule(path) is old


def test_seconds_are_measured_once_per_shape():
    clock, site = Stopwatch(runs=3), Site("a", "linear", "", 0, "x", (64, 32), tokens=5)
    layer = torch.nn.Linear(32, 64)
    first = clock(layer, site)
    assert first > 0 and clock(torch.nn.Linear(32, 64), site) == first and len(clock.known) == 1
    conv = clock(torch.nn.Conv2d(8, 4, 3, padding=1), Site("b", "conv2d", "", 1, "y", (4, 72), tokens=64))
    assert conv > 0 and len(clock.known) == 2


def test_a_latency_budget_chooses_by_the_table(monkeypatch):
    """With times by the table, 3 ms for a float layer and 1 ms for a packed one, two milliseconds per layer leave half of them float."""
    monkeypatch.setattr(Stopwatch, "__call__", lambda self, layer, site: 1e-3 if isinstance(layer, Packed) else 3e-3)
    model, calls = model_and_calls()
    count = sum(RTN.spec_for(site) is not None for site in probe(model, calls[0]))
    qgen.quantize(model, RTN, calibration=calls, budget=f"{2 * count} ms", progress=False)
    packed = sum(isinstance(layer, Packed) for layer in model.modules())
    assert model.qgen_allocation["reached"]["seconds"] <= 2e-3 * count + 1e-9
    assert packed == -(-count // 2)


@pytest.mark.parametrize("options", [{"budget": "16 bits"}, {"quality": "sqnr>=200"}])
def test_a_generous_budget_leaves_nothing_to_do(options):
    model, calls = model_and_calls()
    with pytest.raises(ValueError, match="leaves every layer at 16 bits"):
        qgen.quantize(model, RTN, calibration=calls, progress=False, **options)


def test_report_shows_bits_and_sensitivity(tmp_path):
    model, calls = model_and_calls()
    qgen.quantize(model, RTN, calibration=calls, budget="6 bits", progress=False)
    page = report(model, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Sensitivity: output" in page and "reached: " in page and "rgba(214,69,48," in page
    assert page.count("outline:2px") == len(model.qgen_allocation["units"])
    plain, _ = model_and_calls()
    qgen.quantize(plain, "rtn-int4", progress=False)
    assert "Sensitivity" not in report(plain, tmp_path / "p.html").read_text(encoding="utf-8")
