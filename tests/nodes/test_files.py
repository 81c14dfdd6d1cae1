"""Names that come from a graph never become paths outside of ComfyUI's folders; and what the cache takes for equal."""

import sys
from types import ModuleType

import pytest
import torch

from qgen.nodes import files
from qgen.nodes.cache import Cache, fingerprint


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder_paths as ComfyUI's looks to the nodes: names to ([folders], {endings}), listing by walking."""
    paths = ModuleType("folder_paths")
    paths.models_dir = str(tmp_path)
    home = tmp_path / "diffusion_models"
    home.mkdir()
    paths.folder_names_and_paths = {"diffusion_models": ([str(home)], {".safetensors"})}
    paths.add_model_folder_path = lambda name, path: paths.folder_names_and_paths.update({name: ([path], set())})
    paths.get_folder_paths = lambda name: list(paths.folder_names_and_paths[name][0])

    def listed(name):
        folders, endings = paths.folder_names_and_paths[name]
        from pathlib import Path

        found = [(Path(f), p) for f in folders for p in Path(f).rglob("*") if p.suffix in endings]
        return [p.relative_to(f).as_posix() for f, p in found]

    def full(name, file):
        from pathlib import Path

        return next((str(Path(f) / file) for f in paths.get_folder_paths(name) if (Path(f) / file).is_file()), None)

    paths.get_filename_list, paths.get_full_path = listed, full
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", "/etc/x", "", ".hidden", "x" * 101, "a..b", "a\nb", "C:x", "a\0b"]
)
def test_names_with_folders_or_worse_are_refused(folders, name):
    assert files.check_name(name) is not True
    with pytest.raises(ValueError, match="name: "):
        files.write_path("qgen", name, ".safetensors")


def test_files_go_where_they_are_listed(folders):
    path = files.write_path("qgen", "my model (4-bit) v1.2", ".safetensors")
    assert path == folders / "qgen" / "my model (4-bit) v1.2.safetensors"
    assert files.listed() == []
    path.touch()
    (folders / "diffusion_models" / "b.gguf").touch()
    (folders / "diffusion_models" / "c.ckpt").touch()  # may hold a pickle: never listed
    assert sorted(files.listed()) == ["b.gguf", "my model (4-bit) v1.2.safetensors"]
    assert files.read_path("b.gguf") == folders / "diffusion_models" / "b.gguf"


def test_only_listed_files_are_read(folders):
    (folders / "secret.safetensors").touch()
    for name in ("../secret.safetensors", str(folders / "secret.safetensors"), "absent.gguf"):
        with pytest.raises(ValueError, match="file: there is no"):
            files.read_path(name)
        assert files.stamp(name) == "absent"
    with pytest.raises(ValueError, match="folder: "):
        files.write_path("loras", "x", "")


def test_a_link_out_of_the_folder_is_not_written_through(folders):
    (folders / "qgen").mkdir()
    (folders / "qgen" / "out.safetensors").symlink_to(folders / "elsewhere.safetensors")
    (folders / "qgen" / "up").symlink_to(folders)
    files.write_path("qgen", "fine", ".safetensors")
    for name in ("out", "up/x"):
        with pytest.raises(ValueError, match="name: "):
            files.write_path("qgen", name, ".safetensors")


def test_fingerprints_follow_content():
    x = torch.randn(300, 300)
    y = x.clone()
    assert fingerprint({"a": x, "b": [1, "s"]}) == fingerprint({"b": [1, "s"], "a": y})
    y += 1
    assert fingerprint(x) != fingerprint(y)
    assert fingerprint(x) != fingerprint(x.view(150, 600))
    assert fingerprint(torch.ones(3)) != fingerprint(torch.ones(3, dtype=torch.int32))
    assert fingerprint([1, 2]) != fingerprint([[1], 2]) and fingerprint("1") != fingerprint(1)


def test_the_cache_keeps_the_last_model_and_others_while_they_are_used():
    cache, first, second = Cache(), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    cache.put("a", first, 1)
    cache.put("b", second, 2)
    assert cache.get("a")[1] == 1 and cache.get("b") == (second, 2)
    del first
    assert cache.get("a") is None
    del second
    assert cache.get("b")[1] == 2
