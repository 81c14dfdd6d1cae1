"""nvidia-modelopt: its own configs, or their INT4 twins, then `compress`, which packs the weights. https://github.com/NVIDIA/Model-Optimizer

On a CPU its NVFP4 has no kernel. Its SVDQuant config is NVFP4; the INT4 twins here have the same algorithm and rank, and weights in
blocks of 64. Their inputs have one scale for the whole tensor: with its SVDQuant, integer inputs can have neither blocks nor tokens of
their own that are scaled while running. At 4 bits that is coarse, so there is a twin with 8-bit inputs too.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers, save_tensors

__all__ = ["ModelOpt"]

_INT4_WEIGHT = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
_PRESETS = {
    "svdquant-nvfp4": "NVFP4_SVDQUANT_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "int4-awq": "INT4_AWQ_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8-smoothquant": "INT8_SMOOTHQUANT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
}


@peers.register("modelopt")
class ModelOpt(Peer):
    package = "nvidia-modelopt"
    configs = (
        Config("svdquant-int4", 4, 4, "SVDQuant, rank 32, int4 blocks of 64, int4 inputs with one scale a tensor"),
        Config("svdquant-int4-act8", 4, 8, "SVDQuant, rank 32, int4 blocks of 64, int8 inputs with one scale a tensor"),
        Config("svdquant-nvfp4", 4, 4, "NVFP4_SVDQUANT_DEFAULT_CFG, rank 32"),
        Config("nvfp4", 4, 4, "NVFP4_DEFAULT_CFG"),
        Config("int4-awq", 4, 16, "INT4_AWQ_CFG, blocks of 128"),
        Config("int4", 4, 16, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG, blocks of 128"),
        Config("int8-smoothquant", 8, 8, "INT8_SMOOTHQUANT_CFG, inputs with one scale a layer"),
        Config("fp8", 8, 8, "FP8_DEFAULT_CFG, inputs with one scale a layer"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        import modelopt.torch.quantization as mtq

        preset = _PRESETS.get(config)
        wanted = copy.deepcopy(getattr(mtq, preset)) if preset else _svdquant_int4(self.config(config).act)
        wanted["quant_cfg"] += [{"quantizer_name": f"{path}.*", "enable": False} for path in part.keep]
        wanted["quant_cfg"] += [
            {"quantizer_name": f"{p}.input_quantizer", "enable": False} for p in sorted(part.vectors)
        ]
        module = mtq.quantize(part.module, wanted, forward_loop=part.replay)
        mtq.compress(module)
        return module

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        tensors = dict(module.state_dict())
        for path, layer in module.named_modules():  # compressing takes the low-rank factors out of the state dict
            for name in ("svdquant_lora_a", "svdquant_lora_b"):
                if isinstance(getattr(layer, name, None), torch.Tensor) and f"{path}._{name}" not in tensors:
                    tensors[f"{path}.{name}"] = getattr(layer, name)
        save_tensors(tensors, folder)


def _svdquant_int4(act: int) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": _INT4_WEIGHT},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": act, "type": "dynamic"}},
        ],
        "algorithm": {"method": "svdquant", "lowrank": 32},
    }
