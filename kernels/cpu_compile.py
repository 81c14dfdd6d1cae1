"""Compiles C++ of this package once, with the user's own compiler, and loads it; says plainly why when it cannot.

A plain C interface and ctypes: neither torch's headers nor ninja are needed, and a build takes two to five seconds. The library lies in
the user's cache folder under a name that holds the hash of source, flags and compiler, so that an update never meets an old build.
"""

__all__ = ["capabilities", "compiled", "cpu_lacks", "library", "unavailable"]

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from qgen.kernels.cpu_native_source import SOURCE

log = logging.getLogger("qgen")

FEATURES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "avx512_bf16")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",
    "-mavx2",
    "-mfma",
    *("-m" + f.replace("_", "") for f in FEATURES),
)
SECONDS = 120  # a compiler that needs longer is stuck


def unavailable() -> str:
    """Why the native library cannot be used here, as half a sentence; "" if it can. The first call may compile."""
    return cpu_lacks() or _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library; RuntimeError with the reason of `unavailable` if there is none."""
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(f"the kernel cpu_native {why}")
    return loaded


@lru_cache(maxsize=1)
def capabilities() -> dict[str, bool]:
    """What the processor can do, by torch's names (`avx512_vnni`); {} where neither torch nor Linux tells."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    # Linux writes avx512f where torch writes avx512_f
    return {
        name: name in found or name.replace("_", "") in found
        for name in (*FEATURES, "avx_vnni", "amx_int8", "amx_bf16")
    }


def cpu_lacks() -> str:
    """Which instructions the processor lacks for the native kernel, as half a sentence; "" if none."""
    missing = [name for name in FEATURES if not capabilities().get(name)]
    return f"needs a processor with {', '.join(missing)}" if missing else ""


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    loaded, why = compiled("cpu_native", SOURCE, FLAGS)
    if loaded is not None:
        loaded.qgen_parallel.argtypes = (ctypes.c_void_p,)
        loaded.qgen_parallel(_gomp_parallel())
    return loaded, why


@lru_cache(maxsize=8)
def compiled(name: str, source: str, flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """The library built from `source`, and ""; or None and why there is none, as half a sentence."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if sys.platform != "linux":
        return None, f"is built on Linux only, this is {sys.platform}"
    if compiler is None:
        return None, "needs a C++ compiler (c++, g++ or clang++ on the PATH), found none"
    try:
        return ctypes.CDLL(str(_build(compiler, name, source, flags))), ""
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"could not be compiled by {compiler}: {detail.strip().splitlines()[-1]}"


def _build(compiler: str, name: str, source: str, flags: tuple[str, ...]) -> Path:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    digest = hashlib.sha256("\0".join((source, *flags, version)).encode()).hexdigest()[:16]
    target = _cache() / f"{name}-{digest}.so"
    if target.exists():
        return target
    log.info("compiling %s with %s into %s", name, compiler, target)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written, built = Path(folder, f"{name}.cpp"), Path(folder, f"{name}.so")
        written.write_text(source, encoding="utf-8")
        command = [compiler, *flags, str(written), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(built, target)  # at once or not at all: another process may build the same
    return target


def _cache() -> Path:
    """A folder that only this user can write to, since code is loaded from it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "qgen"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others; remove it or take their rights away (chmod go-w)")
    return folder


def _gomp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch uses, so that both share its threads; None = one thread."""
    candidates = [None, *sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))]
    for name in candidates:
        try:
            return ctypes.cast(ctypes.CDLL(name and str(name)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    log.info("cpu_native found no GOMP_parallel and runs on one thread")
    return None
