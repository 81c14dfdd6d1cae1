"""The table of ComfyUI's native formats: what users ask for, and what a mark names."""

__all__ = ["FORMATS", "named", "of_mark"]

from qgen.errors import BadCheckpoint, unknown
from qgen.io.peers.comfy_awq import AWQ
from qgen.io.peers.comfy_convrot import CONVROT
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_fp8 import FP8, FP8_E5M2
from qgen.io.peers.comfy_int8 import INT8, INT8_CONVROT
from qgen.io.peers.comfy_mxfp8 import MXFP8
from qgen.io.peers.comfy_native import Native
from qgen.io.peers.comfy_nvfp4 import NVFP4
from qgen.io.peers.comfy_svdquant import SVDQUANT

_ALL: tuple[Native, ...] = (NVFP4, SVDQUANT, CONVROT, AWQ, MXFP8, INT8, INT8_CONVROT, FP8, FP8_E5M2)
FORMATS: dict[str, Native] = {native.name: native for native in _ALL}


def named(text: str) -> tuple[Native, ...]:
    """Formats by the names in "nvfp4" or "svdquant_w4a4,awq_w4a16", the preferred one first. ValueError for an unknown one."""
    found = []
    for name in (part.strip() for part in text.split(",")):
        if name not in FORMATS:
            raise ValueError(unknown("ComfyUI format", name, FORMATS))
        found.append(FORMATS[name])
    return tuple(found)


def of_mark(found: Found) -> Native:
    """The format of a marked layer. BadCheckpoint if there is none of that name."""
    for native in _ALL:
        if native.format == found.mark.format:
            return native
    known = ", ".join(sorted({native.format for native in _ALL}))
    raise BadCheckpoint(
        f"{found.source.where}: {found.name('weight')!r} is in the format {found.mark.format[:60]!r}; readable: {known}"
    )
