"""From file to file: `convert` quantizes a file of floats, `export` writes what is quantized for others.

Each is one stream of parts (`qgen.io.peers.base`): a few tensors are in memory at a time, and the target appears whole or not at all.
"""

__all__ = ["convert", "export"]

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qgen import recipes
from qgen.errors import BadCheckpoint, NotQuantizable
from qgen.io.config import DATA_FREE
from qgen.io.datafree import quantized
from qgen.io.files import parse
from qgen.io.keys import Plan, original, outward, plan
from qgen.io.keys.deferred import defer
from qgen.io.parts import Parts, component, config_of, floats, importer_for, model_of, of_module, unknown_file, untimed
from qgen.io.peers.base import Layer, Model, Plain, Source, exporters
from qgen.io.peers.source import nbytes, open_source
from qgen.io.peers.writer import SafetensorsWriter
from qgen.models import adapter_for
from qgen.nn.packed import Packed
from qgen.recipe import Recipe

KEYS = (
    "auto",
    "diffusers",
    "original",
    "keep",
)  # "auto" is what the exporter's attribute `keys` says; without one, "diffusers"


def convert(
    file: str | Path,
    recipe: str | Recipe = DATA_FREE,
    target: str | Path = "",
    to: str = "qgen",
    *,
    config: str | Path | dict | None = None,
    keys: str = "auto",
    skip: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[str]:
    """Quantizes a file without calibration and without loading its model, and writes it for `to`.

    Arguments:
        file: of floats: a single file in ComfyUI's, the original or diffusers' layout, or a folder of diffusers or transformers. A file
            that is quantized already is dequantized first, into a temporary file beside the target.
        recipe: a data-free one, by name or as a Recipe.
        target: what to write; a folder or a file as the exporter has it.
        to: name of an exporter, `qgen.io.peers.exporters`.
        config: diffusers' config of the model (a folder, a config.json, or a dictionary), where the file does not lie beside it. With it
            the layers are the model's own, and the result loads without more; without it they are judged by names and shapes.
        keys: "diffusers" renames tensors of original layouts (fused q, k, v are split), "original" fuses and renames diffusers' as ComfyUI
            wants them, "keep" does neither, "auto" does what the exporter wants.
        progress: called with (bytes read, bytes of all).
        options: further arguments of the exporter, such as `format`.

    Returns one line for each layer that the target's format could not hold as it is. Raises ValueError for unknown names and recipes that
    need activations, BadCheckpoint for a damaged file or one that does not fit its config, BadData for weights that are not finite,
    QgenError if the target cannot be written. The target is then as it was.
    """
    if not str(target):
        raise ValueError("convert writes a file or folder: give its name as `target`")
    exporter, target = exporters[to], Path(target)
    keys = _keys(keys, exporter)
    recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
    source = open_source(file)
    found = importer_for(source)
    spooled = None if found is None else _spool(found[1].parts(source), target, model_of(source).config)
    try:
        source = source if spooled is None else open_source(spooled)
        given = _config(config) or model_of(source).config
        planned = (
            plan(source.shapes, source.dtypes, source.where, given) if keys == "diffusers" else _kept(source, given)
        )
        total = sum(nbytes(source.shapes[name], source.dtypes[name]) for name in source.shapes)
        done = 0

        def read(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        parts = quantized(source, planned, recipe, skip, read if progress else None)
        about = Model(planned.kind, planned.config, {"recipe": (recipe.skip(*skip) if skip else recipe).to_json(None)})
        parts, said = _outward(parts, planned.tensors, about.kind, keys)
        lines = said + exporter.write(parts, target, about=about, **options)
        if progress:
            progress(total, total)
        return lines
    finally:
        if spooled is not None:
            shutil.rmtree(spooled.parent if spooled.is_file() else spooled, ignore_errors=True)


def export(
    x: Any,
    to: str,
    target: str | Path,
    *,
    keys: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[str]:
    """Writes a quantized model for others: `qgen.export(pipe, "comfy", "model.safetensors")`.

    Arguments:
        x: a quantized pipeline or module, or the path of a checkpoint that an importer reads: qgen's own or a peer's.
        to: name of an exporter, `qgen.io.peers.exporters`. target: the file or folder that it writes, whole or not at all.
        keys: "original" fuses and renames tensors as the model's authors and ComfyUI have them, "keep" leaves names alone, "auto" does what
            the exporter wants.
        progress: called with (bytes read, bytes of all) where x is a path.
        options: further arguments of the exporter, such as `format`.

    Returns one line for each layer that could not be kept as it is. Raises ValueError for unknown names and for what the format cannot
    hold; BadCheckpoint for damaged files and those that no importer knows; QgenError if the target cannot be written.
    """
    exporter, target = exporters[to], Path(target)
    keys = _keys(keys, exporter)
    if not isinstance(x, (str, Path)):
        module = _denoiser(x)
        config = {key: value for key, value in config_of(module).items() if key != "quantization_config"}
        recipe = getattr(module, "qgen_recipe", None)
        about = Model(type(module).__name__, config, {"recipe": recipe.to_json(None)} if recipe else {})
        parts, said = _outward(of_module(module, timed=to == "qgen"), module.state_dict(), about.kind, keys)
        return said + exporter.write(parts, target, about=about, **options)
    source = open_source(component(Path(x)))
    found = importer_for(source)
    if found is None:
        raise BadCheckpoint(unknown_file(source))
    about = model_of(source)
    if (header := getattr(found[1], "header", None)) is not None:
        recipe = header(source).recipe
        about = replace(about, metadata={"recipe": recipe.to_json(None)} if recipe else {})
    watched = source if progress is None else _Watched(source, progress)
    held = found[1].parts(watched) if to == "qgen" else untimed(found[1].parts(watched))
    parts, said = _outward(Parts(held, len(source.shapes)), source.shapes, about.kind, keys)
    return said + exporter.write(parts, target, about=about, **options)


def _keys(keys: str, exporter: Any) -> str:
    if keys not in KEYS:
        raise ValueError(f"keys is one of {', '.join(KEYS)}, found {keys!r}")
    return getattr(exporter, "keys", "diffusers") if keys == "auto" else keys


def _outward(parts: Parts, names: Iterable[str], kind: str, keys: str) -> tuple[Parts, list[str]]:
    """Parts in the original layout where that is wanted and names are diffusers'; and a line where nobody knows that layout."""
    if keys != "original":
        return parts, []
    if kind in outward:
        known = [_is_known(outward[kind], name.rpartition(".")[0]) for name in names]
        return (original(parts, kind), []) if sum(known) * 2 > len(known) else (parts, [])
    if any("transformer_blocks." in name or ".to_q." in name for name in names):
        return parts, [f"names are kept: the original layout of {kind or 'this model'} is not known"]
    return parts, []


def _is_known(place: Callable[[str], Any], path: str) -> bool:
    try:
        return bool(place(path))
    except KeyError:
        return False


class _Watched:
    """A source that tells how many bytes have been read."""

    def __init__(self, source: Source, progress: Callable[[int, int], None]):
        self._source, self._progress, self._done = source, progress, 0
        self._total = sum(nbytes(shape, source.dtypes[name]) for name, shape in source.shapes.items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self._done = min(self._total, self._done + tensor.nbytes)
        self._progress(self._done, self._total)
        return tensor


def _spool(parts: Iterator[Layer | Plain], target: Path, config: dict) -> Path:
    """A temporary folder beside the target with the floats of a quantized file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:200]}.floats-", dir=target.parent))
    try:
        with SafetensorsWriter(folder / "model.safetensors") as writer:
            for part in floats(parts):
                writer.add(part.name, part.tensor)
        if config:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _kept(source: Source, config: dict) -> Plan:
    tensors = {name: defer(name, source.shapes[name], source.dtypes[name]) for name in source.shapes}
    same = config.get("_class_name") or config.get("architectures")
    kind = model_of(source).kind
    if not kind:
        with contextlib.suppress(BadCheckpoint):  # names stay, so nothing hangs on whether they could be changed
            kind = plan(source.shapes, source.dtypes, source.where).kind
    return Plan(tensors, kind, config if same and _own_names(tensors, config) else {}, renamed=False)


def _own_names(tensors: dict[str, Tensor], config: dict) -> bool:
    """Whether names are already those of the config's model, so that it can tell what is a layer."""
    return not any(
        ("blocks." in name and ".qkv" in name) or name.startswith(("model.diffusion_model.", "double_blocks."))
        for name in tensors
    )


def _config(given: str | Path | dict | None) -> dict:
    if given is None or isinstance(given, dict):
        return dict(given or {})
    path = Path(given)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no config {path}: name a config.json or its folder")
    return parse(path.read_bytes(), path)


def _denoiser(x: Any) -> nn.Module:
    found = {
        name: module
        for name, module in adapter_for(x).denoisers(x).items()
        if any(isinstance(layer, Packed) for layer in module.modules())
    }
    if not found:
        raise NotQuantizable(f"{type(x).__name__} has no quantized layer to export: call qgen.quantize first")
    if len(found) > 1:
        raise ValueError(
            f"{type(x).__name__} has several quantized denoisers, a file holds one: pass {' or '.join(found)}"
        )
    return next(iter(found.values()))
