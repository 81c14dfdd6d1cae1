"""Launch configurations as data, per op and family of processors.

A configuration is a tile and how many warps and pipeline stages work on it. Tables list, per op and family, the
greatest number of rows M that an entry is meant for; the first that fits is taken, the last serves all larger M. What
is not in a table falls back to the op's "any" family. None of these entries was searched for at run time, and none
is: the numbers come from compiling each candidate for its target and reading registers, spills and instructions of
the inner loop.
"""

__all__ = ["TABLE", "Launch", "capability_of", "family", "launch"]

from dataclasses import dataclass

import torch

LARGE = 1 << 62


@dataclass(frozen=True)
class Launch:
    """A tile of bm rows by bn columns by bk steps of K (0 where the op has no such axis), warps, pipeline stages."""

    bm: int
    bn: int = 0
    bk: int = 64
    warps: int = 8
    stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes beside the kernel's own arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def family(capability: tuple[int, int] | str | None) -> str:
    """A capability as in `Ask` to the name of its family: sm_8x, sm_90, sm_100, sm_120, amd, or cpu for the interpreter."""
    if capability is None:
        return "cpu"
    if isinstance(capability, str):
        return "amd"
    return {8: "sm_8x", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(capability[0], "any")


# 128 x 128 tiles with 8 warps: wider ones spill (128 x 256: 200 B on sm_80, 396 B on sm_90). Few rows: tiles as low
# as the matrix instruction, so that no more than half of it is wasted, and more stages, since loads are all there is
# to wait for.
_GEMM = (
    (16, Launch(16, 128, warps=4, stages=4)),
    (32, Launch(32, 128, warps=4, stages=4)),
    (64, Launch(64, 128, warps=4, stages=4)),
    (LARGE, Launch(128, 128)),
)

# The activation kernel is bound by memory. Two warps: with four, the low-rank product of 32 rows has each tile of x in
# the registers of two warps, and both quantize it (534 instead of 276 warp instructions per 1024 values, int4_g64,
# sm_80).
_ACT = ((LARGE, Launch(32, warps=2, stages=3)),)

TABLE: dict[tuple[str, str], tuple[tuple[int, Launch], ...]] = {
    ("act", "any"): _ACT,
    ("linear", "any"): _GEMM,
    ("w4a16", "any"): (
        (16, Launch(16, 64, warps=4, stages=4)),
        (32, Launch(32, 64, warps=4, stages=4)),
        (64, Launch(64, 64, warps=4, stages=4)),
        (LARGE, Launch(128, 128)),
    ),
    ("hadamard", "any"): ((LARGE, Launch(16, warps=4)),),
}


def launch(op: str, capability: tuple[int, int] | str | None, m: int) -> Launch:
    """The configuration of `op` for M = m rows on a processor of this capability."""
    rows = TABLE.get((op, family(capability)), TABLE[op, "any"])
    return next(entry for most, entry in rows if m <= most)


def capability_of(device: torch.device) -> tuple[int, int] | str | None:
    """Capability of a device as `Ask` states it; None for the CPU, where kernels run interpreted."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return torch.cuda.get_device_capability(device)
