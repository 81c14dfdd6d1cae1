"""Networks that turn pictures (and words) into features, found by name, and honest about which one it was.

The usual networks (InceptionV3, AlexNet with LPIPS' weights, CLIP) are used where their weights lie on this computer.
Where they do not, small ones that come with Python packages give the same kinds of numbers on scales of their own.
Nothing is ever downloaded: a missing file is an error that says where it belongs and which small network could stand
in.

An extractor is one file with one class, registered here:

    name, labels                what it is; which metrics it serves and how their rows are then called
    usual                       True for the network that papers use
    missing(path)               None if its weights are present, else where to put them
    __init__(path, device)      loads
    digest                      first 12 hex digits of the SHA-256 of its weights
    features | logits | distance | maps | embed_images, embed_texts | judge
                                by metric: fid, kid | is | lpips | dists | clip, clip_iqa | image_reward, hpsv2
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, QgenError, unknown
from qgen.registry import Registry

__all__ = [
    "Choice",
    "Extractor",
    "MissingWeights",
    "digest_of",
    "extractors",
    "find_extractor",
    "load_features",
    "load_tensors",
    "save_features",
]


class MissingWeights(QgenError):
    """A network's weights are not on this computer; the message says where they belong and what could be used
    instead."""


class Extractor(Protocol):
    name: str
    labels: dict[str, str]
    usual: bool
    digest: str

    @classmethod
    def missing(cls, path: str | None = None) -> str | None: ...


extractors: Registry[type[Extractor]] = Registry("feature extractor", "qgen.eval")


@dataclass(frozen=True)
class Choice:
    """A network's class and the path of its weights (None: the usual place), not loaded yet."""

    kind: Any
    path: str | None = None

    def load(self, device: str = "cpu") -> Any:
        return self.kind(self.path, device)


def find_extractor(metric: str, wanted: Any = "auto") -> Any:
    """Returns the network that serves `metric` as a `Choice`, or `wanted` itself if it is a loaded extractor.

    "auto" is the usual network where its weights are present, else the small one; "real" and "small" ask for one kind;
    otherwise a registered name, or name:path. Raises ValueError for an unknown name or one that does not serve the
    metric, and `MissingWeights` if weights are absent.
    """
    if not isinstance(wanted, str):
        if metric not in getattr(wanted, "labels", {}):
            raise ValueError(f"an extractor for {metric!r} wanted, found {wanted!r}")
        return wanted
    serving = {name: kind for name, kind in extractors.items() if metric in kind.labels}
    small = [name for name, kind in serving.items() if not kind.usual]
    usual = [name for name, kind in serving.items() if kind.usual and getattr(kind, "default", True)]
    if wanted == "auto":
        present = [name for name in (*usual, *small) if serving[name].missing(None) is None]
        wanted = present[0] if present else (*small, *usual)[0]
    elif wanted in ("real", "small"):
        fitting = usual if wanted == "real" else small
        if not fitting:
            raise MissingWeights(f"no {wanted} network serves {metric}; these do: {', '.join(serving)}")
        wanted = fitting[0]
    name, _, path = wanted.partition(":")
    if name not in serving:
        line = unknown(f"feature extractor for {metric!r}", name, {*serving, "auto", "real", "small"})
        per_metric = "; a mapping such as {'fid': 'inception', 'lpips': 'small'} names one per metric"
        raise ValueError(line + (per_metric if name in extractors else ""))
    reason = serving[name].missing(path or None)
    if reason is not None:
        others = [other for other in small if other != name and serving[other].missing(None) is None]
        use = (
            f'; or use extractor={{"{metric}": "{others[0]}"}} (--extractor {metric}={others[0]} on the command line), '
            "a small network with its own scale"
            if others
            else f"; no other network serves {metric}, so leave it out or provide this one"
        )
        raise MissingWeights(f"{name}: {reason}{use}")
    return Choice(serving[name], path or None)


def digest_of(*paths: str | Path) -> str:
    """The first 12 hex digits of the SHA-256 over the contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()[:12]


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a .pth of tensors; `BadCheckpoint` if it holds anything else, whose reading could run code."""
    import pickle

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise BadCheckpoint(f"{path} is no plain file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise BadCheckpoint(f"{path} is no plain file of tensors: found {type(found).__name__}")
    return dict(found)


def save_features(path: str | Path, features: Tensor, extractor: Any, about: str) -> None:
    """Writes features (n, K) as float16 safetensors together with the extractor's name and digest."""
    from safetensors.torch import save_file

    header = {"extractor": extractor.name, "digest": extractor.digest, "about": about}
    save_file({"features": features.half().contiguous()}, str(path), metadata=header)


def load_features(path: str | Path, extractor: Any) -> Tensor:
    """Reads features (n, K) as float32; ValueError if the file is no features file or was made by another network."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header, keys = file.metadata() or {}, set(file.keys())
            features = file.get_tensor("features") if "features" in keys else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no features file: {error}") from error
    if features is None or features.ndim != 2:
        raise ValueError(f"{path} is no features file: a tensor 'features' (n, K) wanted, found {sorted(keys)}")
    made_by = (header.get("extractor"), header.get("digest"))
    if made_by != (extractor.name, extractor.digest):
        raise ValueError(
            f"{path} holds features of {made_by[0]} ({made_by[1]}), asked for {extractor.name} ({extractor.digest}); "
            "distances between different networks mean nothing: compute the file anew"
        )
    return features.to(torch.float32)
