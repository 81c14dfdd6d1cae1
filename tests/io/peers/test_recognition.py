"""Who recognizes what: a sample of every file is claimed by exactly one importer, and plain checkpoints by none of those below.

Samples are made from names, shapes, dtypes and texts alone, which is all that `recognizes` may look at; reading a tensor fails the test.
"""

import json

import pytest
import torch

from qgen.io.peers.base import importers

I32, U8, I8, F8 = torch.int32, torch.uint8, torch.int8, torch.float8_e4m3fn
MINE = ("awq", "bitsandbytes", "compressed-tensors", "gguf", "gptq", "torchao")


def method(name, **more):
    return {"quantization_config": {"quant_method": name, **more}}


def triple(words, zeros, n=64, g=4):
    return {"a.qweight": ((words), I32), "a.qzeros": (zeros, I32), "a.scales": ((g, n), torch.float16)}


GPTQ, AWQ = triple((32, 64), (4, 8)), triple((256, 8), (4, 8))
SAMPLES = {
    "gptq": [("names alone", GPTQ, {}, {}), ("with g_idx", {**GPTQ, "a.g_idx": ((256,), I32)}, {}, method("gptq", bits=4))],
    "awq": [("names alone", AWQ, {}, {}), ("with a config", AWQ, {}, method("awq", bits=4, version="gemm"))],
    "bitsandbytes": [
        (
            "nf4",
            {
                "a.weight": ((8192, 1), U8), "a.weight.absmax": ((256,), torch.float32), "a.weight.quant_map": ((16,), torch.float32),
                "a.weight.quant_state.bitsandbytes__nf4": ((90,), U8),
            },
            {}, method("bitsandbytes", load_in_4bit=True),
        ),
        ("int8", {"a.weight": ((64, 64), I8), "a.SCB": ((64,), torch.float32)}, {}, {}),
    ],
    "compressed-tensors": [
        (
            "pack-quantized",
            {"a.weight_packed": ((64, 8), I32), "a.weight_scale": ((64, 1), torch.bfloat16), "a.weight_shape": ((2,), torch.int64)},
            {}, {},
        ),
        (
            "nvfp4-pack",
            {"a.weight_packed": ((64, 32), U8), "a.weight_scale": ((64, 4), F8), "a.weight_global_scale": ((1,), torch.float32)},
            {}, {},
        ),
        (
            "float-quantized", {"a.weight": ((64, 64), F8), "a.weight_scale": ((64, 1), torch.bfloat16)}, {},
            method("compressed-tensors", format="float-quantized"),
        ),
        (
            "one file", {"a.weight": ((64, 64), I8), "a.weight_scale": ((64, 1), torch.bfloat16)},
            {"quantization_config": json.dumps({"quant_method": "compressed-tensors"})}, {},
        ),
    ],
    "torchao": [
        (
            "int8", {"a._weight_qdata": ((64, 64), I8), "a._weight_scale": ((64, 1), torch.float32), "a.bias": ((64,), torch.float32)},
            {"tensor_names": '["a.weight", "a.bias"]', "a.weight": '{"_type": "Int8Tensor", "_data": {}}', "a.bias": '{"_type": "Tensor"}'},
            method("torchao"),
        ),
    ],
}  # fmt: skip

