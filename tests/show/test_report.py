"""The page: complete, self-contained, escaped, and with bars as long as the errors they stand for."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from qgen.errors import NotQuantizable
from qgen.eval.scores import Score, Scores
from qgen.show.report import report
from qgen.show.rows import gather

VOID = {"meta", "img", "col", "br"}
PATHS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


class Strict(HTMLParser):
    """Fails where tags do not nest; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    parser = Strict()
    parser.feed(path.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


def scores(value):
    return Scores((Score("psnr", "PSNR", value, value - 1, value + 1, 8, "dB"),), {}, (), {})


def test_says_everything(calibrated, tmp_path):
    path = report(
        calibrated,
        tmp_path / "deep" / "report.html",
        scores={"a": scores(31.5), "b": scores(22.25)},
        commands=["qgen demo --x"],
    )
    text = " ".join(read(path).text)
    for word in (
        *PATHS,
        "ends stay float",
        "31.5",
        "22.25",
        "qgen demo --x",
        "smooth",
        "lowrank",
        "int4_g64 x int8_row",
        torch.__version__,
    ):
        assert word in text, word
    for heading in ("Scores", "Layers", "Formats", "Methods", "Kept float", "Environment", "Do it again"):
        assert heading in text
    assert '"rank": 4' in text  # the recipe's JSON


def test_loads_nothing_and_runs_nothing(calibrated, tmp_path):
    path = report(calibrated, tmp_path / "r.html", pictures=[("one", np.zeros((4, 4, 3)), np.ones((4, 4, 3)))])
    page = path.read_text(encoding="utf-8")
    tags = read(path).tags
    assert not {"script", "link", "iframe", "object", "a", "form", "base"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name, value in attributes.items():
            assert name not in ("href", "srcset", "action") and not name.startswith("on")
            assert name != "src" or value.startswith("data:image/png;base64,"), (tag, value)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page


def test_worst_layers_come_first_and_bars_are_errors(calibrated, tmp_path):
    page = report(calibrated, tmp_path / "r.html").read_text(encoding="utf-8")
    rows = {row["path"]: row for row in gather(calibrated) if row["spec"] != "float"}
    shown = re.findall(r'class="path">([^<]*)<', page)
    assert shown == sorted(rows, key=lambda path: rows[path]["sqnr_db"])
    widths = [float(w) for w in re.findall(r'class="bar held" style="width:([\d.]+)%', page)]
    errors = np.array([10 ** (-rows[path]["sqnr_db"] / 20) for path in shown])
    assert np.allclose(np.array(widths) / widths[0], errors / errors[0], atol=2e-3)
    assert len(re.findall(r'class="bar fit"', page)) == len(shown)


def test_overfitting_is_marked(calibrated, tmp_path):
    assert "overfits" not in report(calibrated, tmp_path / "r.html").read_text(encoding="utf-8").split("<main>")[
        1
    ].replace("the layer overfits its", "")
    row = next(row for row in calibrated.qgen_report if row["path"] == "blocks.1.up")
    row["sqnr_fit_db"] = row["sqnr_db"] + 3.5
    assert "overfits by 3.5 dB" in report(calibrated, tmp_path / "r.html").read_text(encoding="utf-8")


EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(1)>&amp;\x1b[2J"""


def test_everything_from_files_is_escaped(calibrated, tmp_path):
    for row in calibrated.qgen_report:
        row.update(why=EVIL, block=EVIL, role=EVIL)
        if "log" in row:
            row["log"] = {EVIL: EVIL, **row["log"]}
    calibrated.qgen_report.append({"path": EVIL, "spec": "float", "why": EVIL, "nbytes": 4, "bytes16": 4})
    picture = np.zeros((4, 4, 3))
    bad = Scores((Score("psnr", EVIL, 1.0, None, None, 8, EVIL, note=EVIL, extractor=EVIL, digest=EVIL),), {}, (), {})
    path = report(
        calibrated,
        tmp_path / "r.html",
        pictures=[(EVIL, picture, picture)],
        scores={EVIL: bad},
        commands=[EVIL],
        title=EVIL,
    )
    parser = read(path)
    assert "script" not in {tag for tag, _ in parser.tags}
    assert all("onerror" not in attributes for _, attributes in parser.tags)
    assert [a["src"][:5] for tag, a in parser.tags if tag == "img"] == ["data:"] * 3
    assert "\x1b" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in " ".join(parser.text)  # shown as the text that it is


def test_pictures_are_embedded_as_they_are(calibrated, tmp_path):
    image = pytest.importorskip("PIL.Image")
    before, after = torch.rand(8, 8, 3), torch.rand(8, 8, 3)
    page = report(calibrated, tmp_path / "r.html", pictures=[("x", before, after)]).read_text(encoding="utf-8")
    found = [np.asarray(image.open(io.BytesIO(base64.b64decode(d)))) for d in re.findall(r"base64,([^\"]+)", page)]
    assert [x.shape for x in found] == [(192, 192, 3)] * 3
    for shown, truth in zip(found, (before, after), strict=False):
        assert np.array_equal(shown[::24, ::24], (truth.numpy() * 255).round().astype(np.uint8))


def test_without_calibration_the_bars_say_so(datafree, tmp_path):
    page = report(datafree, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "error of the weights alone" in page
    assert 'class="bar held"' not in page and page.count('class="bar weight"') == 4


def test_nothing_is_written_for_a_float_model_or_bad_pictures(tiny, tmp_path):
    with pytest.raises(NotQuantizable):
        report(tiny, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_bad_pictures_are_refused_before_writing(datafree, tmp_path):
    with pytest.raises(ValueError, match="one size"):
        report(datafree, tmp_path / "r.html", pictures=[("x", np.zeros((4, 4, 3)), np.zeros((8, 8, 3)))])
    assert not list(tmp_path.iterdir())


def test_scores_by_different_networks_never_share_a_row():
    """Same metric, other weights: two rows with gaps, and a line that says why; the same weights share one row."""
    from qgen.eval.scores import Score, Scores
    from qgen.show.sections import scores

    def of(digest, value, n=8):
        return Scores(
            (
                Score("fid", "FD-net", value, None, None, n, "", "lower", "Net", digest),
                Score("psnr", "PSNR", 30, 29, 31, n, "dB"),
            )
        )

    apart = str(scores({"a": of("aaa", 1.25), "b": of("bbb", 2.5)}))
    rows = apart.split("<tr")[2:]
    assert len(rows) == 3 and "cannot be compared" in apart
    assert "1.25" in rows[0] and "Net aaa" in rows[0] and "2.5" not in rows[0] and "bbb" not in rows[0]
    assert "2.5" in rows[1] and "Net bbb" in rows[1] and "1.25" not in rows[1]
    together = str(scores({"a": of("aaa", 1.25), "b": of("aaa", 2.5, n=4)}))
    rows = together.split("<tr")[2:]
    assert len(rows) == 2 and "1.25" in rows[0] and "2.5" in rows[0] and "8 / 4" in rows[0]
    assert "cannot be compared" not in together
