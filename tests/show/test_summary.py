"""The summary's numbers against sizes counted by hand, and against reports that strangers wrote."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from qgen.errors import NotQuantizable
from qgen.show.rows import build, gather
from qgen.show.summary import mib, summary, table


def counted(layer, n, k, rank=4):
    """Bytes of a layer (N, K) in int4_g64: codes, 16-bit scales, down and up in 16 bits, smoothing where it helped, bias in float32."""
    smooth = 2 * k if layer.smooth is not None else 0
    return n * k // 2 + n * (k // 64) * 2 + 2 * rank * (n + k) + smooth + (4 * n if layer.bias is not None else 0)


def test_rows_in_order_with_kinds_and_reasons(calibrated):
    found = gather(calibrated)
    packed = [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]
    assert {row["path"] for row in found} == {"embed", "head", *packed}
    assert [row["path"] for row in found if row["spec"] != "float"] == packed
    by_path = {row["path"]: row for row in found}
    assert by_path["embed"]["why"] == "ends stay float"
    assert by_path["blocks.0.up"]["shape"] == [128, 64]
    assert by_path["blocks.0.up"]["spec"] == "int4_g64 x int8_row"
    assert list(by_path["blocks.0.up"]["log"])[:2] == ["smooth", "lowrank"]


def test_sizes_are_those_of_the_tensors(calibrated):
    found = gather(calibrated)
    by_path = {row["path"]: row for row in found}
    assert by_path["blocks.0.up"]["nbytes"] == counted(calibrated.blocks[0].up, 128, 64)
    assert by_path["blocks.0.down"]["nbytes"] == counted(calibrated.blocks[0].down, 64, 128)
    assert by_path["blocks.0.up"]["bytes16"] == 2 * (128 * 64 + 128)
    assert by_path["blocks.0.up"]["lowrank_bytes"] == 4 * (64 + 128) * 2


def test_totals_count_every_parameter_once(calibrated):
    totals = gather(calibrated).totals
    floats = 2 * (16 * 64 + 64 + 64 * 16 + 16 + 10)  # embed, head, table
    packed16 = 2 * 2 * (128 * 64 + 128 + 64 * 128)
    packed = sum(counted(b.up, 128, 64) + counted(b.down, 64, 128) for b in calibrated.blocks)
    assert totals["bytes16"] == floats + packed16
    assert totals["nbytes"] == floats + packed
    assert totals["ratio"] == pytest.approx(totals["bytes16"] / totals["nbytes"])
    assert totals["bits_per_weight"] == pytest.approx(8 * packed / (packed16 / 2))
    assert (totals["layers"], totals["quantized"]) == (6, 4)
    assert list(totals["output_sqnr_db"]) == ["Tiny"]


def test_sqnr_is_that_of_the_layers_output(calibrated):
    """The whole denoiser's SQNR, measured again here on fresh inputs, is what the report says within a few dB."""
    torch.manual_seed(0)
    float_model = type(calibrated)().eval()
    x = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want, got = float_model(x), calibrated(x)
    db = float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))
    assert gather(calibrated).totals["output_sqnr_db"]["Tiny"] == pytest.approx(db, abs=2)


def test_without_calibration_only_the_weights_error_is_known(datafree):
    packed = [row for row in gather(datafree) if row["spec"] != "float"]
    assert packed
    assert all(row["sqnr_db"] is None and 10 < row["weight_sqnr_db"] < 30 for row in packed)
    assert gather(datafree).totals["output_sqnr_db"] == {}


def test_the_kernel_is_the_one_chosen_now(datafree):
    datafree.blocks[0].up.prepare("reference")
    by_path = {row["path"]: row for row in gather(datafree)}
    assert by_path["blocks.0.up"]["kernel"] == "reference"


def test_a_float_model_is_refused(tiny):
    with pytest.raises(NotQuantizable, match="Tiny has no quantized layer"):
        summary(tiny)


def test_prints_and_returns_the_same(calibrated, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = summary(calibrated)
    text = capsys.readouterr().out
    for row in found:
        assert row["path"] in text
    assert f"4 of 6 layers quantized: {mib(found.totals['bytes16'])}" in text


def test_a_pipeline_shows_all_its_denoisers(calibrated):
    class Pipe:
        transformer, unet, components = calibrated, calibrated, {}

    assert {row["denoiser"] for row in gather(Pipe())} == {"transformer", "unet"}


def test_layers_without_a_report_get_rows(datafree):
    del datafree.qgen_report
    rows = gather(datafree)
    assert [row["path"] for row in rows] == [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]
    assert rows[0]["nbytes"] == datafree.blocks[0].up.nbytes


HOSTILE = [
    None,
    {"path": 3},
    {"path": "ghost", "spec": "int4_g64 x float", "nbytes": 10**9},
    {"path": "\x1b[31mred", "spec": "float", "sqnr_db": float("nan"), "nbytes": -5, "bytes16": "many", "log": [1], "shape": "x"},
    {"path": "(output)", "sqnr_db": "great"},
]  # fmt: skip


def test_rows_of_strangers_are_cleaned():
    rows, output = build("d", HOSTILE, {})
    assert output is None
    assert [row["path"] for row in rows] == ["?[31mred"]
    assert (rows[0]["sqnr_db"], rows[0]["nbytes"], rows[0]["bytes16"], rows[0]["shape"], rows[0]["log"]) == (
        None,
        0,
        0,
        [],
        {},
    )
    assert build("d", "no list", {}) == ([], None)


def test_markup_in_names_stays_text(calibrated):
    calibrated.qgen_report[0]["why"] = "[bold red]loud[/]"
    stream = io.StringIO()
    Console(file=stream, width=200).print(table(gather(calibrated), 200))
    assert "[bold red]loud[/]" in stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 119, 120, 200])
def test_numbers_survive_narrow_terminals(calibrated, width):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table(gather(calibrated), width))
    assert (
        re.findall(r"\b16\.2\b", stream.getvalue()) == ["16.2"] * 2
    )  # KiB of blocks.*.up at 16 bits: 2 · (128 · 64 + 128) / 1024
    assert "ends stay float" in " ".join(stream.getvalue().split())


def test_units():
    assert [mib(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30, 2048 << 30)] == [
        "0 B", "1023 B", "1.00 KiB", "5.00 MiB", "3.00 GiB", "2048.00 GiB",
    ]  # fmt: skip


def test_a_bare_layer_can_be_shown():
    from qgen.engine import quantize

    found = gather(quantize(nn.Sequential(nn.Linear(64, 64)), "rtn-int4", progress=False))
    assert [row["path"] for row in found] == ["0"]
