"""torchao's `quantize_` with its configs, saved by its safetensors support. https://github.com/pytorch/ao"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers, save_tensors

__all__ = ["TorchAO"]


@peers.register("torchao")
class TorchAO(Peer):
    package = "torchao"
    configs = (
        Config("int4", 4, 16, "Int4WeightOnly, groups of 64"),
        Config("intx-int4", 4, 16, "IntxWeightOnly int4, groups of 64; stores a byte per code"),
        Config("nvfp4-weights", 4, 16, "NVFP4WeightOnly"),
        Config("intx-int4-act8", 4, 8, "Int8DynamicActivationIntxWeight int4, groups of 64; a byte per code"),
        Config("nvfp4", 4, 4, "NVFP4DynamicActivationNVFP4Weight"),
        Config("int8-weights", 8, 16, "Int8WeightOnly"),
        Config("int8", 8, 8, "Int8DynamicActivationInt8Weight"),
        Config("float8", 8, 8, "Float8DynamicActivationFloat8Weight"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        from torchao.quantization import quantize_

        vectors = set() if self.config(config).act == 16 else part.vectors
        inside = set(part.layers) - vectors
        quantize_(part.module, _config(config), filter_fn=lambda _, path: path in inside)
        if vectors:  # the weights alone, in the same numbers
            quantize_(part.module, _config(_WEIGHTS_ALONE[config]), filter_fn=lambda _, path: path in vectors)
        return part.module

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        save_tensors(flatten_tensor_state_dict(module.state_dict())[0], folder)


_WEIGHTS_ALONE = {
    "intx-int4-act8": "intx-int4",
    "nvfp4": "nvfp4-weights",
    "int8": "int8-weights",
    "float8": "float8-weights",
}


def _config(name: str) -> Any:
    import torchao.quantization as ao

    if name == "int4":
        return ao.Int4WeightOnlyConfig(group_size=64)
    if name == "intx-int4":
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(64))
    if name == "intx-int4-act8":
        return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=ao.PerGroup(64))
    if name.startswith("nvfp4"):
        import torchao.prototype.mx_formats as mx

        return mx.NVFP4WeightOnlyConfig() if name == "nvfp4-weights" else mx.NVFP4DynamicActivationNVFP4WeightConfig()
    plain = {
        "int8": "Int8DynamicActivationInt8WeightConfig",
        "int8-weights": "Int8WeightOnlyConfig",
        "float8": "Float8DynamicActivationFloat8WeightConfig",
        "float8-weights": "Float8WeightOnlyConfig",
    }
    return getattr(ao, plain[name])()
