"""qgen: 4-bit vision generators. `pipe = qgen.quantize(pipe)`."""

from pathlib import Path

_here = Path(__file__).resolve().parent
# In a source checkout kernels/, calibration/ and nodes/ lie beside this folder; a wheel has them inside it.
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))
