"""comfy-kitchen's tensor layouts, as ComfyUI's native checkpoints hold them. https://github.com/Comfy-Org/comfy-kitchen

ComfyUI multiplies a layer's input by the packed weight in one call; layouts that want a packed input get it made on the fly. Layers that
see one row per sample multiply by the dequantized weight.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from qgen.bench.peer import Config, Part, Peer, peers, save_tensors

__all__ = ["ComfyKitchen"]

_LAYOUTS = {  # config: layout, whether the input is packed by the same layout first
    "convrot-w4a4": ("TensorCoreConvRotW4A4Layout", False),
    "nvfp4": ("TensorCoreNVFP4Layout", True),
    "w4a8": ("AsymW4A8Int8Layout", False),
    "int8": ("TensorWiseINT8Layout", False),
    "fp8": ("TensorCoreFP8Layout", True),
}


class Linear(nn.Module):
    """y = x Wᵀ + b with W packed by a layout; alone: the input stays float."""

    def __init__(self, layer: nn.Linear, config: str, alone: bool):
        from comfy_kitchen.tensor import QuantizedTensor

        super().__init__()
        self.layout, self.packs = _LAYOUTS[config]
        self.alone, self.bias = alone, layer.bias
        self.packed = QuantizedTensor.from_float(layer.weight.detach(), self.layout)

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return nn.functional.linear(x, self.packed.dequantize(), self.bias)
        from comfy_kitchen.tensor import QuantizedTensor

        rows = x.reshape(-1, x.shape[-1])
        rows = QuantizedTensor.from_float(rows, self.layout) if self.packs else rows
        return nn.functional.linear(rows, self.packed, self.bias).reshape(*x.shape[:-1], -1)


@peers.register("comfy-kitchen")
class ComfyKitchen(Peer):
    package = "comfy-kitchen"
    configs = (
        Config("convrot-w4a4", 4, 4, "rotated, int4, one scale a row"),
        Config("nvfp4", 4, 4, "NVFP4"),
        Config("w4a8", 4, 8, "16-entry codebook, fp8 scales per 16, int8 inputs"),
        Config("int8", 8, 8, "one scale a tensor, inputs per token"),
        Config("fp8", 8, 8, "e4m3, one scale a tensor"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        torch.manual_seed(part.seed)
        return part.swap(lambda layer, path: Linear(layer, config, path in part.vectors))

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        tensors = dict(module.state_dict())
        for path, layer in module.named_modules():
            if isinstance(layer, Linear):
                tensors |= layer.packed.state_dict(f"{path}.weight")
        save_tensors(tensors, folder)
