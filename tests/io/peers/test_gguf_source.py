"""A GGUF header is believed in nothing: each way to lie is one BadCheckpoint that names the file, before any tensor is read."""

import random
import struct

import numpy as np
import pytest
import torch

from qgen.errors import BadCheckpoint, QgenError
from qgen.io.peers.gguf_source import BLOCK_TYPES, PLAIN_TYPES, open_gguf

gguf = pytest.importorskip("gguf", reason="the format's own package writes the files")


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, dims, kind, offset):
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


def build(keys=(), tensors=(), data=b"", version=3, counts=None, magic=b"GGUF"):
    """A file, written by hand from the specification."""
    head = magic + struct.pack("<I", version) + struct.pack("<QQ", *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ONE = tensor("a", (4, 2), 0, 0)
DATA = np.arange(8, dtype="<f4").tobytes()


def test_a_file_written_by_hand(tmp_path):
    path = tmp_path / "a.gguf"
    keys = [
        key("general.alignment", 4, struct.pack("<I", 64)),
        key("s", 8, text("ü")),
        key("long", 9, struct.pack("<IQ", 4, 20) + bytes(80)),
        key("words", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        key("short", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", -1, 7)),
        key("yes", 7, b"\1"),
        key("half", 6, struct.pack("<f", 0.5)),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(keys)) + b"".join(keys) + ONE + tensor("b", (2,), 1, 64)
    path.write_bytes(head + bytes(-len(head) % 64) + DATA.ljust(64, b"\0") + np.float16([1, -2]).tobytes())
    source = open_gguf(path)
    assert source.texts == {"general.alignment": 64, "s": "ü", "short": (-1, 7), "yes": True, "half": 0.5}
    assert source.metadata["short"] == "(-1, 7)"
    assert source.shapes == {"a": (2, 4), "b": (2,)} and source.dtypes == {"a": torch.float32, "b": torch.float16}
    assert torch.equal(source.read("a"), torch.arange(8.0).view(2, 4)) and source.read("b").tolist() == [1, -2]
    with pytest.raises(ValueError, match="unknown tensor 'c'"):
        source.read("c")


def test_sizes_of_types_are_the_packages():
    theirs = {kind.name: (kind.value, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    for name, sizes in BLOCK_TYPES.items():
        assert theirs[name] == sizes
    for name, (number, dtype) in PLAIN_TYPES.items():
        assert theirs[name] == (number, 1, dtype.itemsize)


def test_what_the_package_writes(tmp_path):
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.normal(size=(3, 5)).astype("f4"),
        "f16": rng.normal(size=7).astype("f2"),
        "i32": np.arange(6, dtype="i4").reshape(1, 2, 3),
    }
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("tokens", ["a", "b"])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    raw = rng.integers(0, 256, (4, 2 * 18), dtype=np.uint8)
    writer.add_tensor("q", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    source = open_gguf(path)
    for name, array in arrays.items():
        assert np.array_equal(source.read(name).numpy(), array) and source.logical[name] == array.shape
    assert np.array_equal(source.read("q").numpy(), raw)
    assert (source.shapes["q"], source.logical["q"], source.types["q"]) == ((4, 36), (4, 64), "Q4_0")
    assert source.texts["general.architecture"] == "flux"


HOSTILE = {
    "empty": b"",
    "no magic": build(magic=b"GGML"),
    "version 1": build(version=1),
    "big-endian": build(version=3 << 24),
    "cut in the counts": build()[:12],
    "2^64 tensors": build(counts=(2**64 - 1, 0)),
    "2^64 texts": build(counts=(0, 2**64 - 1)),
    "more tensors than there are": build(tensors=[ONE], data=DATA, counts=(2, 0)),
    "key without end": build(keys=[struct.pack("<Q", 2**63) + b"k"]),
    "key that is no UTF-8": build(keys=[key(b"\xff\xfe", 4, bytes(4))]),
    "key twice": build(keys=[key("k", 4, bytes(4))] * 2),
    "text without end": build(keys=[key("k", 8, struct.pack("<Q", 2**40))]),
    "value of no type": build(keys=[key("k", 99, bytes(8))]),
    "array without end": build(keys=[key("k", 9, struct.pack("<IQ", 10, 2**61))]),
    "array of endless texts": build(keys=[key("k", 9, struct.pack("<IQ", 8, 2**60))]),
    "array of arrays of arrays …": build(keys=[key("k", 9, struct.pack("<IQ", 9, 1) * 200)]),
    "alignment 0": build(keys=[key("general.alignment", 4, bytes(4))]),
    "alignment 24": build(keys=[key("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment 2^31": build(keys=[key("general.alignment", 4, struct.pack("<I", 2**31))]),
    "alignment as text": build(keys=[key("general.alignment", 8, text("32"))]),
    "alignment as true": build(keys=[key("general.alignment", 7, b"\1")]),
    "tensor twice": build(tensors=[ONE, ONE], data=DATA * 2),
    "tensor without a name": build(tensors=[tensor("", (4, 2), 0, 0)], data=DATA),
    "name of a megabyte": build(tensors=[tensor("n" * 2**20, (4, 2), 0, 0)], data=DATA),
    "2^32 dimensions": build(tensors=[text("a") + struct.pack("<I", 2**32 - 1)], data=DATA * 20),
    "a dimension of 0": build(tensors=[tensor("a", (0, 2), 0, 0)], data=DATA),
    "a dimension of 2^63": build(tensors=[tensor("a", (2**63, 2), 0, 0)], data=DATA),
    "a product beyond 64 bits": build(tensors=[tensor("a", (2**12,) * 6, 0, 0)], data=bytes(4096)),
    "type 4, which was taken back": build(tensors=[tensor("a", (32, 2), 4, 0)], data=DATA),
    "type 2^32 - 1": build(tensors=[tensor("a", (32, 2), 2**32 - 1, 0)], data=DATA),
    "rows that are no blocks": build(tensors=[tensor("a", (33, 2), 2, 0)], data=bytes(64)),
    "a block type without rows": build(tensors=[tensor("a", (), 2, 0)], data=bytes(64)),
    "offset off the alignment": build(tensors=[tensor("a", (4, 2), 0, 4)], data=DATA * 2),
    "offset of 2^64 - 32": build(tensors=[tensor("a", (4, 2), 0, 2**64 - 32)], data=DATA),
    "overlap": build(tensors=[ONE, tensor("b", (4, 2), 0, 0)], data=DATA),
    "gap": build(tensors=[ONE, tensor("b", (4, 2), 0, 64)], data=DATA * 3),
    "data cut off": build(tensors=[ONE], data=DATA[:-1]),
    "folded from another size": build(
        keys=[key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", 3, 3))],
        tensors=[ONE],
        data=DATA,
    ),
    "folded from negative sizes": build(
        keys=[key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", -2, -4))],
        tensors=[ONE],
        data=DATA,
    ),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_files_are_refused(why, tmp_path, monkeypatch):
    path = tmp_path / "evil.gguf"
    path.write_bytes(HOSTILE[why])
    monkeypatch.setattr(
        "torch.empty", lambda *a, **k: pytest.fail("a tensor was allocated before the header was checked")
    )
    with pytest.raises(BadCheckpoint) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "evil.gguf" in message and "\n" not in message and len(message) < 600


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build(tensors=[ONE], data=DATA))
    source = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadCheckpoint, match="'a'"):
        source.read("a")


def test_damaged_headers_raise_nothing_else(tmp_path):
    """Bytes of a good file changed at random, from one seed: it opens and reads, or it is a QgenError."""
    path, rng = tmp_path / "a.gguf", random.Random(0)
    keys = [key("general.alignment", 4, struct.pack("<I", 32)), key("w", 9, struct.pack("<IQ", 8, 1) + text("x"))]
    good = build(keys, [ONE, tensor("b.weight", (32, 2), 2, 32)], DATA + bytes(36))
    opened = 0
    for _ in range(4000):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw) - len(DATA))
            raw[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw)
        try:
            source = open_gguf(path)
            for name in source.shapes:
                source.read(name)
            opened += 1
        except QgenError:
            pass
    assert 0 < opened < 3000
