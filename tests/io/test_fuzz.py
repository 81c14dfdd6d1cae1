"""Files of strangers: hostile ones made by hand, and some thousands from the mutator (tests/io/fuzz.py runs as many as one likes)."""

import importlib.util
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qgen.errors import BadCheckpoint, QgenError
from qgen.io.peers.base import importers
from qgen.io.peers.source import open_source


@pytest.fixture(scope="module")
def mutator():
    spec = importlib.util.spec_from_file_location("qgen_tests_fuzz", Path(__file__).with_name("fuzz.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- by hand --------------------------------------------------------------------------------------------------------------

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]},
}


def file(header, data=b"\0" * 28, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def claim(**changes):
    return file({**GOOD, "a": {**GOOD["a"], **changes}})


HEADERS = {
    "no byte": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "no header": (struct.pack("<Q", 0), "truncated"),
    "a header of 2^63 bytes": (file(GOOD, length=2**63), "truncated"),
    "a header of 2^64 - 1 bytes": (file(GOOD, length=2**64 - 1), "truncated"),
    "a header beyond the end": (file(GOOD, length=1000), "truncated"),
    "a header that ends early": (file(GOOD, length=20), "JSON"),
    "a header that swallows data": (file(GOOD, length=len(json.dumps(GOOD)) + 4), "JSON"),
    "no JSON": (file(b"{nothing}"), "JSON"),
    "no UTF-8": (file(b'{"\xff\xfe": 1}'), "JSON"),
    "a list": (file([1]), "JSON object"),
    "a number": (file(b"7"), "JSON object"),
    "100,000 brackets": (file(b"[" * 100_000), "JSON"),
    "100,000 braces": (file(b'{"a":' * 100_000), "JSON"),
    "a name twice": (
        file(b'{"a": ' + json.dumps(GOOD["a"]).encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}"),
        "appears twice",
    ),
    "texts that are numbers": (file({"__metadata__": {"format": 1}, **GOOD}), "must map names to texts"),
    "texts in a list": (file({"__metadata__": ["pt"], **GOOD}), "must map names to texts"),
    "a claim that is a text": (file({**GOOD, "a": "F32"}), "wanted dtype, shape and data_offsets"),
    "a claim without offsets": (
        file({**GOOD, "a": {"dtype": "F32", "shape": [2, 3]}}),
        "wanted dtype, shape and data_offsets",
    ),
    "a claim with more": (claim(pickle="x"), "wanted dtype, shape and data_offsets"),
    "an unknown dtype": (claim(dtype="F128"), "has the dtype 'F128'"),
    "a dtype that is a list": (claim(dtype=["F32"]), "has the dtype"),
    "a negative size": (claim(shape=[-2, -3]), "has the shape"),
    "a size of 2.0": (claim(shape=[2.0, 3]), "has the shape"),
    "a size of true": (claim(shape=[True, 6]), "has the shape"),
    "a size of NaN": (file(json.dumps(GOOD).replace("[2, 3]", "[NaN, 3]").encode()), "has the shape"),
    "sizes whose product wraps to 6": (claim(shape=[2**32, 2**32, 6]), "takes"),
    "sizes of 2^62": (claim(shape=[2**62, 2**62]), "takes"),
    "sizes of 4000 digits": (claim(shape=[10**3999, 10**3999, 10**3999]), "a"),
    "17 dimensions": (claim(shape=[1] * 16 + [6]), "has the shape"),
    "another size": (claim(shape=[2, 4]), "takes 32 bytes, the file holds 24"),
    "offsets backwards": (claim(data_offsets=[24, 0]), "holds -24"),
    "three offsets": (claim(data_offsets=[0, 12, 24]), "has the shape"),
    "offsets beyond the end": (
        file({"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}),
        "truncated or damaged",
    ),
    "tensors that overlap": (
        file({**GOOD, "b": {"dtype": "U8", "shape": [8], "data_offsets": [20, 28]}}),
        "starts at byte 20",
    ),
    "one tensor in another": (
        file({**GOOD, "b": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}}),
        "starts at byte 0",
    ),
    "a gap": (file({"b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}}), "starts at byte 24"),
    "bytes after the last": (file(GOOD, b"\0" * 29), "truncated or damaged"),
    "bytes missing": (file(GOOD, b"\0" * 27), "truncated or damaged"),
}


def refused(path, words="", kind=BadCheckpoint):
    """The one line for a file that must be refused."""
    with pytest.raises(kind) as caught:
        open_source(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000 and str(path.name)[:20] in line and words in line, line
    return line


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case, tmp_path):
    raw, words = HEADERS[case]
    (tmp_path / "x.safetensors").write_bytes(raw)
    refused(tmp_path / "x.safetensors", words)


def test_the_good_header_is_good(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(file(GOOD))
    assert open_source(tmp_path / "x.safetensors").shapes == {"a": (2, 3), "b": (4,)}


def shards(folder, names, weight_map):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.ones(2)}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return folder


ONE = "model-00001-of-00001.safetensors"
INDEXES = {
    "up": ([ONE], {"t0": "../secret.safetensors"}, "same folder"),
    "absolute": ([ONE], {"t0": "/etc/passwd"}, "same folder"),
    "absolute safetensors": ([ONE], {"t0": "/tmp/x.safetensors"}, "same folder"),
    "backslash": ([ONE], {"t0": "..\\x.safetensors"}, "same folder"),
    "below": ([ONE], {"t0": "a/x.safetensors"}, "same folder"),
    "a pickle": ([ONE], {"t0": "pytorch_model.bin"}, "safetensors files"),
    "dots": ([ONE], {"t0": ".."}, "same folder"),
    "absent": ([ONE], {"t0": "other.safetensors"}, "not there"),
    "a null byte": ([ONE], {"t0": "a\0.safetensors"}, "not there"),
    "a name of half a surrogate": ([ONE], {"t0": "\ud800.safetensors"}, ""),
    "another tensor": ([ONE], {"t1": ONE}, "index says"),
    "one more tensor": ([ONE], {"t0": ONE, "t9": ONE}, "index says"),
    "exchanged": (["a.safetensors", "b.safetensors"], {"t0": "b.safetensors", "t1": "a.safetensors"}, "index says"),
    "no JSON": ([ONE], "{", "JSON"),
    "deep JSON": ([ONE], '{"weight_map":' * 100_000, "JSON"),
    "a list": ([ONE], '{"weight_map": ["model"]}', "weight_map"),
    "empty": ([ONE], {}, "weight_map"),
    "numbers": ([ONE], {"t0": 7}, "weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(case, tmp_path):
    names, weight_map, words = INDEXES[case]
    save_file({"t0": torch.ones(2)}, tmp_path / "secret.safetensors")
    refused(shards(tmp_path / "model", names, weight_map), words)


def test_an_endless_name_of_a_shard(tmp_path):
    refused(shards(tmp_path / "model", [ONE], {"t0": "a" * 5000 + ".safetensors"}), kind=QgenError)


def test_two_files_with_one_tensor(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"t": torch.ones(2)}, tmp_path / name)
    refused(tmp_path, "holds 't', which")


@pytest.fixture
def outside(tmp_path):
    """A folder, and a good file that is not in it."""
    (tmp_path / "there").mkdir()
    (tmp_path / "model").mkdir()
    save_file({"t0": torch.ones(2)}, tmp_path / "there" / "x.safetensors")
    (tmp_path / "there" / "config.json").write_text("{}")
    return tmp_path / "model", tmp_path / "there"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", ONE, "odd.safetensors", "model.safetensors.index.json"]
)
def test_links_out_of_the_folder(name, outside):
    folder, there = outside
    if name == ONE:
        shards(folder, ["b.safetensors"], {"t0": ONE})
    elif name == "config.json":
        save_file({"t0": torch.ones(2)}, folder / "model.safetensors")
    os.symlink(there / ("config.json" if name.endswith("json") else "x.safetensors"), folder / name)
    with pytest.raises(BadCheckpoint, match="link out of its folder"):
        open_source(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_that_are_welcome(outside):
    """Inside the folder; of the hub's cache into its own blobs; and a file that the user named."""
    folder, there = outside
    os.symlink("real.st", folder / "model.safetensors")
    (folder / "real.st").write_bytes((there / "x.safetensors").read_bytes())
    assert open_source(folder).shapes == {"t0": (2,)}
    cache = there / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1234" / "transformer").mkdir(parents=True)
    (there / "x.safetensors").rename(cache / "blobs" / "abcd")
    for place, link in (
        (cache / "snapshots/1234", "../../blobs/abcd"),
        (cache / "snapshots/1234/transformer", "../../../blobs/abcd"),
    ):
        os.symlink(link, place / "model.safetensors")
        assert open_source(place).shapes == {"t0": (2,)}
    os.symlink(cache / "blobs" / "abcd", there / "mine.safetensors")
    assert open_source(there / "mine.safetensors").shapes == {"t0": (2,)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file(tmp_path):
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "no ordinary file")
    refused(tmp_path, "no ordinary file")
    (tmp_path / "loop").mkdir()
    os.symlink("model.safetensors", tmp_path / "loop" / "model.safetensors")
    with pytest.raises(QgenError):
        open_source(tmp_path / "loop")
    (tmp_path / "deep" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(QgenError):
        open_source(tmp_path / "deep")
    refused(tmp_path / "none.safetensors", "no file or folder", QgenError)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.where),)


@pytest.mark.parametrize(
    "name", ["x.pt", "x.ckpt", "x.bin", "x.pth", "x.PT", "x.pkl", "archive.safetensors", "old.safetensors", "x"]
)
def test_pickles_are_never_opened(name, tmp_path):
    Bomb.where = tmp_path / "exploded"
    path = tmp_path / name
    if name == "archive.safetensors":
        torch.save({"a": Bomb()}, path)
    elif name == "x":
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    line = refused(path, "pickle")
    assert "safetensors" in line and not Bomb.where.exists()


def test_a_folder_with_nothing_but_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    line = refused(tmp_path / "pytorch_model.bin", "is a pickle")
    with pytest.raises(BadCheckpoint, match="is a pickle"):
        open_source(tmp_path)
    assert "weights_only=True" in line


@pytest.mark.parametrize("said", [b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_configs(said, tmp_path):
    save_file({"t": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(said)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        open_source(tmp_path)


# -- by the thousand --------------------------------------------------------------------------------------------------------


def test_seeds_reach_every_importer(mutator):
    """Undamaged, each kind is recognized and imported; together they are all importers that there are."""
    fuzzer = mutator.Fuzzer()
    reached = set()
    try:
        for kind, found in fuzzer.seeds.items():
            folder = fuzzer.room / kind
            folder.mkdir()
            path = folder / ("x.gguf" if isinstance(found, bytes) else "x.safetensors")
            path.write_bytes(found if isinstance(found, bytes) else mutator.file_of(*mutator.packed(*found[:2])))
            if not isinstance(found, bytes) and found[2]:
                (folder / "config.json").write_text(json.dumps(found[2]))
            source = open_source(path)
            for name, importer in importers.items():
                if importer.recognizes(source):
                    assert list(mutator.floats(importer.parts(source)))
                    reached.add(name)
    finally:
        fuzzer.close()
    assert reached == set(importers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="alarms and limits are POSIX's")
def test_damaged_files_are_refused_in_one_line(mutator):
    outcomes, failures = mutator.fuzz(3000, seed=20)
    assert not failures, "\n".join(f"case {number}: {told}" for number, told in failures.values())
    assert outcomes["refused"] > 500 and sum(count for kind, count in outcomes.items() if kind.startswith("ok")) > 100
