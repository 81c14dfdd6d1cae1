"""A model by the name that somebody typed: a folder, a hub id, or the word demo. What the command line and the page open models with."""

__all__ = ["device_of", "load"]

from pathlib import Path
from typing import Any

from qgen.io.folders import config_in, float_dtype, parts, quantized


def device_of(name: str) -> str:
    """ "auto" becomes "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is auto, cpu, cuda or cuda:1, found {name!r}") from None
    return name


def load(model: str, dtype: str = "auto", device: str = "auto") -> Any:
    """A pipeline or module from a folder, a hub id, or the word "demo". dtype "auto" keeps what the files hold.

    Only safetensors are read. ValueError for what is no model, QgenError if the hub does not give it.
    """
    import torch

    from qgen.errors import unknown

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in ("auto", *kinds):
        raise ValueError(unknown("--dtype", dtype, ["auto", *kinds]))
    where = device_of(device)
    if model == "demo" and not Path(model).exists():
        from qgen.demo import demo_pipeline

        found: Any = demo_pipeline(kinds.get(dtype, torch.float32))
    else:
        folder = Path(model) if Path(model).exists() else _download(model)
        found = _from_folder(folder, kinds.get(dtype))
    if hasattr(found, "set_progress_bar_config"):
        found.set_progress_bar_config(disable=True)
    return found.to(where) if where != "cpu" else found


def _from_folder(folder: Path, dtype: Any) -> Any:
    from qgen.demo import register
    from qgen.io.checkpoint import load as load_quantized

    register()
    if any(quantized(part) for part in parts(folder)):
        return load_quantized(folder)
    if (folder / "model_index.json").is_file():
        import diffusers

        each = {part.name: dtype or float_dtype(part) for part in parts(folder)}
        given = {"default": dtype or _default(each), **{name: found for name, found in each.items() if found}}
        return diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=given, use_safetensors=True, local_files_only=True
        )
    config = config_in(folder / "config.json")
    if not config:
        raise ValueError(f"{folder} holds neither model_index.json (a pipeline) nor config.json (a model)")
    import diffusers
    import transformers

    names = config.get("architectures") or [None]
    package, name = (diffusers, config["_class_name"]) if "_class_name" in config else (transformers, names[0])
    kind = getattr(package, str(name), None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{folder / 'config.json'}: {package.__name__} has no model class {str(name)[:80]!r}")
    given = {"dtype": dtype or float_dtype(folder) or _default({})}
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **given).eval()


def _default(found: dict[str, Any]) -> Any:
    import torch

    return next(filter(None, found.values()), torch.float32)


def _download(model: str) -> Path:
    """The local copy of a model of Hugging Face's hub; QgenError if there is none, ValueError for what can be no id."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    from qgen.errors import QgenError

    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"no folder {model}; a local folder, a hub id such as owner/name, or the word demo is wanted")
    try:
        try:
            hf_hub_download(model, "model_index.json")
        except EntryNotFoundError:
            kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            return Path(snapshot_download(model, allow_patterns=kinds))
        import diffusers

        return Path(diffusers.DiffusionPipeline.download(model, use_safetensors=True))
    except HFValidationError:
        raise ValueError(f"no folder {model!r}, and it can be no hub id; the built-in model is called demo") from None
    except OSError as error:
        why = str(error).strip().splitlines()[0][:200]
        raise QgenError(f"no folder {model!r} here, and Hugging Face's hub did not give it: {why}") from None
