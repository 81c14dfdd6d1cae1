"""What users install: the wheel, the source archive, a clone in ComfyUI's custom_nodes: built in temporary copies."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = {
    "qgen": "qgen",
    **{name: f"qgen/{name}" for name in ("kernels", "calibration", "nodes")},
    "demos/assets": "qgen/_assets",
}
# What tools leave behind, anywhere in a path.
BUILT = re.compile(r"(.*/)?(__pycache__|\.\w+_cache|\.venv|\.git|\.hypothesis|build|dist|[^/]+\.egg-info)(/.*)?")
DATA = re.compile(r".*(\.(md|json|js|css|cu|cuh)|/py\.typed)")  # what package-data may add to the modules


def copy_tree(to):
    """Copies the checkout, without what tools have left in it, to the new folder `to`."""
    return Path(shutil.copytree(ROOT, to, ignore=lambda _, names: [n for n in names if BUILT.fullmatch(n)]))


def build(source, kind, to):
    """Runs setuptools' `build_wheel` or `build_sdist` in the folder `source`; returns the archive's path and a log."""
    to.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; print('built', backend.build_{kind}({str(to)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return to / done.stdout.rsplit("built ", 1)[1].strip(), done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(path of the wheel, build log)."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_tree(folder / "checkout"), "wheel", folder / "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(path of the source archive, build log)."""
    folder = tmp_path_factory.mktemp("sdist")
    return build(copy_tree(folder / "checkout"), "sdist", folder / "dist")


def wheel_files(path):
    """{name: bytes} of the files in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


def wanted():
    """Files the wheel must hold, with their sizes, from a walk over the checkout."""
    files = {}
    for top, inside in TOPS.items():
        for path in (ROOT / top).rglob("*"):
            relative = path.relative_to(ROOT / top).as_posix()
            if path.is_file() and not BUILT.fullmatch(relative) and (path.suffix == ".py" or top == "demos/assets"):
                files[f"{inside}/{relative}"] = path.stat().st_size
    return files


def test_wheel_holds_every_module_and_asset(wheel):
    have = wheel_files(wheel[0])
    missing = {name for name, size in wanted().items() if have.get(name) != size}
    assert not missing, f"not in the wheel, or of another size: {', '.join(sorted(missing))}"


def test_wheel_holds_nothing_else(wheel):
    """One top-level package and its metadata: no tests, no bare kernels/ or nodes/, no caches."""
    have = set(wheel_files(wheel[0]))
    tops = {PurePosixPath(name).parts[0] for name in have}
    assert "qgen" in tops and all(top == "qgen" or top.startswith("qgen_diffusion-") for top in tops), tops
    extra = {name for name in have - set(wanted()) if name.startswith("qgen/") and not DATA.fullmatch(name)}
    assert not extra, f"in the wheel but not in the tree: {', '.join(sorted(extra))}"
    assert not [name for name in have if "test" in PurePosixPath(name).name and name.endswith(".py")]


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith(".dist-info/entry_points.txt"))).decode()
    assert re.search(r"^Name: qgen-diffusion$", metadata, re.MULTILINE)
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    base = {re.split(r"[^\w-]", line)[1] for line in re.findall(r"^Requires-Dist:( [^;\n]+)$", metadata, re.MULTILINE)}
    assert base == {"torch", "safetensors", "numpy", "typer", "rich", "tqdm"}
    assert "qgen = qgen.cli:main" in scripts


def test_build_gives_no_packaging_warning(wheel):
    """setuptools warns of folders inside a package that are not listed; such files would be missing one day."""
    assert "absent from the" not in wheel[1] and "is deprecated" not in wheel[1], wheel[1]


def test_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist[0]) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    again, _ = build(unpacked, "wheel", tmp_path / "dist")
    record = re.compile(r"\.dist-info/RECORD$|SOURCES")
    first, second = ({n: s for n, s in wheel_files(p).items() if not record.search(n)} for p in (wheel[0], again))
    assert first == second


def run(code, cwd, *arguments):
    """Runs `code` isolated from the working folder and from PYTHONPATH; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_installed_wheel_finds_its_parts(wheel, tmp_path):
    """The unpacked wheel, first on the search path: sub-packages and assets come from it, not from a checkout."""
    with zipfile.ZipFile(wheel[0]) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import qgen, qgen.demo, qgen.kernels.registry
print(qgen.__file__, qgen.kernels.registry.__file__, qgen.demo.assets_dir(), sep="\\n")
"""
    site = tmp_path / "site" / "qgen"
    places = run(code, tmp_path, str(tmp_path / "site")).splitlines()
    assert places == [str(site / "__init__.py"), str(site / "kernels" / "registry.py"), str(site / "_assets")]


# What ComfyUI does with a folder in custom_nodes: the module is named after its path, no search path has the folder.
LOAD = """
import importlib.util, sys, types
folder, comfy = sys.argv[1], sys.argv[2] == "comfy"
if comfy:
    sys.modules["folder_paths"] = types.ModuleType("folder_paths")
name = folder.replace(".", "_x_")
before = set(sys.modules)
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
new = {name.split(".")[0] for name in set(sys.modules) - before}
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the checkout under a name that is no Python identifier."""
    return copy_tree(tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-qgen")


def test_clone_is_inert_outside_comfyui(clone, tmp_path):
    shows = """
print(sorted(new & {"qgen", "torch", "kernels", "nodes"}), [name for name in vars(module) if name[0] != "_"])
"""
    assert run(LOAD + shows, tmp_path, str(clone), "plain") == "[] ['sys']"


def test_clone_loads_its_own_qgen_in_comfyui(clone, tmp_path):
    """Also where another qgen is installed, as in the environment that runs this test."""
    shows = """
import qgen
print(qgen.__file__, sorted(new & {"kernels", "nodes", "calibration"}), folder in sys.path, module.WEB_DIRECTORY)
"""
    assert run(LOAD + shows, tmp_path, str(clone), "comfy") == f"{clone / 'qgen' / '__init__.py'} [] False ./nodes/web"


def test_clone_does_not_replace_a_loaded_qgen(clone, tmp_path):
    """Two packs that bring qgen: the first one loaded serves both, and the log says so."""
    other = tmp_path / "qgen.py"
    first = f"""
import logging, sys, types
logging.basicConfig(stream=sys.stdout, format="%(message)s")
q = sys.modules["qgen"] = types.ModuleType("qgen")
q.__file__, q.__path__ = {str(other)!r}, []
"""
    said = run(first + LOAD + "print(sys.modules['qgen'] is q)", tmp_path, str(clone), "comfy").splitlines()
    assert said[0].startswith(f"another qgen was loaded first, from {other}")
    assert said[-1] == "True"


def test_every_data_file_of_the_nodes_is_packaged(wheel):
    """web/ holds JavaScript and help pages that ComfyUI serves from inside the package."""
    relative = [path.relative_to(ROOT).as_posix() for path in (ROOT / "nodes").rglob("*") if path.is_file()]
    web = {f"qgen/{name}" for name in relative if not BUILT.fullmatch(name)}
    assert web <= set(wheel_files(wheel[0]))
