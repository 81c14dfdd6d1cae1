"""save and load: a quantized pipeline, model or module to a folder of safetensors files, and back, bit for bit.

For diffusers and transformers the folder is the one that `save_pretrained` makes (with our quantizer attached), so that `qgen.load(dir)`
and `from_pretrained(dir)` both read it. A bare module becomes `model.safetensors`; whoever loads it brings the float module.
`load` checks everything that can be checked before it allocates or changes anything, and reads each tensor in the dtype of the file.
"""

__all__ = ["load", "save"]

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.errors import BadCheckpoint, NotQuantizable, QgenError
from qgen.io import skeleton
from qgen.io.atomic import staged
from qgen.io.files import STEMS, canonical_header, parse, scan
from qgen.io.header import KEY, Header, collect, header_of, library, note, verify
from qgen.io.hub import attach
from qgen.nn.packed import Packed

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save(x: Any, folder: str | Path, *, max_shard_size: str = "5GB") -> Path:
    """Writes a quantized pipeline or module to `folder`, whole or not at all, and returns the folder. The same model gives the same bytes.

    Arguments:
        x: a diffusers pipeline (all its components are written), a model of diffusers or transformers, or any nn.Module with packed layers.
        folder: is made if absent. Files of an older save are replaced; other files stay.
        max_shard_size: weights beyond this are cut into several files with an index.

    Raises NotQuantizable if nothing in x is quantized, ValueError if LoRA adapters are attached, QgenError if the disk is full or the
    folder cannot be written; the folder is then as it was.
    """
    folder = Path(folder)
    pipeline = not isinstance(x, nn.Module)
    components = dict(getattr(x, "components", {})) if pipeline else {"": x}
    parts = {name: part for name, part in components.items() if isinstance(part, nn.Module) and _is_packed(part)}
    if not parts or (pipeline and not hasattr(x, "save_pretrained")):
        raise NotQuantizable(
            f"{type(x).__name__} has no quantized layer to save: call qgen.quantize first, or its own save_pretrained"
        )
    for part in parts.values():
        if isinstance(part, Packed):
            raise NotQuantizable("a single quantized layer has no path to be saved under: put it into nn.Sequential")
        if library(part) != "torch" and getattr(getattr(part, "quantization_method", None), "value", None) != KEY:
            attach(part)
    limit = _bytes(max_shard_size)
    with staged(folder) as stage:
        if not pipeline and library(x) == "torch":
            _write(x, stage, limit)
        else:
            x.save_pretrained(stage, max_shard_size=max_shard_size)
        for path in sorted(stage.rglob("*.safetensors")):
            canonical_header(path)
    return folder


