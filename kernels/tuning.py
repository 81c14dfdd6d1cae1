"""Launch configurations as data, per op and family of processors.

A configuration is a tile and how many warps and pipeline stages work on it. Tables list, per op and family, the
greatest number of rows M that an entry is meant for; the first that fits is taken, the last serves all larger M. What
is not in a table falls back to the op's "any" family. None of these entries was searched for at run time, and none
is: the numbers come from compiling each candidate for its target and reading registers, spills and instructions of
the inner loop.

What `python -m qgen.kernels.bench --tune FILE` measured on a card is loaded over them by `load(FILE)`, or by naming the
file in the environment variable QGEN_TUNING. Launches change how long a kernel takes, not what it computes.
"""

__all__ = ["TABLE", "VARIABLE", "Launch", "capability_of", "family", "launch", "load", "parse"]

import json
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

from qgen.errors import unknown

VARIABLE = "QGEN_TUNING"

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
    def warp_work(self) -> float:
        """Outputs of one warp as a multiple of those in a 128 x 128 tile with 8 warps."""
        return self.bm * self.bn / self.warps / 2048

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes beside the kernel's own arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def family(capability: tuple[int, int] | str | None) -> str:
    """A capability as in `Ask` to the name of its family: sm_8x, sm_90, sm_100, sm_120, amd, rdna, or cpu for the interpreter."""
    if capability is None:
        return "cpu"
    if isinstance(capability, str):  # data-center cards are gfx9…, Radeon is gfx11…, gfx12…
        return "amd" if capability.startswith("gfx9") else "rdna"
    return {8: "sm_8x", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(capability[0], "any")


# Few rows: tiles as low as the matrix instruction, so that no more than half of it is wasted, and more stages, since
# loads are all there is to wait for. Many rows: 128 x 128. Four warps own 64 x 64 each and read two thirds of the shared
# memory that eight read per multiplication, two programs share a processor, and the epilogue of one overlaps the loop of
# the other: on A100 and H100 the tensor cores can then work 93 and 90 % of a layer, with eight warps 90 and 83 %. It
# takes 240 to 255 registers, so that scales per group, zero points and the newest cards, where it would spill or gains
# nothing, stay with eight.
_FEW = (
    (16, Launch(16, 128, warps=4, stages=4)),
    (32, Launch(32, 128, warps=4, stages=4)),
    (64, Launch(64, 128, warps=4, stages=4)),
)
_GEMM = (*_FEW, (LARGE, Launch(128, 128)))
# Radeon: waves of 32 threads, so that 64 rows want eight (with four: 328 bytes spilled on gfx1100).
_FEW_RDNA = ((16, Launch(16, 128, warps=4, stages=2)), (LARGE, Launch(64, 128, stages=2)))
_GEMM_WIDE = (*_FEW, (LARGE, Launch(128, 128, warps=4)))

# The activation kernel is bound by memory. Two warps: with four, the low-rank product of 32 rows has each tile of x in
# the registers of two warps, and both quantize it (534 instead of 276 warp instructions per 1024 values, int4_g64,
# sm_80).
_ACT = ((LARGE, Launch(32, warps=2, stages=3)),)

# FP4. With tensor memory four warps suffice and two programs share a multiprocessor, so that one's epilogue overlaps the
# other's loop (108 KiB and 256 columns each). On GeForce eight warps of 147 registers run at a time, with 54 KiB.
_FP4, _FP4_GEFORCE = Launch(128, 128, 256, 4, 3), Launch(128, 128, 128, 8, 4)

TABLE: dict[tuple[str, str], tuple[tuple[int, Launch], ...]] = {
    ("act", "any"): _ACT,
    ("linear", "any"): _GEMM,
    ("linear", "sm_8x"): _GEMM_WIDE,
    ("linear", "sm_90"): _GEMM_WIDE,
    ("linear", "rdna"): (_FEW_RDNA[0], (64, _FEW_RDNA[1][1]), (LARGE, Launch(128, 128, stages=2))),
    **{(op, "rdna"): _FEW_RDNA for op in ("linear_groups", "linear_zeros", "linear_heads", "mlp")},
    ("w4a16", "rdna"): ((16, Launch(16, 64, warps=4, stages=2)), (LARGE, Launch(64, 64, stages=2))),
    ("linear_groups", "any"): _GEMM,
    ("linear_groups", "sm_8x"): _GEMM_WIDE,
    ("linear_zeros", "any"): _GEMM,
    ("linear_heads", "any"): _GEMM,
    ("mlp", "any"): _GEMM,
    ("w4a16", "any"): (
        (16, Launch(16, 64, warps=4, stages=4)),
        (32, Launch(32, 64, warps=4, stages=4)),
        (64, Launch(64, 64, warps=4, stages=4)),
        (LARGE, Launch(128, 128)),
    ),
    ("fp4", "any"): ((LARGE, _FP4),),
    ("fp4", "sm_120"): ((LARGE, _FP4_GEFORCE),),
    ("hadamard", "any"): ((LARGE, Launch(16, warps=4)),),
}


FAMILIES = ("sm_8x", "sm_90", "sm_100", "sm_120", "amd", "rdna", "cpu", "any")
_POWERS = (16, 32, 64, 128, 256)
_ALLOWED = {
    "bm": _POWERS,
    "bn": (0, *_POWERS),
    "bk": (0, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 9),
}
_MOST_BYTES = 1 << 20


def launch(op: str, capability: tuple[int, int] | str | None, m: int) -> Launch:
    """The configuration of `op` for M = m rows on a processor of this capability."""
    _from_environment()
    rows = TABLE.get((op, family(capability)), TABLE[op, "any"])
    return next(entry for most, entry in rows if m <= most)


def capability_of(device: torch.device) -> tuple[int, int] | str | None:
    """Capability of a device as `Ask` states it; None for the CPU, where kernels run interpreted."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return torch.cuda.get_device_capability(device)


@cache
def _from_environment() -> None:
    """Loads the file that the environment names, once; a file that cannot be loaded is an error each time."""
    if path := os.environ.get(VARIABLE):
        load(path)


def load(path: str | Path) -> int:
    """Puts the entries of a file that `bench --tune` wrote into TABLE and returns how many there were.

    An entry replaces the launch of the op's rows that its M belongs to, for its family of processors. ValueError if the
    file is not what it should be; then nothing is changed. Files come from anybody: nothing in them is run.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"expected at most {_MOST_BYTES} bytes, found {size}")
        entries = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used as a tuning table: {error}") from error
    for (op, kind), m, entry in entries:
        rows = TABLE.get((op, kind), TABLE[op, "any"])
        index = next(i for i, (most, _) in enumerate(rows) if m <= most)
        TABLE[op, kind] = (*rows[:index], (rows[index][0], entry), *rows[index + 1 :])
    return len(entries)


