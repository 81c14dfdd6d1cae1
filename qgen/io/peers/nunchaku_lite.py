"""diffusers' `nunchaku_lite`, read: Nunchaku's layers under the names of diffusers, listed in config.json.

    "quantization_config": {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16",
        "svdq_w4a4": {"precision": "int4" | "nvfp4", "group_size": 64 | 16, "rank": R, "targets": [paths]},
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": [paths]}}

Nothing is fused, padded, interleaved or shifted: a target is a linear layer of the model, whose tensors are in Nunchaku's byte order. The
config and the tensors must tell the same; BadCheckpoint names what does not.
"""

__all__ = ["GROUPS", "NunchakuLite"]

from collections.abc import Iterator
from typing import Any

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.nunchaku import is_lite, layers_of
from qgen.io.peers.nunchaku_read import read_awq, read_svdq, refuse

GROUPS = {"int4": 64, "nvfp4": 16}


@importers.register("nunchaku-lite")
class NunchakuLite:
    """The importer."""

    about = "diffusers nunchaku_lite: SVDQuant and W4A16 layers under diffusers' names"

    @staticmethod
    def recognizes(source: Source) -> bool:
        return is_lite(source.config)

    @staticmethod
    def parts(source: Source) -> Iterator[Layer | Plain]:
        config = source.config["quantization_config"]
        targets = {path: op for op in ("svdq_w4a4", "awq_w4a16") for path in _targets(source, config, op)}
        layers = layers_of(source)
        for path in sorted(targets.keys() - layers.keys()):
            raise BadCheckpoint(
                f"{source.where}: config.json lists the target {path!r}, and {path + '.qweight'!r} is not there"
            )
        for path in sorted(layers.keys() - targets.keys()):
            raise BadCheckpoint(f"{source.where}: {path + '.qweight'!r} is no target in config.json")
        owner = {name: path for path, names in layers.items() for name in names.values()}
        done: set[str] = set()
        for name in source.shapes:
            path = owner.get(name)
            if path is None:
                yield Plain(name, source.read(name))
            elif path not in done:
                done.add(path)
                yield from _layer(source, config, targets[path], path, layers[path])


def _targets(source: Source, config: dict[str, Any], op: str) -> list[str]:
    section = config.get(op)
    if section is None:
        return []
    targets = section.get("targets") if isinstance(section, dict) else None
    precisions = ("int4", "nvfp4") if op == "svdq_w4a4" else ("int4",)
    good = (
        isinstance(targets, list)
        and all(isinstance(path, str) for path in targets)
        and section.get("precision") in precisions
    )
    if not good or len(set(targets)) != len(targets) or section.get("group_size") != GROUPS[section["precision"]]:
        raise BadCheckpoint(
            f"{source.where}: {op} of config.json wants precision, group_size and targets, found {str(section)[:120]}"
        )
    return targets


def _layer(source: Source, config: dict[str, Any], op: str, path: str, names: dict[str, str]) -> list[Layer | Plain]:
    if op == "awq_w4a16":
        return read_awq(source, path, names).parts(path)
    linear = read_svdq(source, path, names)
    if linear.kind != config[op]["precision"]:
        wanted = "float8_e4m3fn" if config[op]["precision"] == "nvfp4" else "16-bit floats"
        refuse(source, names["wscales"], f"{wanted}, for config.json says {config[op]['precision']}")
    return linear.parts(path)
