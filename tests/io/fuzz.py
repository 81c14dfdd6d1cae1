"""A seeded mutator over every reader of files: python -m tests.io.fuzz --count 200000

Each case is a good small file of one kind, damaged: bytes flipped, cut and repeated; claims of the header changed; tensors dropped,
renamed, reshaped, recast and filled with what no quantizer writes, so that the file is sound and the importer meets it; texts and
config.json changed as JSON. Then it is opened, recognized, imported and dequantized, its names are turned into diffusers', and qgen's own
are loaded.
Allowed is success or a QgenError of one readable line. A case is one number: --seed S --only N runs it alone, with its traceback.
"""

import argparse
import collections
import contextlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qgen.errors import QgenError
from qgen.io.checkpoint import load
from qgen.io.datafree import rounded
from qgen.io.files import DTYPES
from qgen.io.into import load_peer
from qgen.io.keys import plan
from qgen.io.onthefly import Step
from qgen.io.parts import check, floats, importer_for, model_of, unknown_file
from qgen.io.peers.base import Layer, Model, Plain, exporters, importers
from qgen.io.peers.comfy_formats import FORMATS
from qgen.io.peers.source import open_source
from qgen.recipe import Spec
from qgen.site import Site

SECONDS, MEMORY = (
    20,
    3 << 30,
)  # of processor time for one case; bytes of address space beyond what is in use at the start
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    64,
    127,
    128,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    "int4",
    "nvfp4",
    "nf4",
    "../x",
    "\x00",
    "a" * 5000,
    [],
    {},
    [[]],
    0.5,
    -1e308,
    1e999,
    "NaN",
    10**4000,
)


# -- good files -----------------------------------------------------------------------------------------------------------


def layers(*specs, rows=32):
    """Parts: a model of one layer for each weight and activation format, and two ordinary tensors."""
    torch.manual_seed(0)
    for i, (weight, act) in enumerate(specs):
        step = Step(Site(f"blocks.{i}.lin", "linear", "", i, "", (rows, 128)), Spec(weight, act), "")
        yield rounded(torch.randn(rows, 128).bfloat16(), torch.randn(rows).bfloat16(), step, torch.bfloat16)
    yield Plain("norm.weight", torch.ones(32, dtype=torch.bfloat16))
    yield Plain("table.weight", torch.randn(7, 9))


