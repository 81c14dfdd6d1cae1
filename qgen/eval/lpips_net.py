"""LPIPS proper: AlexNet, VGG16 or SqueezeNet with the weights that its authors fitted to human judgement.

torchmetrics carries the fitted weights; the backbone is torchvision's and its ImageNet weights are torchvision's file,
given by path or searched in torch's cache, and never downloaded by qgen. Both files are read as plain tensors.
Zhang et al., 2018, https://arxiv.org/abs/1801.03924
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from qgen.eval.extractors import digest_of, extractors, load_tensors
from qgen.eval.lpips import perceptual_distance

__all__ = ["AlexNetLpips", "SqueezeNetLpips", "VggLpips"]

# LPIPS' own normalisation of pictures in [-1, 1]: ImageNet's mean and deviation on that range.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class _Lpips:
    usual = True
    default = False
    net: str  # torchvision's name
    fitted: str  # torchmetrics' file
    file: str
    depths: tuple[int, ...]  # layers of `features` after whose ReLU the pictures are compared

    def __init__(self, path: str | None = None, device: str = "cpu"):
        import torchvision.models

        weights, fitted = self._weights_file(path), _fitted_file(self.fitted)
        self.digest, self.device = digest_of(weights, fitted), device
        with torch.device("meta"):
            backbone = getattr(torchvision.models, self.net)(weights=None)
        backbone.load_state_dict(load_tensors(weights), assign=True)
        self.layers = backbone.features[: self.depths[-1] + 1].float().eval().requires_grad_(False).to(device)
        found = load_tensors(fitted)
        self.weights = [found[f"lin{i}.model.1.weight"].flatten().to(device) for i in range(len(self.depths))]

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if torchvision, torchmetrics and the backbone's file are there, else what to install and where."""
        for package in ("torchmetrics", "torchvision"):
            if importlib.util.find_spec(package) is None:
                return f"install the package {package}"
        weights = cls._weights_file(path)
        url = f"https://download.pytorch.org/models/{cls.file}"
        return None if weights.is_file() else f"no weights at {weights}; they are {url}"

    @classmethod
    def _weights_file(cls, path: str | None) -> Path:
        return Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / cls.file

    @torch.inference_mode()
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors (B, H, W, 3) in [0, 1] to (B,) distances."""
        return perceptual_distance(self.maps(x), self.maps(y), self.weights)

    @torch.inference_mode()
    def maps(self, pictures: Tensor) -> list[Tensor]:
        """(B, H, W, 3) in [0, 1] to one feature map (B, C, h, w) per depth."""
        x = 2 * pictures.to(self.device, torch.float32) - 1
        x = ((x - torch.tensor(SHIFT, device=self.device)) / torch.tensor(SCALE, device=self.device)).movedim(-1, 1)
        found = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.depths:
                found.append(x.clone())  # the next ReLU may work in place
        return found


@extractors.register("lpips_alex")
class AlexNetLpips(_Lpips):
    """The backbone that LPIPS' authors recommend for comparing pictures."""

    name, net, fitted, file = "AlexNet (LPIPS)", "alexnet", "alex", "alexnet-owt-7be5be79.pth"
    labels = {"lpips": "LPIPS"}  # noqa: RUF012
    depths = (1, 4, 7, 9, 11)
    default = True


@extractors.register("lpips_vgg")
class VggLpips(_Lpips):
    """The backbone usual in training losses; another scale than AlexNet's."""

    name, net, fitted, file = "VGG16 (LPIPS)", "vgg16", "vgg", "vgg16-397923af.pth"
    labels = {"lpips": "LPIPS-VGG", "dists": "DISTS-like (VGG16, uniform)"}  # noqa: RUF012
    depths = (3, 8, 15, 22, 29)


@extractors.register("lpips_squeeze")
class SqueezeNetLpips(_Lpips):
    """The smallest backbone that LPIPS has weights for."""

    name, net, fitted, file = "SqueezeNet (LPIPS)", "squeezenet1_1", "squeeze", "squeezenet1_1-b8a52dc0.pth"
    labels = {"lpips": "LPIPS-Squeeze"}  # noqa: RUF012
    depths = (1, 4, 7, 9, 10, 11, 12)


def _fitted_file(name: str) -> Path:
    package = Path(str(importlib.resources.files("torchmetrics")))
    return package / "functional" / "image" / "lpips_models" / f"{name}.pth"
