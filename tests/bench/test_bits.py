"""Bits per weight, counted on files made by hand."""

import pytest
import torch
from safetensors.torch import save_file

from qgen.bench.bits import count
from qgen.errors import BadCheckpoint

LAYERS = {"block.0.to_q": (8, 16), "block.0.to_q.inner": (4, 4)}


def test_every_tensor_goes_to_the_longest_path_that_it_lies_under(tmp_path):
    tensors = {
        "block.0.to_q.weight": torch.zeros(8, 8, dtype=torch.uint8),  # 64 bytes
        "block.0.to_q.weight.absmax": torch.zeros(8),  # 32
        "block.0.to_q._weight_scale": torch.zeros(2, dtype=torch.float8_e4m3fn),  # 2
        "block.0.to_q.inner.codes": torch.zeros(8, dtype=torch.uint8),  # 8
        "block.0.to_qkv.weight": torch.zeros(3, dtype=torch.bfloat16),  # 6, another layer's
        "head.weight": torch.zeros(2, 2, dtype=torch.bfloat16),  # 8
    }
    save_file(tensors, str(tmp_path / "model.safetensors"))
    found = count(tmp_path, LAYERS, keep=("head",))
    assert (found.nbytes, found.other, found.weights) == (64 + 32 + 2 + 8, 6 + 8, 8 * 16 + 16)
    assert found.bits == 8 * 106 / 144
    assert found.file == (tmp_path / "model.safetensors").stat().st_size
    assert (found.left, found.more) == ((), ())
    both = found + found
    assert both.bits == found.bits and both.nbytes == 212


def test_layers_left_in_floats_and_layers_changed_beyond_those_asked_for_are_named(tmp_path):
    tensors = {
        "a.weight": torch.zeros(4, 6, dtype=torch.float16),
        "b.weight": torch.zeros(4, 3, dtype=torch.uint8),
        "kept.weight": torch.zeros(4, 4, dtype=torch.int8),
        "free.weight": torch.zeros(4, 4),
    }
    save_file(tensors, str(tmp_path / "model.safetensors"))
    found = count(tmp_path, {"a": (4, 6), "b": (4, 6)}, keep=("kept", "free"))
    assert found.left == ("a",) and found.more == ("kept",)
    assert found.bits == 8 * (48 + 12) / 48


def test_shards_are_summed(tmp_path):
    save_file({"a.codes": torch.zeros(3, dtype=torch.uint8)}, str(tmp_path / "model-00001-of-00002.safetensors"))
    save_file({"a.scales": torch.zeros(1)}, str(tmp_path / "model-00002-of-00002.safetensors"))
    assert count(tmp_path, {"a": (2, 4)}).nbytes == 7


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "diffusers")
    weight = torch.randn(4, 64).numpy()
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("a.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("b.weight", weight)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = count(tmp_path, {"a": (4, 64), "b": (4, 64)})
    assert found.nbytes == 4 * 2 * 18 + 4 * 64 * 4  # a block of 32: 16 bytes of codes, 2 of scale
    assert found.left == ("b",)


def test_what_cannot_be_counted_is_an_error(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"holds no \.safetensors"):
        count(tmp_path, {"a": (2, 2)})
    save_file({"b.weight": torch.zeros(2, 2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(BadCheckpoint, match="no tensor of the layer 'a'"):
        count(tmp_path, {"a": (2, 2)})
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(BadCheckpoint, match="no safetensors file"):
        count(tmp_path, {"a": (2, 2)})
