"""Files of strangers: each way to be wrong is one BadCheckpoint of one line, and no tensor is allocated for it."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgen.errors import BadCheckpoint
from qgen.io import load, save
from qgen.io.files import digest, scan
from qgen.io.header import _sum
from qgen.nn import QuantLinear
from qgen.recipe import Spec
from qgen.site import Draft, Site


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Folders with a bare module: in one file, and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny.quantize(tiny.bare())
    save(model, folder / "one")
    save(model, folder / "shards", max_shard_size="6KB")
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved / name, tmp_path / name)

    return copy


@pytest.fixture
def refused(tiny, monkeypatch):
    """A function that loads a folder and returns the message; nothing may be read or changed before it."""

    def check(folder, read=False):
        into = tiny.bare()
        before = {n: t.clone() for n, t in into.state_dict().items()}
        if not read:
            monkeypatch.setattr(
                "qgen.io.files.Files.read",
                lambda self: pytest.fail("tensors were read before the headers were checked"),
            )
        with pytest.raises(BadCheckpoint) as caught:
            load(folder, into=into)
        monkeypatch.undo()
        assert all(torch.equal(t, into.state_dict()[n]) for n, t in before.items()) and type(into[0]) is torch.nn.Linear
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600 and str(folder.name) in message
        return message

    return check


def split(path):
    """(safetensors header, data) of a file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(path, change, seal=True):
    """Changes qgen's header in a file; with `seal` its own sum is made right again, as somebody with bad intent would."""
    header, data = split(path)
    ours = json.loads(header["__metadata__"]["qgen"])
    change(ours)
    if seal:
        ours.pop("sha256", None)
        ours["sha256"] = _sum(ours)
    header["__metadata__"]["qgen"] = json.dumps(ours)
    join(path, header, data)


def test_untouched_copies_load(copied, tiny):
    for name in ("one", "shards"):
        load(copied(name), into=tiny.bare())


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated(copied, refused, keep):
    path = copied("one") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(path.parent) or "JSON" in refused(path.parent)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 1000])
def test_more_bytes_than_tensors(copied, refused, more):
    path = copied("one") / "model.safetensors"
    path.write_bytes(path.read_bytes() + more)
    assert "truncated or damaged" in refused(path.parent)


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_one_bit_of_data(copied, refused, at):
    path = copied("one") / "model.safetensors"
    header, data = split(path)
    data = bytearray(data)
    data[at] ^= 1
    join(path, header, bytes(data))
    assert "sha256 differs" in refused(path.parent, read=True)


def test_tensors_exchanged_between_layers(copied, refused):
    """Both are as saved, under each other's name."""
    path = copied("one") / "model.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    tensors["2.weight"], tensors["2.running_var"] = tensors["2.running_var"] + 1, tensors["2.weight"]
    save_file(tensors, path, header["__metadata__"])
    assert "sha256 differs" in refused(path.parent, read=True)


