"""What an evaluate job makes of pictures: rows, what could not be measured and why, tables, a page, commands."""

import csv
import json

import pytest
import torch

from qgen.web import markup
from qgen.web.evaluation_files import command_of, worst, written
from qgen.web.work_evaluate import _score

ASKED = {
    "base": "demo", "recipe": "rtn-int4", "folder": None, "label": "the shipped model, rtn-int4", "metrics": ["psnr", "ssim", "fid"],
    "prompts": ["=SUM(A1)", "ינשוף <b>", "🦉"], "set": "text", "set_name": "the visitor's own", "licence": "as their owner says",
    "extractor": "small", "steps": 4, "seed": 2, "real": None,
}  # fmt: skip


class Report:
    def __init__(self):
        self.shown = {}

    def step(self, *_):
        pass

    def say(self, line):
        pass

    def show(self, **live):
        self.shown |= live


@pytest.fixture
def pictures():
    theirs = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    mine = theirs.clone()
    mine[1:] = (mine[1:] + 0.1).clamp(0, 1)
    return mine, theirs


def test_one_picture_is_no_set_and_the_other_metrics_go_on(pictures):
    pytest.importorskip("efficientnet_lite_pytorch")
    mine, theirs = (x[1:2] for x in pictures)
    report = Report()
    scores, failed = _score({**ASKED, "prompts": ["x"], "metrics": ["psnr", "fid", "kid", "is"]}, mine, theirs, report)
    assert [row.metric for row in scores.rows] == ["psnr"]
    assert set(failed) == {"fid", "kid", "is"} and all("n >= " in why for why in failed.values())
    html = markup.scores(report.shown["rows"], failed, 1, 1)
    assert html.count("not measured") == 3 and "PSNR" in html
    with pytest.raises(ValueError, match="n >= 2"):
        _score({**ASKED, "prompts": ["x"], "metrics": ["fid"]}, mine, theirs, report)


def test_files_say_everything(pictures, tmp_path, demo_pipe):
    pytest.importorskip("efficientnet_lite_pytorch")
    import qgen

    qgen.quantize(demo_pipe, "rtn-int4", progress=False)
    mine, theirs = pictures
    scores, failed = _score({**ASKED, "metrics": ["psnr", "is", "clip_iqa"]}, mine, theirs, Report())
    names = written(ASKED, tmp_path, demo_pipe, scores, failed, mine, theirs)
    assert {*names} == {"scores.csv", "per_prompt.csv", "scores.json", "report.html", "prompts.txt"}
    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8"))}
    assert float(rows["is"]["difference"]) == pytest.approx(float(rows["is"]["value"]) - float(rows["is"]["reference"]))
    assert rows["clip_iqa"]["note"].startswith("not measured: ") and rows["psnr"]["value"] == "inf"
    cells = list(csv.reader((tmp_path / "per_prompt.csv").open(encoding="utf-8")))
    assert cells[1][0] == "'=SUM(A1)", "a spreadsheet takes no prompt for a formula"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "clip_iqa was not measured",
        "licence of the prompts",
        "qgen eval demo --recipe rtn-int4",
        "ינשוף &lt;b&gt;",
        "🦉",
    ):
        assert text in page, text
    assert "<b>" not in page.partition("ינשוף")[2][:6] and "<script" not in page
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["prompts"] == ASKED["prompts"]
    first = worst(tmp_path, scores, ASKED["prompts"], mine, theirs)
    assert first[-1]["psnr"] is None and first[-1]["prompt"] == "=SUM(A1)", "the equal pair comes last"


def test_commands_do_the_same():
    said = command_of(ASKED)
    assert said.startswith(
        "qgen eval demo --recipe rtn-int4 --prompts prompts.txt --metrics psnr,ssim,fid --batch-size 8"
    )
    assert "--extractor small" in said and "--steps 4" in said and "--seed 2" in said and "--real" not in said
    own = command_of({**ASKED, "recipe": None, "folder": "/x", "set": "held_out", "extractor": "auto", "seed": 0})
    assert own.startswith("qgen eval MODEL --reference demo --n 3 --metrics") and "--seed" not in own


def test_the_table_shows_references_brackets_and_no_empty_columns():
    row = {
        "metric": "is", "label": "IS-x", "unit": "", "better": "higher", "value": 2.5, "low": 2.0, "high": 3.0, "n": 4, "extractor": "x",
        "digest": "abc", "note": "",
        "reference": 2.75, "difference": -0.25, "difference_low": None, "difference_high": None, "flagged": True,
    }  # fmt: skip
    html = markup.scores([row], {}, 4, 4)
    assert "(2.5)" in html and "2.75" in html and "-0.25" in html and "x abc" in html
    bare = markup.scores([{**row, "reference": None, "difference": None, "flagged": False}], {}, 4, 4)
    assert "<th" in bare and "reference</th>" not in bare and "(2.5)" not in bare


def test_names_in_the_heat_map_lose_what_all_share_and_nothing_else():
    heat = {"steps": ["9"], "layers": ["net.blocks.0.to_q", "net.blocks.1.to_q"], "db": [[-20.0], [-30.0]]}
    html = str(markup.heat_map(heat))
    assert "<bdi>0.to_q</bdi>" in html and "<bdi>1.to_q</bdi>" in html and "in net.blocks" in html
    assert 'title="net.blocks.0.to_q"' in html
    for layers in (["a.b", "c.b"], ["a", "a.b"], ["a"]):
        assert "<bdi>a" in str(markup.heat_map({**heat, "layers": layers, "db": [[-20.0]] * len(layers)}))