def exported(to, *specs, rows=32, **options):
    """(tensors, texts, config) of what an exporter writes, or raw bytes for GGUF."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x.safetensors"
        exporters[to].write(layers(*specs, rows=rows), target, about=Model(), **options)
        if target.is_file() and target.read_bytes()[:4] == b"GGUF":
            return target.read_bytes()
        source = open_source(target)
        return {name: source.read(name) for name in source.shapes}, dict(source.metadata), dict(source.config)


def text(data):
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def seeds():
    """{kind: (tensors, texts, config) or raw bytes}: at least one good file for every importer."""
    i32, u8, f16 = torch.int32, torch.uint8, torch.float16
    torch.manual_seed(1)

    def words(*shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=i32)

    made = {"qgen": exported("qgen", ("int4_g64", "int4_g64"), ("nvfp4", "nvfp4_dynamic"), ("uint4_g64", None))}
    for name, spec in {"int4": "int4_g32", "uint4": "uint4_g32", "int8": "int8_g32"}.items():
        made[f"gguf-{name}"] = exported("gguf", (spec, None))
    for form in FORMATS:
        made[f"comfy-{form}"] = exported("comfy", ("int8_row", "int8_row"), ("int4_g64", None), format=form, rows=128)
    made["compressed"] = exported(
        "compressed-tensors", ("int4_g64", None), ("int8_row", "int8_row"), ("nvfp4", "nvfp4_dynamic")
    )
    triple = {
        "a.b.qweight": words(8, 16),
        "a.b.qzeros": words(1, 2),
        "a.b.scales": torch.rand(1, 16).to(f16),
        "a.b.bias": torch.rand(16),
    }
    config = {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
    }
    made["gptq"] = triple | {"a.b.g_idx": torch.zeros(64, dtype=i32)}, {}, config
    made["gptq-bare"] = triple, {}, {}
    triple = {"a.b.qweight": words(64, 2), "a.b.qzeros": words(1, 2), "a.b.scales": torch.rand(1, 16).to(f16)}
    made["awq"] = (
        triple,
        {},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}},
    )
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64]}
    name = "a.b.weight"
    four = {
        name: torch.randint(0, 255, (256, 1), dtype=u8),
        f"{name}.absmax": torch.rand(8),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
    }
    made["bnb-nf4"] = four | {f"{name}.quant_state.bitsandbytes__nf4": text(state)}, {}, {}
    nested = {"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}
    made["bnb-nested"] = (
        four
        | {
            f"{name}.absmax": torch.zeros(8, dtype=u8),
            f"{name}.nested_absmax": torch.rand(1),
            f"{name}.nested_quant_map": torch.linspace(-1, 1, 256),
            f"{name}.quant_state.bitsandbytes__nf4": text(state | nested),
        },
        {},
        {},
    )
    made["bnb-int8"] = (
        {
            "a.weight": torch.randint(-127, 127, (8, 16), dtype=torch.int8),
            "a.SCB": torch.rand(8),
            "a.bias": torch.rand(8),
        },
        {},
        {},
    )
    made |= {f"torchao-{kind}": found for kind, found in torchao().items()}
    made |= {f"nunchaku-{kind}": found for kind, found in nunchaku().items()}
    made["flux"] = flux(), {}, {}
    return made


def torchao():
    def texts(kind, data):
        return {"tensor_names": '["a.b.weight"]', "a.b.weight": json.dumps({"_type": kind, "_data": data})}

    rand = torch.rand(2, 32).bfloat16()
    q4 = {"a.b._weight_qdata": torch.randint(0, 255, (32, 32), dtype=torch.uint8)}
    return {
        "int4": (
            q4 | {"a.b._weight_scale": rand, "a.b._weight_zero_point": rand},
            texts("Int4Tensor", {"block_size": [1, 32]}),
            {},
        ),
        "int8": (
            {
                "a.b._weight_qdata": torch.randint(-127, 127, (32, 64), dtype=torch.int8),
                "a.b._weight_scale": torch.rand(32, 1),
            },
            texts("Int8Tensor", {"block_size": [1, 64], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}),
            {},
        ),
        "float8": (
            {"a.b._weight_qdata": torch.rand(32, 64).to(torch.float8_e4m3fn), "a.b._weight_scale": torch.rand(32, 1)},
            texts("Float8Tensor", {"block_size": [1, 64]}),
            {},
        ),
        "nvfp4": (
            q4
            | {
                "a.b._weight_scale": torch.rand(32, 4).to(torch.float8_e4m3fn),
                "a.b._weight_per_tensor_scale": torch.tensor(0.5),
            },
            texts("NVFP4Tensor", {"block_size": 16, "is_swizzled_scales": False}),
            {},
        ),
    }


def nunchaku():
    """Two layers in Nunchaku's own file, shapes and dtypes as its packer leaves them: what is in them does not matter to a fuzzer."""
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 0, "attention_head_dim": 64,
        "num_attention_heads": 2, "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24,
    }  # fmt: skip
    bf16 = torch.bfloat16

    def svdq(stem, n, k, fp4=False):
        scales = (k // 16, n) if fp4 else (k // 64, n)
        made = {
            "qweight": torch.randint(-128, 127, (n, k // 2), dtype=torch.int8), "bias": torch.rand(n).to(bf16),
            "wscales": torch.rand(scales).to(torch.float8_e4m3fn if fp4 else bf16), "smooth": torch.rand(k).add(0.5).to(bf16),
            "lora_down": torch.rand(k, 16).to(bf16), "lora_up": torch.rand(n, 16).to(bf16),
        }  # fmt: skip
        made |= {"wtscale": torch.rand(1).to(bf16), "wcscales": torch.rand(n).to(bf16)} if fp4 else {}
        return {f"{stem}.{tail}": t for tail, t in made.items()}

    awq = {
        "transformer_blocks.0.norm1.linear.qweight": torch.randint(-(2**31), 2**31 - 1, (192, 64), dtype=torch.int32),
        "transformer_blocks.0.norm1.linear.wscales": torch.rand(2, 768).to(bf16),
        "transformer_blocks.0.norm1.linear.wzeros": torch.rand(2, 768).to(bf16),
        "transformer_blocks.0.norm1.linear.bias": torch.rand(768).to(bf16),
    }
    texts = {"config": json.dumps(config), "model_class": "NunchakuFluxTransformer2dModel"}
    found = {}
    for kind, fp4 in (("int4", False), ("fp4", True)):
        quantization = {
            "method": "svdquant",
            "weight": {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": 16 if fp4 else 64},
            "rank": 16,
        }
        tensors = (
            svdq("transformer_blocks.0.qkv_proj", 384, 128, fp4)
            | svdq("transformer_blocks.0.out_proj", 128, 128, fp4)
            | awq
        )
        found[kind] = tensors, texts | {"quantization_config": json.dumps(quantization)}, {}
    lite = {}
    renamed = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
    for name, tensor in svdq("x", 128, 128).items():
        lite[f"transformer_blocks.0.attn.to_q.{renamed.get(name[2:], name[2:])}"] = tensor
    told = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
    told["svdq_w4a4"] = {
        "precision": "int4",
        "group_size": 64,
        "rank": 16,
        "targets": ["transformer_blocks.0.attn.to_q"],
    }
    found["lite"] = lite, {}, {**config, "quantization_config": told}
    return found


def flux():
    """Original names with tiny shapes: for the conversion of keys."""
    h, made = 8, {}
    shapes = {
        "img_in": (h, 4),
        "txt_in": (h, 6),
        "final_layer.linear": (4, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    shapes |= {f"{name}_in.{part}_layer": (h, h) for name in ("time", "vector") for part in ("in", "out")}
    for stream in ("img", "txt"):
        block = {
            "mod.lin": (6 * h, h),
            "attn.qkv": (3 * h, h),
            "attn.proj": (h, h),
            "mlp.0": (4 * h, h),
            "mlp.2": (h, 4 * h),
        }
        shapes |= {f"double_blocks.0.{stream}_{name}": size for name, size in block.items()}
        made |= {f"double_blocks.0.{stream}_attn.norm.{x}_norm.scale": torch.ones(4) for x in ("query", "key")}
    shapes |= {
        "single_blocks.0.linear1": (7 * h, h),
        "single_blocks.0.linear2": (h, 5 * h),
        "single_blocks.0.modulation.lin": (3 * h, h),
    }
    made |= {f"single_blocks.0.norm.{x}_norm.scale": torch.ones(4) for x in ("query", "key")}
    for name, size in shapes.items():
        made |= {f"{name}.weight": torch.rand(size), f"{name}.bias": torch.rand(size[0])}
    return made


# -- damage ---------------------------------------------------------------------------------------------------------------


def packed(tensors, texts, rng=None):
    """A safetensors file of (dtype name, shape, bytes); in a random order of tensors if rng is given."""
    header, data, at = ({"__metadata__": texts} if texts else {}), [], 0
    items = list(tensors.items())
    if rng is not None:
        rng.shuffle(items)
    for name, (dtype, shape, raw) in items:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    return header, b"".join(data)


def file_of(header, data):
    text = header if isinstance(header, bytes) else dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def dumps(value):
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(before)


def flat(tensors):
    return {
        name: (
            NAMES[t.dtype],
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"",
        )
        for name, t in tensors.items()
    }


def change_tensors(rng, tensors):
    """A sound file of other tensors."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not tensors:
            break
        name = rng.choice(list(tensors))
        dtype, shape, raw = tensors[name]
        kind = rng.randrange(9)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif kind == 2:
            tensors[mutate_text(rng, name)] = tensors.pop(name)
        elif kind == 3:
            tensors[mutate_text(rng, name)] = tensors[name]
        elif kind == 4:  # another shape, the bytes cut or repeated to fit
            tensors[name] = fit(rng, dtype, reshape(rng, shape), raw)
        elif kind == 5:
            tensors[name] = fit(rng, rng.choice(list(DTYPES)), shape, raw)
        elif kind == 6:
            pattern = rng.choice(
                (b"\xff", b"\x00", b"\x7f", b"\x80", b"\x7f\x80", b"\x00\x80", b"\xff\x7f", b"\xff\xff\xff\x7f", b"[")
            )
            tensors[name] = (dtype, shape, (pattern * (len(raw) // len(pattern) + 1))[: len(raw)])
        elif kind == 7 and raw:
            raw = bytearray(raw)
            for _ in range(rng.choice((1, 4, 100))):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            tensors[name] = (dtype, shape, bytes(raw))
        else:
            text = raw.decode("utf-8", "replace")
            if dtype == "U8" and text[:1] in "{[":  # marks and states: JSON in bytes
                try:
                    raw = dumps(change_json(rng, json.loads(text))).encode()
                except (ValueError, RecursionError):
                    raw = mutate_text(rng, text).encode("utf-8", "replace")
                tensors[name] = ("U8", (len(raw),), raw)
            else:
                tensors[name] = fit(rng, dtype, shape[::-1], raw)
    return tensors


def reshape(rng, shape):
    shape = list(shape)
    kind = rng.randrange(5)
    if kind == 0 or not shape:
        return (*shape, rng.choice((0, 1, 2, 3)))
    at = rng.randrange(len(shape))
    if kind == 1:
        del shape[at]
    elif kind == 2:
        shape[at] = rng.choice((0, 1, 2, 3, 5, 16, 63, 64, 65, 128, 200))
    elif kind == 3:
        shape[at] = max(0, shape[at] + rng.choice((-1, 1, -2, 2, 16)))
    else:
        shape[at] *= 2
    return tuple(shape)


def fit(rng, dtype, shape, raw):
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    if count > 1 << 20:
        return "U8", (len(raw),), raw
    raw = raw or b"\0"
    return dtype, shape, (raw * (count // len(raw) + 1))[:count]


def mutate_text(rng, text):
    kind = rng.randrange(7)
    words = text.split(".")
    if kind == 0:
        return text + rng.choice((".weight", ".", "0", "\u0000", "\ud800", ".bias", "é"))
    if kind == 1 and text:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice('abw.0_\x00{["') + text[at + 1 :]
    if kind == 2:
        return ".".join(words[1:])
    if kind == 3:
        return ".".join(words[:-1])
    if kind == 4:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 5:
        return "." + text
    return ".".join(
        [
            *words[:-1],
            rng.choice(
                ("codes", "scales", "qweight", "qzeros", "weight", "weight_scale", "absmax", "comfy_quant", "up")
            ),
        ]
    )


def change_json(rng, data, depth=0):
    """JSON with one to three of its values or keys changed."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = []
        stack = [(None, None, data)]
        while stack:
            parent, key, value = stack.pop()
            spots.append((parent, key, value))
            if isinstance(value, (dict, list)):
                stack += [(value, k, v) for k, v in (value.items() if isinstance(value, dict) else enumerate(value))]
        parent, key, value = rng.choice(spots)
        new = rng.choice((*VALUES, value, deep(rng)))
        if isinstance(value, str) and rng.random() < 0.3:
            new = mutate_text(rng, value)
        if isinstance(value, int) and rng.random() < 0.3:
            new = value + rng.choice((-1, 1, 16, -16)) if rng.random() < 0.5 else -value
        if parent is None:
            if rng.random() < 0.1:
                return new
            continue
        if rng.random() < 0.2:
            del parent[key]
        elif rng.random() < 0.1 and isinstance(parent, dict):
            parent[mutate_text(rng, key)] = parent.pop(key)
        else:
            parent[key] = new
    return data


def deep(rng):
    data: object = 0
    for _ in range(rng.choice((3, 50, 500))):
        data = [data] if rng.random() < 0.5 else {"a": data}
    return data


def change_bytes(rng, raw, head):
    """Damaged bytes; most of the damage among the first `head`."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not raw:
            break
        at = rng.randrange(min(head, len(raw))) if rng.random() < 0.85 else rng.randrange(len(raw))
        kind = rng.randrange(8)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice((0, 255, 127, 128, 34, 91, 123, 48, 57, 44))
        elif kind == 2:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
        elif kind == 3:
            del raw[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 4:
            del raw[at:]
        elif kind == 5:
            raw[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        elif kind == 6:
            raw[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        else:
            other = rng.randrange(min(head, len(raw)))
            raw[at : at + 16] = raw[other : other + 16]
    return bytes(raw)


def change_claims(rng, header):
    """A header whose claims need not fit its data, as bytes; sometimes with a repeated key."""
    changed = change_json(rng, header)
    text = dumps(changed)
    if rng.random() < 0.1 and isinstance(changed, dict) and changed:
        key = rng.choice(list(changed))
        text = text[:-1] + ", " + dumps({key: changed[key]})[1:]
    if rng.random() < 0.05:
        text = rng.choice(
            ("[" * 3000 + text, text + "}" * 9, text + " " * 999, "\ufeff" + text, text.replace(":", "", 1))
        )
    return text.encode("utf-8", "surrogatepass")


class Fuzzer:
    """Cases by number, in a folder in memory where the system has one."""

    def __init__(self, seed=0):
        self.seed, self.seeds = seed, {}
        for kind, found in seeds().items():
            self.seeds[kind] = found if isinstance(found, bytes) else (flat(found[0]), found[1], found[2])
        self.kinds = sorted(self.seeds)
        self.room = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

        for number in range(40):  # what is imported late, and tables that are made once, count for no case
            with contextlib.suppress(Exception):
                self.run(number)

    def close(self):
        shutil.rmtree(self.room, ignore_errors=True)

    def write(self, number):
        """The damaged file of a case; returns what to open."""
        rng = random.Random(f"{self.seed}-{number}")
        kind = rng.choice(self.kinds)
        found = self.seeds[kind]
        path = self.room / "case" / ("model.gguf" if isinstance(found, bytes) else "model.safetensors")
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        if isinstance(found, bytes):
            path.write_bytes(change_bytes(rng, found, rng.choice((64, 600, 2000))))
            return kind, path
        tensors, texts, config = found
        how = rng.choice(("bytes", "claims", "claims", "tensors", "tensors", "tensors", "texts", "both"))
        if how in ("tensors", "both"):
            tensors = change_tensors(rng, tensors)
        if how in ("texts", "both"):
            if texts and (rng.random() < 0.6 or not config):
                key = rng.choice(list(texts))
                texts = dict(texts)
                try:
                    texts[key] = (
                        dumps(change_json(rng, json.loads(texts[key])))
                        if rng.random() < 0.8
                        else mutate_text(rng, texts[key])
                    )
                except ValueError:
                    texts[key] = mutate_text(rng, texts[key])
            if config:
                config = change_json(rng, config)
            elif rng.random() < 0.2:
                config = change_json(
                    rng, {"quantization_config": {"quant_method": rng.choice(("gptq", "awq", "nunchaku_lite", "qgen"))}}
                )
        header, data = packed(tensors, texts, rng if rng.random() < 0.2 else None)
        raw = file_of(header, data)
        if how == "claims":
            raw = file_of(change_claims(rng, header), data)
        elif how == "bytes":
            raw = change_bytes(rng, raw, len(raw) - len(data))
        path.write_bytes(raw)
        if not config:
            return kind, path
        said = dumps(config).encode("utf-8", "surrogatepass")
        (path.parent / "config.json").write_bytes(change_bytes(rng, said, len(said)) if rng.random() < 0.1 else said)
        return kind, path.parent

    def run(self, number):
        """The outcome of a case: "ok" with the importer's name, or "refused". Anything else is raised."""
        kind, path = self.write(number)
        outcome = "refused"
        try:
            source = open_source(path)
            found = importer_for(source)
            if found is None:
                unknown_file(source)
                outcome = "unknown"
            for name, importer in importers.items():
                if importer.recognizes(source):
                    for part in floats(check(p) if isinstance(p, Layer) else p for p in importer.parts(source)):
                        assert isinstance(part.tensor, torch.Tensor)
                    outcome = f"ok {name}"
            model_of(source)
        except QgenError as error:
            one_line(error)
        if kind in ("flux", "qgen") or number % 50 == 0:
            self.names(path)
        if kind == "qgen":
            self.loads(path)
        return outcome

    def names(self, path):
        try:
            source = open_source(path)
            planned = plan(source.shapes, source.dtypes, source.where, source.config)
            for name in planned.tensors:
                assert isinstance(name, str)
        except QgenError as error:
            one_line(error)

    def loads(self, path):
        """qgen's own reader, and a peer's file into a live model."""
        into = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(128, 32)}) for _ in range(3))})
        into["norm"], into["table"] = nn.LayerNorm(32, bias=False), nn.Linear(9, 7, bias=False)
        for reader in (lambda: load(path if path.is_dir() else path.parent, into=into), lambda: load_peer(path, into)):
            before = [type(layer) for layer in into.modules()]
            try:
                reader()
                return
            except QgenError as error:
                one_line(error)
                assert before == [type(layer) for layer in into.modules()], "a refused file changed the model"


def one_line(error):
    """Readable: one line, however long the names are that it quotes."""
    told = str(error)
    assert told and "\n" not in told and len(told) < 8000, f"no readable line: {told[:300]!r}"


def hung(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def fuzz(count, seed=0, start=0, say=lambda *_: None):
    """Runs cases; returns ({outcome: count}, {(error, place): (case, traceback)})."""
    outcomes, failures = collections.Counter(), {}
    fuzzer = Fuzzer(seed)
    np.seterr(all="ignore")
    old = signal.signal(signal.SIGPROF, hung)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    began = time.process_time()
    try:
        for number in range(start, start + count):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                outcomes[fuzzer.run(number)] += 1
            except Exception as error:  # whatever it is, it is a finding
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = (type(error).__name__, f"{last.filename}:{last.lineno}")
                outcomes["failed"] += 1
                failures.setdefault(place, (number, traceback.format_exc()))
            signal.setitimer(signal.ITIMER_PROF, 0)
            if (number + 1 - start) % 20_000 == 0:
                say(number + 1 - start, round(time.process_time() - began), dict(outcomes), len(failures))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
        fuzzer.close()
    return outcomes, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        print(Fuzzer(args.seed).run(args.only))
        return
    outcomes, failures = fuzz(args.count, args.seed, args.start, lambda *said: print(*said, flush=True))
    for (error, place), (number, told) in failures.items():
        print(f"--- {error} at {place}, case {number}\n{told}")
    print(f"{args.count} cases: {dict(outcomes)}; {len(failures)} different failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
