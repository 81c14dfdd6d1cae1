"""All or nothing: a folder of files appears whole, or what was there before stays as it is.

Files are written into a hidden folder beside the target, flushed to the disk, and renamed into place. A target that is absent or empty
is replaced in one rename. In a target with other content each file is exchanged by two renames, kept in a list and undone in reverse if
one fails or the user interrupts; files that the checkpoint does not write (a README, a LoRA) stay, weights of an older save go.
"""

__all__ = ["staged"]

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qgen.errors import QgenError

# What a save may leave behind that a loader would pick up in place of a newer one.
_OLD_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields an empty folder to write in; when the block ends its files become those of the folder `target`.

    Raises QgenError, with the target untouched, if the disk is full, the place is read-only or a file is in the way. Whatever the block
    raises, KeyboardInterrupt too, leaves the target untouched and nothing beside it.
    """
    if target.exists() and not target.is_dir():
        raise QgenError(f"a checkpoint is a folder, and {target} is a file; choose another name")
    with _plainly(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        with _plainly(target):
            stage.chmod(0o777 & ~_umask())
            yield stage
            _flush(stage)
            _publish(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _plainly(target: Path) -> Iterator[None]:
    """Turns what the disk, or safetensors about the disk, complains of into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise QgenError(f"could not save to {target}: {error}; nothing was changed there") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    """Asks the system to write every file and folder below `folder` to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(os.path.join(root, name))
        _fsync(root)


def _fsync(path: str | Path) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
    elif not any(target.iterdir()):
        target.rmdir()
        try:
            os.rename(stage, target)
        except BaseException:
            target.mkdir(exist_ok=True)
            raise
    else:
        _exchange(stage, target)
    _fsync(target.parent)


def _exchange(stage: Path, target: Path) -> None:
    """Moves every file of `stage` into `target`, older ones into a folder that is deleted at the end; undone if anything fails."""
    attic = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    done: list[tuple[Path, Path]] = []
    made: list[Path] = []
    try:
        new = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
        for folder in sorted({stage, *(stage / name.parent for name in new)}):
            here = target / folder.relative_to(stage)
            if not here.exists():
                here.mkdir(parents=True)
                made.append(here)
            stale = [p.relative_to(target) for p in here.iterdir() if p.is_file() and _OLD_WEIGHTS.fullmatch(p.name)]
            for name in stale:
                _move(target / name, attic / name, done)
        for name in new:
            if (target / name).exists():
                _move(target / name, attic / name, done)
            _move(stage / name, target / name, done)
        _flush(target)
    except BaseException:
        for source, place in reversed(done):
            os.rename(place, source)
        for folder in reversed(made):
            folder.rmdir()
        raise
    finally:
        shutil.rmtree(attic, ignore_errors=True)


def _move(source: Path, place: Path, done: list[tuple[Path, Path]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, place)
    done.append((source, place))
