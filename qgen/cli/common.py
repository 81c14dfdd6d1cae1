"""What several commands share: errors in words, recipes and prompts from what was typed, folders that must be free, models of any kind."""

__all__ = [
    "claim", "claim_path", "explain", "exporter_options", "load", "note", "own_prompts", "read_prompts", "read_recipe", "said", "typed",
    "watched",
]  # fmt: skip

import contextlib
import inspect
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

DEBUG, TYPED = "qgen.debug", "qgen.typed"  # keys of a context's meta


def explain(error: Exception) -> str | None:
    """A readable line for errors that people can act on; None for bugs."""
    from qgen.errors import QgenError
    from qgen.show.rows import printable

    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "qgen":
        extra = {"diffusers": "diffusers", "transformers": "diffusers", "gradio": "gradio"}.get(str(error.name), "eval")
        return f"needs the package {error.name}: pip install 'qgen-diffusion[{extra}]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: a smaller --memory, or fewer --samples, or --device cpu may fit"
    if isinstance(error, (QgenError, ValueError, OSError)):
        return "\n".join(printable(line, 2000) for line in str(error).splitlines()) or type(error).__name__
    return None


def typed(ctx: typer.Context) -> str:
    """The command as it was typed, ready for a shell."""
    return shlex.join(["qgen", *ctx.meta.get(TYPED, [])])


def note(text: str) -> None:
    """A line about what is going on, on stderr: stdout is for results."""
    typer.echo(text, err=True)


def claim(out: Path, force: bool) -> Path:
    """`out`, if it is absent, empty, or `force` is given; ValueError otherwise, before any work is done."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"--out {out} is not empty; choose another folder, or add --force to write into it")
    return out


def claim_path(out: Path, force: bool) -> Path:
    """`out`, a file or a folder, if nothing is there, an empty folder is, or `force` is given; ValueError otherwise."""
    if not force and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"--out {out} is there already; choose another name, or add --force to write over it")
    return out


def exporter_options(to: str, **options: Any) -> dict[str, Any]:
    """The options that are given, if the exporter called `to` takes them; ValueError for one that it lacks, or for no such exporter."""
    from qgen.io.peers.base import exporters

    known = inspect.signature(exporters[to].write).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} says nothing to --to {to}, which has one {name} alone; leave it out")
    return given


@contextlib.contextmanager
def watched(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes with the time left, on stderr; yields what is to be called with (bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def said(lines: list[str], most: int = 20) -> None:
    """What an exporter had to change, on stdout: equal reasons counted, and at most some of them."""
    from qgen.show.rows import printable

    for line in lines[:most]:
        typer.echo(printable(line))
    if len(lines) > most:
        typer.echo(f"and {len(lines) - most} more layers")


def read_prompts(path: Path | None) -> list[str] | None:
    """Lines of a UTF-8 text file, empty ones left out; None for no file. ValueError if there are none."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is no UTF-8 text; one prompt per line is wanted") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt; one prompt per line is wanted")
    return prompts


def own_prompts(pipe: Any, split: str) -> list[str] | None:
    """The demo pipeline's prompts, which no other model knows; None for others. split: "calibration" or "held_out"."""
    if type(pipe).__name__ != "EmojiPixArtPipeline":
        return None
    from qgen.demo import demo_prompts

    return demo_prompts(split)


def read_recipe(name: str, device: str) -> Any:
    """A recipe by name, or from a JSON file."""
    from qgen import recipes
    from qgen.recipe import Recipe

    if not name.endswith(".json"):
        return recipes.get(name, device)
    if not Path(name).is_file():
        raise ValueError(f"no recipe file {name}")
    return Recipe.from_json(Path(name).read_text(encoding="utf-8"))


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
    config = _json(folder / "config.json")
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


def parts(folder: Path) -> list[Path]:
    """Folders with weights: the folder itself, or the components of a pipeline."""
    index = _json(folder / "model_index.json")
    names = [name for name, value in index.items() if isinstance(value, list) and name.isidentifier()]
    return [folder / name for name in names if (folder / name).is_dir()] if index else [folder]


def quantized(folder: Path) -> bool:
    """Whether a component's config.json says that qgen quantized it."""
    said = _json(folder / "config.json").get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "qgen"


def float_dtype(folder: Path) -> Any:
    """The float dtype of most tensors of a folder, None where it holds no safetensors."""
    from qgen.errors import BadCheckpoint
    from qgen.io.files import scan

    counts: dict[Any, int] = {}
    try:
        entries = scan(folder).tensors.values()
    except BadCheckpoint:
        return None  # no weights, or unreadable ones: whoever loads them says what is wrong
    for entry in entries:
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def _default(found: dict[str, Any]) -> Any:
    import torch

    return next(filter(None, found.values()), torch.float32)


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return data if isinstance(data, dict) else {}


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
