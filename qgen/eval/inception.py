"""InceptionV3 as ported for FID: the network behind the numbers that papers call FID and KID.

The architecture and preprocessing are torch-fidelity's, through torchmetrics; the weights are a file of 91 MB from
torch-fidelity's releases, searched in torch's cache, and never downloaded by qgen. Szegedy et al., 2016,
https://arxiv.org/abs/1512.00567; https://github.com/toshas/torch-fidelity
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor

from qgen.eval.extractors import digest_of, extractors, load_tensors

__all__ = ["InceptionV3"]

FILE = "weights-inception-2015-12-05-6726825d.pth"


@extractors.register("inception")
class InceptionV3:
    """Pooled features (B, 2048), and class scores for the Inception Score."""

    name = "InceptionV3 (torch-fidelity)"
    labels = {"fid": "FID", "kid": "KID", "is": "IS"}  # noqa: RUF012
    usual = True

    def __init__(self, path: str | None = None, device: str = "cpu"):
        from torchmetrics.image.fid import NoTrainInceptionV3

        weights = _weights_file(path)
        self.digest, self.device = digest_of(weights), device
        # torch-fidelity would unpickle anything it finds in the file. It gets a copy that holds the tensors alone.
        plain = io.BytesIO()
        torch.save(load_tensors(weights), plain)
        plain.seek(0)
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], plain).to(device)

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if torch-fidelity and the weights are there, else what to install and where to put them."""
        for package in ("torchmetrics", "torch_fidelity"):
            if importlib.util.find_spec(package) is None:
                return f"install the package {package.replace('_', '-')}"
        weights = _weights_file(path)
        where = f"no weights at {weights}; they are {FILE} from https://github.com/toshas/torch-fidelity/releases"
        return None if weights.is_file() else where

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] to (B, 2048); rounded to 8 bits and resized to 299 x 299 as FID is defined."""
        x = (pictures.movedim(-1, 1) * 255).round().to(torch.uint8).to(self.device)
        return self.network(x).reshape(len(x), -1)

    @torch.inference_mode()
    def logits(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] to (B, 1008) class scores without the last layer's bias, as the Inception Score is
        computed everywhere."""
        return self.features(pictures) @ self.network.fc.weight.T


def _weights_file(path: str | None) -> Path:
    return Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / FILE