SHAPES = {
    "huge": [2**40, 2**40],
    "negative": [-64, -32],
    "float": [64.0, 32],
    "deep": [1] * 40,
    "text": "64x32",
    "other": [32, 96],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_absurd_shapes(copied, refused, shape):
    path = copied("one") / "model.safetensors"
    header, data = split(path)
    header["0.codes"]["shape"] = SHAPES[shape]
    join(path, header, data)
    assert "0.codes" in refused(path.parent)


def test_a_header_longer_than_the_file(copied, refused):
    path = copied("one") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    assert "truncated or no safetensors file" in refused(path.parent)


def test_overlapping_tensors(copied, refused):
    path = copied("one") / "model.safetensors"
    header, data = split(path)
    first, second = "0.down", "0.up"
    header[second]["data_offsets"] = [header[first]["data_offsets"][0], header[first]["data_offsets"][0] + 96 * 8 * 2]
    join(path, header, data)
    assert "starts at byte" in refused(path.parent)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a": 1}', b"\xff\xfe", b'{"a": {}, "a": {}}', b"[" * 100000])
def test_headers_that_are_no_headers(copied, refused, text):
    path = copied("one") / "model.safetensors"
    join(path, text, b"")
    refused(path.parent)


def test_a_repeated_name(copied, refused):
    path = copied("one") / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header).encode()
    again = json.dumps({"0.codes": header["0.codes"]}).encode()[1:-1]
    join(path, text[:-1] + b", " + again + b"}", data)
    assert "appears twice" in refused(path.parent)


def test_not_ours(copied, refused):
    path = copied("one") / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    assert "not written by qgen" in refused(path.parent)


def test_another_version(copied, refused):
    path = copied("one") / "model.safetensors"
    edit(path, lambda h: h.update(format=2))
    assert "format 2, this qgen reads format 1" in refused(path.parent)


def test_a_changed_header(copied, refused):
    path = copied("one") / "model.safetensors"
    edit(path, lambda h: h["layers"][0].update(act=""), seal=False)
    assert "header was changed" in refused(path.parent)


def layer(**changes):
    return lambda h: h["layers"][0].update(changes)


HEADERS = {
    "no-layers": lambda h: h.pop("layers"),
    "layers-dict": lambda h: h.update(layers={}),
    "layer-text": lambda h: h.update(layers=["0"]),
    "twice": lambda h: h["layers"].append(h["layers"][0]),
    "path": layer(path="9"),
    "path-root": layer(path=""),
    "path-number": layer(path=0),
    "float-layer": layer(path="2"),
    "kind": layer(kind="conv3d"),
    "conv": layer(kind="conv2d"),
    "format": layer(weight="int5"),
    "format-list": layer(weight=["int4_g64"]),
    "block": layer(weight="int4_g32"),
    "other-scales": layer(weight="mxfp4"),
    "rank": layer(rank=16),
    "rank-huge": layer(rank=2**60),
    "rank-negative": layer(rank=-8),
    "rank-none": layer(rank=0),
    "hadamard": layer(hadamard=48),
    "hadamard-huge": layer(hadamard=2**40),
    "hadamard-pads": layer(hadamard=256),
    "slots-fewer": layer(slots=[]),
    "slots-more": layer(slots=["smooth", "down", "up", "bias", "zero"]),
    "slots-unknown": layer(slots=["smooth", "down", "up", "bias", "__class__"]),
    "dtype": layer(dtype="float8_e4m3fn"),
    "dtype-code": layer(dtype="load"),
    "extra-key": layer(pickle="x"),
    "missing-tensor": lambda h: h["tensors"].update({"9.weight": "0"}),
    "extra-tensor": lambda h: h["tensors"].pop("2.weight"),
    "alias": lambda h: h["aliases"].update({"9.weight": "8.weight"}),
    "alias-new": lambda h: h["aliases"].update({"9.weight": "2.weight"}),
    "recipe": lambda h: h.update(recipe={"name": "x", "run": "rm"}),
    "recipe-method": lambda h: h["recipe"]["default"].update(methods=[{"method": "os.system"}]),
    "buffers": lambda h: h.update(buffers={"a": "load"}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_fit(copied, refused, case):
    path = copied("one") / "model.safetensors"
    edit(path, HEADERS[case])
    refused(path.parent)


# -- tables over timesteps ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timed(tiny, tmp_path_factory):
    """A folder with a bare module whose first layer has curves over 32 bins: three, of which two move the input."""
    bins, model = 32, tiny.quantize(tiny.bare())
    weight = tiny.bare()[0].weight.detach()
    g = torch.Generator().manual_seed(0)
    offsets = torch.cat([torch.rand(bins, generator=g), torch.zeros(1)])
    draft = Draft(
        (Site("0", "linear", "", 0, "0", (96, 64)),), Spec("int4_g64", "int4_g64", bins=bins), weight, torch.zeros(96),
        edges=torch.arange(1.0, bins), center=torch.randn(1, 64, generator=g).expand(bins + 1, -1),
        dither=torch.randn(64, generator=g), offsets=offsets,
        fixes=torch.randn(bins + 1, 1, generator=g) * torch.randn(1, 96, generator=g),
    )  # fmt: skip
    model[0] = QuantLinear.from_draft(draft, dtype=torch.float32)
    model[0].prepare()
    assert (model[0].layout.bins, model[0].layout.mix, model[0].layout.moved) == (bins + 1, 3, 2)
    folder = tmp_path_factory.mktemp("timed") / "one"
    save(model, folder)
    return folder


@pytest.fixture
def timed_copy(timed, tmp_path):
    return shutil.copytree(timed, tmp_path / "one")


def test_a_layer_with_curves_loads(timed_copy, tiny):
    back = load(timed_copy, into=tiny.bare())
    assert back[0].t_mix.shape == (33, 3) and back[0].t_shift.shape == (2, 64) and back[0].t_bias.shape == (3, 96)


def slots(*left_out, more=()):
    return lambda h: h["layers"][0].update(
        slots=[name for name in (*h["layers"][0]["slots"], *more) if name not in left_out]
    )


def both(*changes):
    return lambda h: [change(h) for change in changes]


TABLES = {
    "mix-none": lambda h: h["layers"][0].pop("mix"),
    "mix-zero": layer(mix=0, moved=0),
    "mix-fewer": layer(mix=2),
    "mix-more": layer(mix=4),
    "mix-negative": layer(mix=-3),
    "mix-huge": layer(mix=2**60),
    "mix-large": layer(mix=2**19, moved=2**18),
    "mix-float": layer(mix=3.0),
    "mix-bool": layer(mix=True, moved=True),
    "mix-text": layer(mix="3"),
    "mix-list": layer(mix=[3]),
    "mix-null": layer(mix=None),
    "moved-none": lambda h: h["layers"][0].pop("moved"),
    "moved-zero": layer(moved=0),
    "moved-beyond": layer(moved=4),
    "moved-all": layer(moved=3),
    "moved-one": layer(moved=1),
    "moved-negative": layer(moved=-1),
    "moved-huge": layer(moved=2**60),
    "moved-without-shift": slots("t_shift"),
    "mix-without-edges": both(slots("t_edges"), layer(bins=1)),
    "mix-without-edges-and-bins": both(slots("t_edges"), lambda h: h["layers"][0].pop("bins")),
    "mix-without-slot": slots("t_mix"),
    "no-mix-with-slot": both(lambda h: h["layers"][0].pop("mix"), lambda h: h["layers"][0].pop("moved")),
    "no-table-at-all": both(slots("t_mix", "t_shift", "t_bias"), layer(mix=0, moved=0)),
    "bins-fewer": layer(bins=32),
    "bins-huge": layer(bins=2**60),
    "bins-large": layer(bins=2**19),
    "bins-one": layer(bins=1),
    "scale-too": slots(more=["t_scale"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_curves_that_do_not_fit(timed_copy, refused, case):
    path = timed_copy / "model.safetensors"
    edit(path, TABLES[case])
    refused(path.parent)


@pytest.mark.parametrize("shape", [(33, 4), (33, 2), (32, 3), (3, 33), (99,), (33, 3, 1), (0, 3), (33, 0)], ids=str)
def test_a_mix_of_another_shape(timed_copy, refused, shape):
    """Everything else says 33 rows of 3: whoever changed the tensor has made its sum right again."""
    path = timed_copy / "model.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    tensors["0.t_mix"] = torch.zeros(shape)
    save_file(tensors, path, header["__metadata__"])
    edit(path, lambda h: h["tensors"].update({"0.t_mix": digest(tensors["0.t_mix"])}))
    assert "0.t_mix" in refused(path.parent)


@pytest.mark.parametrize(
    "slot, shape", [("t_shift", (3, 64)), ("t_shift", (33, 64)), ("t_bias", (2, 96)), ("t_bias", (33, 96))]
)
def test_rows_that_do_not_go_with_the_mix(timed_copy, refused, slot, shape):
    path = timed_copy / "model.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    tensors[f"0.{slot}"] = torch.zeros(shape, dtype=tensors[f"0.{slot}"].dtype)
    save_file(tensors, path, header["__metadata__"])
    edit(path, lambda h: h["tensors"].update({f"0.{slot}": digest(tensors[f"0.{slot}"])}))
    assert f"0.{slot}" in refused(path.parent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_a_mix_of_another_dtype(timed_copy, refused, dtype):
    path = timed_copy / "model.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    tensors["0.t_mix"] = tensors["0.t_mix"].to(dtype)
    save_file(tensors, path, header["__metadata__"])
    edit(path, lambda h: h["tensors"].update({"0.t_mix": digest(tensors["0.t_mix"])}))
    assert "0.t_mix" in refused(path.parent)


@pytest.mark.parametrize("slot", ["codes", "scales", "up", "bias"])
def test_a_slot_of_another_dtype(copied, refused, slot):
    path = copied("one") / "model.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    tensors[f"0.{slot}"] = tensors[f"0.{slot}"].to(torch.int16)
    save_file(tensors, path, header["__metadata__"])
    edit(path, lambda h: h["tensors"].update({f"0.{slot}": digest(tensors[f"0.{slot}"])}))
    assert f"0.{slot}" in refused(path.parent) and "int16" in refused(path.parent)


SHARDS = {
    "up": "../model-00001.safetensors",
    "absolute": "/etc/passwd",
    "backslash": "..\\model.safetensors",
    "pickle": "model.bin",
    "absent": "model-00009-of-00009.safetensors",
    "below": "a/model.safetensors",
}


@pytest.mark.parametrize("name", SHARDS)
def test_names_of_shards(copied, refused, name):
    folder = copied("shards")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][next(iter(data["weight_map"]))] = SHARDS[name]
    index.write_text(json.dumps(data))
    assert "shard" in refused(folder)


@pytest.mark.parametrize("how", ["missing", "extra", "moved", "duplicate", "other-model", "no-map"])
def test_index_and_shards_disagree(copied, refused, how):
    folder = copied("shards")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    names = sorted(data["weight_map"])
    first, last = (folder / data["weight_map"][names[i]] for i in (0, -1))
    if how == "missing":
        del data["weight_map"][names[0]]
    elif how == "extra":
        data["weight_map"]["9.weight"] = first.name
    elif how == "moved":
        data["weight_map"][names[0]] = last.name
    elif how == "duplicate":
        save_file({**load_file(last), names[0]: load_file(first)[names[0]]}, last, split(last)[0]["__metadata__"])
    elif how == "other-model":
        edit(last, lambda h: h.update(report=[]))
    else:
        data["weight_map"] = [names]
    index.write_text(json.dumps(data))
    refused(folder)


def test_pickles_are_never_opened(tmp_path, tiny):
    torch.save(tiny.bare().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
        load(tmp_path, into=tiny.bare())


# -- models that come with a config -----------------------------------------------------------------------------------


@pytest.fixture
def flux(tiny, tmp_path):
    save(tiny.quantize(tiny.flux()), tmp_path / "flux")
    return tmp_path / "flux"


def test_bits_are_checked_by_from_pretrained_too(tiny, flux, tmp_path):
    save(tiny.quantize(tiny.llama()), tmp_path / "llama")
    for path, kind in (
        (flux / "diffusion_pytorch_model.safetensors", tiny.flux),
        (tmp_path / "llama" / "model.safetensors", tiny.llama),
    ):
        header, data = split(path)
        join(path, header, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BadCheckpoint, match="sha256 differs"):
            type(kind()).from_pretrained(path.parent)


CONFIGS = {
    "no-class": ({"_class_name": None}, "no model class"),
    "no-model": ({"_class_name": "FluxPipeline"}, "no model class"),
    "code": ({"_class_name": "__import__"}, "no model class"),
    "other-class": ({"_class_name": "PixArtTransformer2DModel"}, "architecture|no model can be built"),
    "wider": ({"num_attention_heads": 4}, "shape"),
    "deeper": ({"num_layers": 2}, "architecture"),
    "negative": ({"num_attention_heads": -4}, "no model can be built|shape"),
    "text": ({"num_layers": "many"}, "no model can be built"),
    "absurd": ({"attention_head_dim": 2**40, "axes_dims_rope": [8, 12, 12]}, "no model can be built|shape"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(flux, case):
    changes, message = CONFIGS[case]
    config = flux / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(BadCheckpoint, match=message):
        load(flux)


def test_no_config(flux):
    (flux / "config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        load(flux)


def test_components_of_a_pipeline(tmp_path, flux):
    for name in ("../flux", "a/b", "/etc"):
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "FluxPipeline", name: ["diffusers", "X"]})
        )
        with pytest.raises(BadCheckpoint, match="name of a component"):
            load(tmp_path)


def test_scan_reads_what_safetensors_writes(tmp_path):
    """Every dtype that torch and safetensors share, empty and 0-d tensors too: against safetensors' own reader."""
    kinds = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
    )
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds} | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    files = scan(tmp_path)
    assert {n: (e.dtype, e.shape) for n, e in files.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    for name, tensor in files.read():
        assert digest(tensor) == digest(tensors[name])