def load(folder: str | Path, *, into: nn.Module | None = None, device: str | torch.device | None = None) -> Any:
    """Reads what `save` or `save_pretrained` wrote, and returns it ready to run.

    Arguments:
        folder: of a pipeline, a model, or a bare module.
        into: a float module of the same architecture; needed for a bare module, which it becomes in place. Also for model classes that
            diffusers or transformers do not have themselves.
        device: where to put it; default: the CPU, or where `into` is.

    Raises BadCheckpoint if a file is damaged, tampered with or of another architecture, ValueError if `into` is missing. Nothing is
    changed then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QgenError(f"no folder {folder}; for a model of the Hub use from_pretrained after `import qgen`")
    if (folder / "model_index.json").is_file():
        if into is not None:
            raise ValueError(f"{folder} holds a whole pipeline, which needs no `into`")
        pipe = _load_pipeline(folder)
        return pipe if device is None else pipe.to(device)
    return _load_model(folder, into, device)


def _load_model(folder: Path, into: nn.Module | None = None, device: Any = None) -> nn.Module:
    files = scan(folder)
    header = header_of(files, folder)
    whose = header.model.get("library")
    if into is None and whose not in ("diffusers", "transformers"):
        raise ValueError(
            f"{folder} holds a bare {header.model.get('class')}: pass the float module, qgen.load(folder, into=module)"
        )
    module = _build(folder, header) if into is None else into
    if any(isinstance(layer, Packed) for layer in module.modules()):
        raise ValueError(f"`into` is quantized already: pass a float {type(module).__name__}")
    plan = skeleton.plan(module, header, files, folder)
    where = device or (next((p.device for p in module.parameters()), None) if into is not None else "cpu")
    tensors: dict[str, Tensor] = {}
    for name, tensor in files.read():
        verify(name, tensor, header, folder)
        tensors[name] = tensor.clone().to(where)  # a clone: the file's pages may change under a mapped tensor
    skeleton.fill(module, plan, tensors, header.aliases)
    if into is None:
        module.eval().to(where)
    skeleton.finish(module, header)
    attach(module)
    return module


def _build(folder: Path, header: Header) -> nn.Module:
    """The float model that config.json describes: parameters on meta, buffers real, in the dtype in which it was saved."""
    config = folder / "config.json"
    if not config.is_file():
        raise BadCheckpoint(f"{folder}: has no config.json, which tells how to build a {header.model.get('class')}")
    build = _diffusers_model if header.model["library"] == "diffusers" else _transformers_model
    with skeleton.without_memory(), _default_dtype(getattr(torch, header.model["dtype"])):
        try:
            return build(folder, parse(config.read_bytes(), config))
        except BadCheckpoint:
            raise
        except Exception as error:  # a config of a stranger may fail in any line of a model's constructor
            raise BadCheckpoint(f"{config}: no model can be built from it: {type(error).__name__}: {error}") from error


def _diffusers_model(folder: Path, config: dict) -> nn.Module:
    import diffusers

    kind = _class(diffusers, diffusers.ModelMixin, config.get("_class_name"), folder)
    model = kind.from_config(kind.load_config(folder, local_files_only=True))
    model.register_to_config(_name_or_path=str(folder))
    return model


def _transformers_model(folder: Path, config: dict) -> nn.Module:
    import transformers

    names = config.get("architectures")
    kind = _class(
        transformers, transformers.PreTrainedModel, names[0] if isinstance(names, list) and names else None, folder
    )
    model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _class(package: Any, base: type, name: Any, folder: Path) -> Any:
    kind = getattr(package, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise BadCheckpoint(
            f"{folder}: {package.__name__} has no model class {str(name)[:80]!r}; load into a float model: into=..."
        )
    return kind


def _load_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    index = folder / "model_index.json"
    parts, dtypes = {}, {"default": torch.float32}
    for name, value in parse(index.read_bytes(), index).items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if not name.isidentifier():
            raise BadCheckpoint(f"{index}: {name[:80]!r} cannot be the name of a component")
        where = folder / name
        if _quantized(where / "config.json"):
            parts[name] = _load_model(where)
        elif (dtype := _float_dtype(where)) is not None:
            dtypes[name] = dtype
    if not parts:
        raise BadCheckpoint(
            f"{folder}: no component was quantized by qgen; load it with DiffusionPipeline.from_pretrained"
        )
    return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=True, local_files_only=True, **parts)


def _quantized(config: Path) -> bool:
    found = parse(config.read_bytes(), config).get("quantization_config") if config.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == KEY


def _float_dtype(folder: Path) -> torch.dtype | None:
    """The float dtype of most weights of an ordinary component, or None where there are none."""
    if not any((folder / f"{stem}.safetensors{end}").is_file() for stem in STEMS for end in ("", ".index.json")):
        return None
    counts: dict[torch.dtype, int] = {}
    for entry in scan(folder).tensors.values():
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def _write(module: nn.Module, folder: Path, limit: int) -> None:
    """A bare module: canonical tensors in alphabetical order, cut into shards where they exceed `limit` bytes."""
    from safetensors.torch import save_file

    state = module.state_dict()
    note(module, state, "", state._metadata[""])  # type: ignore[attr-defined]
    tensors, header = collect(state)
    shards: list[dict[str, Tensor]] = [{}]
    for name in sorted(tensors):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensors[name].nbytes > limit:
            shards.append({})
        shards[-1][name] = tensors[name].contiguous()
    many = len(shards) > 1
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        save_file(shard, folder / name, {"format": "pt", KEY: header.to_json()})
        weight_map.update(dict.fromkeys(shard, name))
    if many:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_packed(module: nn.Module) -> bool:
    return any(isinstance(layer, Packed) for layer in module.modules())


def _bytes(size: str) -> int:
    number, unit = size[:-2].strip(), size[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError(f"max_shard_size is a text such as '5GB' or '500MB', found {size!r}")
    return int(float(number) * _UNITS[unit])
