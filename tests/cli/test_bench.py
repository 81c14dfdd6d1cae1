"""`qgen bench peers` from the command line."""

import csv
import json

import pytest

from tests.cli.commands import refused, run


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "unknown peer" in refused("bench", "peers", "--peers", "torcha", *out)
    assert "PEER=PATH" in refused("bench", "peers", "--python", "torchao", *out)
    assert "no file" in refused("bench", "peers", "--python", "torchao=nowhere/python", *out)
    assert "--dtype is bfloat16 or float16" in refused("bench", "peers", "--dtype", "float32", *out)
    assert "--prompts SET" in refused("bench", "peers", "--pipeline", str(tmp_path), *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_recipe_and_a_peer_side_by_side(tmp_path):
    pytest.importorskip("bitsandbytes")
    args = ["bench", "peers", "--peers", "qgen:rtn-int4,bitsandbytes:nf4", "--n", 2, "--steps", 2, "--pairs", 1]
    args += ["--samples", 2, "--out", tmp_path]
    run(*args)
    rows = list(csv.DictReader((tmp_path / "peers.csv").open(encoding="utf-8")))
    assert [(r["peer"], r["config"], r["error"]) for r in rows] == [
        ("unquantized", "original", ""), ("qgen", "rtn-int4", ""), ("bitsandbytes", "nf4", ""),
    ]  # fmt: skip
    assert float(rows[0]["PSNR, dB"]) == float("inf") and float(rows[0]["bits per weight"]) < 16.1
    for row in rows[1:]:
        assert 4.2 < float(row["bits per weight"]) < 4.7 and 10 < float(row["PSNR, dB"]) < 60
        assert float(row["quantize, s"]) > 0 and float(row["time, x 16-bit"]) > 0
    first = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert "8-bit inputs where text" in (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert (tmp_path / "pictures" / "peers.png").stat().st_size > 10_000
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("row.json")}
    run(*args)  # nothing is measured again
    assert json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))["rows"] == first["rows"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("row.json")} == times
