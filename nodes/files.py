"""Which files the nodes may read and write: those in ComfyUI's model folders, by the names that ComfyUI lists."""

__all__ = ["FOLDERS", "check_name", "listed", "read_path", "stamp", "write_path"]

import re
from pathlib import Path

FOLDERS = ("qgen", "diffusion_models")  # of `models`; the first one is ours
_EXTENSIONS = {".safetensors", ".gguf"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +()\-]{0,99}")
_LISTED = "qgen_readable"  # ComfyUI's name for all folders that we read


def folder_paths() -> object:
    """ComfyUI's module, which from now on knows models/qgen."""
    import folder_paths as paths

    ours = str(Path(paths.models_dir) / "qgen")
    if "qgen" not in paths.folder_names_and_paths:
        paths.add_model_folder_path("qgen", ours)
    found = [path for name in FOLDERS for path in paths.get_folder_paths(name)]
    paths.folder_names_and_paths[_LISTED] = (list(dict.fromkeys(found)), set(_EXTENSIONS))
    return paths


def listed() -> list[str]:
    """Names of all files in models/qgen and models/diffusion_models that might be read, as ComfyUI lists files."""
    return list(folder_paths().get_filename_list(_LISTED))


def read_path(name: str) -> Path:
    """The file of that name in the folders. ValueError if there is none, or if it lies outside."""
    path = folder_paths().get_full_path(_LISTED, name)
    if path is None or name not in listed():
        raise ValueError(f"file: there is no {name!r} in models/qgen or models/diffusion_models")
    return Path(path)


def stamp(name: str) -> str:
    """What changes when the file does."""
    try:
        told = read_path(name).stat()
    except (ValueError, OSError):
        return "absent"
    return f"{told.st_mtime_ns} {told.st_size}"


def check_name(name: str) -> bool | str:
    """True for the name of a file to write, without folders; else what is wrong."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        return "name: letters, digits, spaces and _ - . + ( ) only, at most 100, and no folders"
    return True


def write_path(folder: str, name: str, suffix: str) -> Path:
    """Where a new file or folder goes: the first folder that ComfyUI has under that name. ValueError for other names and folders."""
    if (wrong := check_name(name)) is not True:
        raise ValueError(wrong)
    if folder not in FOLDERS:
        raise ValueError(f"folder: one of {', '.join(FOLDERS)}, found {folder!r}")
    home = Path(folder_paths().get_folder_paths(folder)[0])
    path = home / (name if not suffix or name.endswith(suffix) else name + suffix)
    if path.resolve().parent != home.resolve():
        raise ValueError(f"name: {name!r} lies outside of models/{folder}")
    home.mkdir(parents=True, exist_ok=True)
    return path
