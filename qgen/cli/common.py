"""What several commands share: errors in words, recipes and prompts from what was typed, folders that must be free."""

__all__ = [
    "calibrates", "claim", "claim_path", "explain", "exporter_options", "load", "note", "own_prompts", "read_prompts", "read_recipe",
    "said", "texts", "typed", "watched",
]  # fmt: skip

import contextlib
import inspect
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from qgen.named import device_of, load  # noqa: F401 (commands import them from here)

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


def calibrates(recipe: Any) -> bool:
    """Whether any of its methods may want to see inputs."""
    return any(spec.methods for spec in (recipe.default, *(rule.spec for rule in recipe.rules)) if spec)


def texts(model: str, documents: list[str], samples: int) -> Any:
    """Calibration of a language model by the lines of a file. ValueError if there is no tokenizer beside it."""
    from transformers import AutoTokenizer

    from qgen.calibration.texts import Texts

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no tokenizer to read --prompts with: {error}") from None
    return Texts(tokenizer, documents, samples=samples)
