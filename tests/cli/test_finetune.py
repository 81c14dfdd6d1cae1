"""`qgen finetune` on the demo pipeline at its smallest settings, and what it refuses."""

import pytest

from tests.cli.commands import refused, run

pytest.importorskip("diffusers")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bias", "brecq"])
def test_finetune_saves_an_ordinary_quantized_pipeline(method, tmp_path):
    from qgen.io.checkpoint import load

    run("quantize", "demo", "--recipe", "rtn-int4", "--out", tmp_path / "int4")
    small = ["--samples", "4", "--keep", "2", "--sampling", "2", "--steps", "3", "--method", method]
    result = run("finetune", tmp_path / "int4", "--teacher", "demo", "--out", tmp_path / "tuned", *small)
    assert "held-out error" in result.stdout
    before, after = (load(tmp_path / name).transformer.state_dict() for name in ("int4", "tuned"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert (tmp_path / "tuned" / "report.html").is_file()


def test_finetune_refuses_before_it_works(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    model = ["finetune", tmp_path / "nothing", "--teacher", "demo"]
    assert "not empty" in refused(*model, "--out", tmp_path / "full")
    assert "did you mean 'qvgen'" in refused(*model, "--out", tmp_path / "new", "--method", "qvgem")