OTHERS = {
    "plain": ({"a.weight": ((64, 64), torch.bfloat16)}, {}, {}),
    "plain with a torchao text": (
        {"a.weight": ((64, 64), torch.bfloat16)},
        {"tensor_names": '["a.weight"]', "a.weight": '{"_type": "Tensor"}'},
        {},
    ),
    "float8 of ComfyUI": ({"a.weight": ((64, 64), F8), "a.weight_scale": ((), torch.float32), "a.comfy_quant": ((30,), U8)}, {}, {}),
    "nvfp4 of ComfyUI": (
        {"a.weight": ((64, 32), U8), "a.weight_scale": ((128, 4), F8),
         "a.weight_scale_2": ((), torch.float32), "a.comfy_quant": ((30,), U8)},
        {},
        {},
    ),
    "Nunchaku": (
        {"a.qweight": ((128, 64), I8), "a.wscales": ((2, 128), torch.bfloat16), "a.proj_down": ((128, 16), torch.bfloat16)}, {}, {},
    ),
    "Nunchaku's AWQ": (
        {"a.qweight": ((32, 64), I32), "a.wscales": ((2, 128), torch.bfloat16), "a.wzeros": ((2, 128), torch.bfloat16)},
        {},
        {},
    ),
    "qgen": ({"a.codes": ((64, 32), U8), "a.scales": ((64, 1), torch.bfloat16)}, {"qgen": "{}"}, {}),
    "half a GPTQ layer": ({"a.qweight": ((32, 64), I32), "a.scales": ((4, 64), torch.float16)}, {}, {}),
    "GPTQ's names, another method": (GPTQ, {}, method("auto-round")),
    "AWQ's names, another method": (AWQ, {}, method("quark")),
    "packed names, another method": (SAMPLES["compressed-tensors"][0][1], {}, method("modelopt")),
    "nothing": ({}, {}, {}),
    "damaged texts": (
        {"a.weight": ((2,), torch.float32)}, {"tensor_names": "[", "quantization_config": "{" * 9000},
        {"quantization_config": 3},
    ),
}  # fmt: skip


@pytest.fixture
def made(dict_source):
    def make(entries, texts, config):
        source = dict_source(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in entries.items()},
            texts,
            config,
        )
        source.read = lambda name: pytest.fail(f"{name} was read to recognize a file")
        return source

    return make


def claims(source):
    return [name for name, importer in importers.items() if importer.recognizes(source)]


@pytest.mark.parametrize(
    ("owner", "sample"),
    [(owner, sample) for owner, samples in SAMPLES.items() for sample in samples],
    ids=lambda v: v if isinstance(v, str) else v[0],
)
def test_exactly_one_importer(owner, sample, made):
    assert claims(made(*sample[1:])) == [owner]


@pytest.mark.parametrize("what", OTHERS)
def test_others_are_left_alone(what, made):
    assert not set(claims(made(*OTHERS[what]))) & set(MINE)


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the format's own package writes the file")
    import numpy as np

    from qgen.io.peers.source import open_source

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_tensor("a.weight", np.ones((2, 32), "f4"))
    writer.add_tensor("a.qweight", np.ones((32, 64), "i4"))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert claims(open_source(tmp_path / "a.gguf")) == ["gguf"]


def test_all_of_them_are_registered():
    assert set(MINE) <= set(importers)
    assert all(importers[name].about for name in MINE)


ODD = [None, True, -1, 10**30, 1.5, "x", [], [[]], {}, {"a": {}}]
KEYS = (
    "quant_method",
    "format",
    "config_groups",
    "checkpoint_format",
    "bits",
    "group_size",
    "version",
    "w_bit",
    "q_group_size",
)


@pytest.mark.parametrize("owner", SAMPLES)
def test_odd_configs_and_texts_raise_nothing_else(owner, dict_source):
    """Every value of a config and of a text replaced by every kind of JSON: parts, or BadCheckpoint."""
    _, entries, texts, config = SAMPLES[owner][-1]
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in entries.items()}
    for key in KEYS:
        for value in ODD:
            said = {**config.get("quantization_config", {"quant_method": owner}), key: value}
            for group in (
                said,
                {
                    **said,
                    "config_groups": {
                        "a": {
                            "targets": ["Linear", value],
                            "weights": {"num_bits": value},
                            "input_activations": {"type": value, "num_bits": value},
                        }
                    },
                },
            ):
                run(owner, dict_source(tensors, texts, {"quantization_config": group}))
    for key in texts:
        for value in ODD:
            run(
                owner, dict_source(tensors, {**texts, key: json.dumps({"_type": "Int8Tensor", "_data": value})}, config)
            )
            run(
                owner,
                dict_source(
                    tensors,
                    {**texts, key: json.dumps({"_type": value, "_data": {"block_size": value, "dtype": value}})},
                    config,
                ),
            )


def run(owner, source):
    from qgen.errors import BadCheckpoint

    for importer in (importers[name] for name in MINE):
        importer.recognizes(source)
    try:
        list(importers[owner].parts(source))
    except BadCheckpoint as error:
        assert "memory.safetensors" in str(error) and "\n" not in str(error)
