r"""compressed-tensors out: what its formats hold exactly stays packed, other layers become 16-bit.

    int4_g128, int8_row, …          pack-quantized; int-quantized where activations are int8_row
    uint4z_g128, …                  pack-quantized with zero points
    fp8_e4m3_row                    float-quantized
    nvfp4, mxfp4                    nvfp4-pack-quantized, mxfp4-pack-quantized

Every layer is named in `config_groups`, one group for each kind of layer. A folder gets config.json, as vLLM and transformers read it; a
single .safetensors file says the same in its free text. https://github.com/vllm-project/compressed-tensors
"""

__all__ = ["CompressedTensorsExport"]

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import packing
from qgen.formats.integer import Integer
from qgen.formats.peers import WholeZero
from qgen.io.atomic import staged
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.floats import dequantized, extras, room_for, weights_name, write_config
from qgen.io.peers.layers import bits_to_words
from qgen.io.peers.writer import SafetensorsWriter

_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True, "num_bits": 8}
_ACTS = {"int8_row": {**_TOKEN, "type": "int"}, "fp8_e4m3_row": {**_TOKEN, "type": "float"}}
_SILENT = {"", "int8_row", "fp8_e4m3_row"}  # activations that a config can ask for without any tensor


class CompressedTensorsExport:
    """The exporter."""

    about = "compressed-tensors (vLLM, transformers): packed integers, int8, fp8, NVFP4, MXFP4"

    def write(self, parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        target = Path(target)
        if target.suffix == ".safetensors":
            return _write(parts, target)[1]
        with staged(target) as folder:
            config, notes = _write(parts, folder / weights_name(about))
            write_config(folder, about.config, config)
        return notes


def _write(parts: Iterable[Layer | Plain], path: Path) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    groups: dict[str, dict[str, Any]] = {}  # scheme as JSON to group
    with SafetensorsWriter(path, {"format": "pt"}, room=room_for(parts)) as writer:
        for part in parts:
            if isinstance(part, Plain):
                writer.add(part.name, part.tensor)
                continue
            prefix, bias = f"{part.path}." if part.path else "", part.slots.get("bias")
            tensors = _packed(part)
            if tensors is None:
                weight, bias = dequantized(part)
                tensors = {"weight": weight.to(part.dtype)}
                notes.append(
                    f"{part.path}: dequantized: compressed-tensors holds no {part.layout.weight}{extras(part)}"
                )
            else:
                scheme = _scheme(part)
                group = groups.setdefault(json.dumps(scheme, sort_keys=True), {"targets": [], **scheme})
                group["targets"].append(part.path)
                if part.layout.act not in _SILENT:
                    notes.append(f"{part.path}: activations are no longer rounded to {part.layout.act}")
            for leaf, tensor in tensors.items():
                writer.add(prefix + leaf, tensor)
            if bias is not None:
                writer.add(f"{prefix}bias", bias)
        config = _config(list(groups.values()))
        if config:
            writer.metadata["quantization_config"] = json.dumps(config)
    return config, notes


def _packed(part: Layer) -> dict[str, Tensor] | None:
    """A layer's weight as the library names its tensors, None if it cannot hold it."""
    fmt, slots = formats.get(part.layout.weight), part.slots
    extra = set(slots) - {"codes", "scales", "global_scale", "zero", "bias", "act_scale"}
    if extra or part.layout.hadamard or part.kind != "linear" or (fmt.block and part.shape[1] % fmt.block):
        return None
    k, kind = part.shape[1], _kind(part)
    if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        packed = {"weight_packed": slots["codes"], "weight_scale": slots["scales"]}
        if kind.startswith("nv"):
            packed["weight_global_scale"] = (1.0 / slots["global_scale"].float()).reshape(1)
        return packed
    if kind == "float-quantized":
        return {"weight": slots["codes"].view(torch.float8_e4m3fn), "weight_scale": slots["scales"]}
    if kind is None:
        return None
    codes = packing.unpack(slots["codes"], fmt.bits)[:, :k]
    if kind == "int-quantized":
        return {"weight": codes.contiguous().view(torch.int8), "weight_scale": slots["scales"]}
    if fmt.element.signed:
        codes = codes ^ (1 << (fmt.bits - 1))  # two's complement to offset
    packed = {
        "weight_packed": bits_to_words(codes, fmt.bits),
        "weight_scale": slots["scales"],
        "weight_shape": torch.tensor([len(codes), k]),
    }
    if "zero" in slots:
        packed["weight_zero_point"] = bits_to_words(slots["zero"].to(torch.uint8).T, fmt.bits).T.contiguous()
    return packed


def _kind(part: Layer) -> str | None:
    """The library's name for a layer's format, None if it has none."""
    name = part.layout.weight
    fmt = formats.get(name)
    if name in ("nvfp4", "mxfp4"):
        return f"{name}-pack-quantized"
    if name in ("fp8_e4m3_row", "fp8_e4m3_tensor"):
        return "float-quantized"
    if not isinstance(fmt.element, Integer) or fmt.global_scale or not fmt.scale_dtype.is_floating_point:
        return None
    if fmt.element.signed == fmt.zero_point or (fmt.zero_point and type(fmt) is not WholeZero):
        return None
    if not fmt.zero_point and not fmt.plain:
        return None
    return "int-quantized" if (fmt.bits, part.layout.act) == (8, "int8_row") else "pack-quantized"


def _scheme(part: Layer) -> dict[str, Any]:
    fmt, kind = formats.get(part.layout.weight), _kind(part)
    floating = kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized")
    strategy = {"nvfp4": "tensor_group"}.get(part.layout.weight, "group" if fmt.block else "channel")
    weights = {
        "num_bits": fmt.bits,
        "type": "float" if floating else "int",
        "symmetric": not fmt.zero_point,
        "strategy": strategy,
        "group_size": fmt.block,
        "dynamic": False,
    }
    if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        weights["scale_dtype"] = "torch.float8_e4m3fn" if kind.startswith("nv") else "torch.uint8"
    act = _ACTS.get(part.layout.act)
    if act is not None and "act_scale" in part.slots:
        act = None
    return {"weights": weights, "input_activations": act, "output_activations": None, "format": kind}


def _config(groups: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {group["format"] for group in groups}
    if not groups:
        return {}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


exporters.add("compressed-tensors", CompressedTensorsExport())
