"""What a peer is: a quantizer, qgen's own among them, that turns one denoiser into a quantized one and saves it.

A peer is one file in `qgen/bench/peers` with one class, registered under its name:

    @peers.register("bitsandbytes")
    class BitsAndBytes(Peer):
        package = "bitsandbytes"
        configs = (Config("nf4", 4, 16, "NF4, blocks of 64"), ...)

        def quantize(self, config, part): ...

Everybody is given the same layers to quantize and to leave alone, and the same recorded calls.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen.errors import unknown
from qgen.registry import Registry

__all__ = ["Config", "Part", "Peer", "peers", "select"]


@dataclass(frozen=True)
class Config:
    """One way of a peer. weight, act: bits of a weight's and an input's code in most layers. about: what is done, in a line.

    control: no quantizer but a yardstick, left out of who is better than whom.
    """

    name: str
    weight: int
    act: int
    about: str
    control: bool = False


@dataclass
class Part:
    """One denoiser to quantize.

    module: at 16 bits, the peer's to change or to replace. layers: {path: (N, K)} to quantize. vectors: those of them that see one row per
    sample, whose inputs stay in 16 bits where the peer allows it. keep: paths of the other linear and convolution layers, which stay as
    they are. call: a `CalibrationSet` of one call. calls: records a whole one, within the time that is measured. seed: of random numbers.
    """

    module: nn.Module
    layers: Mapping[str, tuple[int, int]]
    vectors: frozenset[str]
    keep: tuple[str, ...]
    call: Any
    calls: Callable[[], Any]
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    def replay(self, module: nn.Module | None = None) -> None:
        """Runs the recorded calls through `module` (default: the part's own), for peers that calibrate by looking."""
        with torch.no_grad():
            for call in self.calls().calls:
                call.run(self.module if module is None else module)

    def swap(self, make: Callable[[nn.Linear, str], nn.Module]) -> nn.Module:
        """The module with every layer to quantize replaced by make(layer, path)."""
        for path in self.layers:
            self.module.set_submodule(path, make(self.module.get_submodule(path), path))
        return self.module


class Peer:
    """A quantizer. package: the distribution whose version is stated, "" for none. licence: said where it forbids more than running it."""

    package = ""
    licence = ""
    configs: tuple[Config, ...] = ()

    def version(self) -> str:
        """Version of the package here; ModuleNotFoundError if it is not installed."""
        if not self.package:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(
                f"{self.package} is not installed here: pip install {self.package}, or name the Python of an environment that "
                "has it with --python",
                name=self.package,
            ) from None

    def quantize(self, config: str, part: Part) -> nn.Module:
        """The quantized denoiser, ready to run."""
        raise NotImplementedError

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        """Writes the denoiser as its users would keep it: .safetensors or .gguf, whose tensors are then counted by layer."""
        save_tensors(module.state_dict(), folder)

    def config(self, name: str) -> Config:
        """The config of this name; ValueError with the nearest one."""
        found = next((c for c in self.configs if c.name == name), None)
        if found is None:
            raise ValueError(unknown("config", name, [c.name for c in self.configs]))
        return found


peers: Registry[type[Peer]] = Registry("peer", "qgen.bench.peers")


def select(names: Sequence[str] = ()) -> list[tuple[str, Config]]:
    """(peer, config) pairs of names such as "torchao" or "qgen:svd*" (a glob on configs); all of them for none, qgen first.

    Raises ValueError for an unknown peer or config.
    """
    chosen: list[tuple[str, Config]] = []
    for name in names or ["unquantized", "qgen", *(p for p in peers if p not in ("unquantized", "qgen"))]:
        peer, _, pattern = name.partition(":")
        configs = peers[peer].configs
        fitting = [c for c in configs if not pattern or fnmatch.fnmatchcase(c.name, pattern)]
        if not fitting:
            raise ValueError(unknown(f"config of {peer}", pattern, [c.name for c in configs]))
        chosen += [(peer, c) for c in fitting if (peer, c) not in chosen]
    return chosen


def save_tensors(tensors: Mapping[str, Any], folder: Path) -> None:
    """Writes plain tensors to model.safetensors, each with its own memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    save_file(plain, str(folder / "model.safetensors"))