def parse(text: str) -> list[tuple[tuple[str, str], int, Launch]]:
    """(key of TABLE, rows M, launch) of each entry of a tuning file; ValueError naming the first thing that is wrong."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("expected an object with a list 'entries' of objects")
    return [_entry(i, entry) for i, entry in enumerate(entries)]


def _entry(i: int, entry: dict) -> tuple[tuple[str, str], int, Launch]:
    ops = sorted({op for op, _ in TABLE})
    op, kind, m, values = (entry.get(key) for key in ("op", "family", "m", "launch"))
    for what, found, known in (("op", op, ops), ("family", kind, FAMILIES)):
        if found not in known:
            raise ValueError(f"entry {i}: {unknown(what, found, known)}")
    if type(m) is not int or m < 1:
        raise ValueError(f"entry {i}: m is a number of rows, found {m!r}")
    names = {field.name for field in fields(Launch)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"entry {i}: launch has the keys {', '.join(sorted(names))}, found {values!r}"[:300])
    for name, value in values.items():
        if type(value) is not int or value not in _ALLOWED[name]:
            raise ValueError(f"entry {i}: {name} is one of {', '.join(map(str, _ALLOWED[name]))}; found {value!r}")
    if op == "fp4" and (values["bm"] % 128 or values["bn"] % 128 or values["bn"] == 0 or values["bk"] < 128):
        raise ValueError(f"entry {i}: tiles of fp4 are multiples of 128 in all three directions, found {values}")
    return (op, kind), m, Launch(**values)
