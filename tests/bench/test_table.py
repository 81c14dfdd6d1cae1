"""The table, its notes, the page and the plot, from rows made by hand."""

import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qgen.bench.job import Job, Row
from qgen.bench.page import markdown
from qgen.bench.peer import Config
from qgen.bench.plot import plot
from qgen.bench.table import as_csv, as_json, as_markdown, notes, points, rich_table
from tests.bench.rows import row

CONTROL = row("x", "y", 9, [90.0, 90.0])
ROWS = [
    replace(CONTROL, peer="unquantized", config=Config("original", 16, 16, "", control=True)),
    row("qgen", "rtn", 4 * 2**20, [30.0, 31.0], seconds=2, peak=3 * 2**20),
    row("bits|bytes", "nf4", 5 * 2**20, [36.0, 36.5], act=16, seconds=1, ratio=0.8),
    Row("torchao", Config("int4", 4, 16, ""), "ImportError: Requires\nmslk " + "x" * 300),
]  # fmt: skip


def test_markdown_has_a_line_for_each_row_and_says_why_one_failed():
    lines = as_markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    head = [cell.strip() for cell in lines[0].strip("|").split(" | ")]
    assert lines[5].startswith("| torchao | int4 | W4A16 | failed: ImportError: Requires mslk xxx")
    assert len(lines[5]) < 320
    assert all(line.replace("\\|", "").count("|") == len(head) + 1 for line in lines)
    assert "bits\\|bytes" in lines[4]


def test_the_best_of_each_column_is_bold_and_yardsticks_are_not():
    _, _, control, ours, peer, _ = as_markdown(ROWS).splitlines()
    assert "**" not in control
    assert "**4.00**" in ours and "**36.2 [36.0, 36.5]**" in peer and "**0.80 [0.70, 0.90]**" in peer


def test_notes_say_where_a_peer_is_better():
    said = "\n".join(notes(ROWS))
    assert "bits|bytes nf4 (36.2 dB, 5.00 MiB) is better than every qgen recipe of the same size or smaller" in said
    assert "Quickest to quantize: bits|bytes nf4, 1.00 s; of the recipes qgen rtn, 2.00 s." in said
    assert [p.name for p in points(ROWS)] == ["qgen rtn", "bits|bytes nf4"]


def test_notes_name_layers_that_a_peer_left_or_changed():
    odd = row("peer", "odd", 10, [1.0, 2.0], left=["a.b"], more=["head", "tail"])
    said = "\n".join(notes([odd]))
    assert "peer odd left 1 of 2 layers in floats, a.b among them." in said
    assert "peer odd also changed 2 layers that were to stay, head among them." in said


def test_csv_and_json_hold_every_row_in_full():
    read = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert [r["peer"] for r in read] == [r.peer for r in ROWS]
    assert float(read[1]["PSNR, dB"]) == 30.5 and read[3]["PSNR, dB"] == "" and read[3]["error"] == ROWS[3].error
    data = json.loads(as_json(ROWS, {"command": "x"}))
    assert [Row.from_dict(r) for r in data["rows"]] == ROWS


def test_the_page_states_conditions_and_hides_paths():
    prompts = SimpleNamespace(name="some prompts", digest="abc")
    words = ["bench", "peers", "--python", "torchao=/somewhere/bin/python", "--n", "2"]
    text, about = markdown(ROWS, Job("", "", "demo", ("a", "b"), seed=3, pairs=5), prompts, words)
    assert about["command"] == "qgen bench peers --python torchao=PYTHON --n 2" and "/somewhere" not in text
    for part in (
        "some prompts, 2 of them (abc)",
        "seed 3",
        "5 pairs",
        "bits|bytes 1.0",
        "8-bit inputs where text",
        "mslk",
    ):
        assert part in text, part


def test_the_plot_is_a_picture_and_needs_a_point(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    with Image.open(plot(points(ROWS), tmp_path / "x" / "p.png", "title")) as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(10**7)) > 20
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([], tmp_path / "q.png")


def test_the_terminal_table_fits_eighty_columns():
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(rich_table(ROWS))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 3 * (len(ROWS) + 1) and any("torchao" in line and "failed" in line for line in lines)
