"""Several processes of one command: each finds its rank, one speaks, and when one fails the others do not wait for it."""

import os
import sys
import time

import pytest

from qgen.cli.processes import relaunch

# Stands for qgen: writes down how it was started, then does what its first argument says.
PROGRAM = """
import os, sys, time
rank = os.environ["RANK"]
with open(os.path.join(os.environ["WITNESS"], rank), "w") as file:
    names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
    file.write(" ".join([*(os.environ.get(name, "-") for name in names), *sys.argv[1:]]))
print("rank", rank, "speaks", flush=True)
if sys.argv[1] == "fail" + rank:
    print("this is why", file=sys.stderr, flush=True)
    sys.exit(7)
time.sleep(60 if sys.argv[1].startswith("fail") else 0)
"""


@pytest.fixture
def witness(tmp_path, monkeypatch):
    (tmp_path / "qgen.py").write_text(PROGRAM)
    monkeypatch.setenv("WITNESS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.chdir(tmp_path)  # `python -m` looks there first
    return tmp_path


def test_every_process_finds_its_rank_and_one_speaks(witness, capfd):
    args = ["eval", "demo", "--processes", "3", "--n", "4"]
    assert relaunch(args, 3, cpu=True) == 0
    seen = [(witness / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in seen] == [["3", str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in seen}) == 1 and {words[5] for words in seen} == {"true"}
    assert all(words[6:] == ["eval", "demo", "--n", "4"] for words in seen)
    assert capfd.readouterr().out == "rank 0 speaks\n"
    assert relaunch(["eval", "--processes=2"], 2, cpu=False) == 0
    assert (witness / "1").read_text().split()[5:] == ["-", "eval"]


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_fails_the_others_do_not_wait_for_it(witness, capfd, rank):
    start = time.monotonic()
    assert relaunch([f"fail{rank}"], 2, cpu=True) == 7
    assert time.monotonic() - start < 50
    assert capfd.readouterr().err.count("this is why") == 1, "said once, whoever failed"
