"""Which kernel serves which request: requirements as data, one function that chooses, errors that list every refusal.

A layer describes itself once as an `Ask`, when its device is known. `choose` returns the best `Kernel` whose `Needs` are met, or raises
`NoKernel` naming, for each candidate, what it lacks. Nothing here knows a module, and nothing is decided again at run time.
"""

__all__ = ["Ask", "Kernel", "Needs", "choose", "explain", "find", "kernels", "register", "use"]

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from qgen.errors import NoKernel, unknown
from qgen.registry import Registry

kernels: Registry["Kernel"] = Registry("kernel", "qgen.kernels")
_forced: ContextVar[str | None] = ContextVar("qgen_kernel", default=None)


@dataclass(frozen=True)
class Ask:
    """What a layer wants to run, and where.

    device: "cpu", "cuda" or "hip". capability: CUDA compute capability as a tuple (8, 9), or the AMD architecture "gfx942", or None.
    weight, act: names of number formats; act "" = activations stay float. traits: extras in use, of
    {"smooth", "lowrank", "hadamard", "shift", "static_act", "bias"}. hadamard: size of the block transform along K, 0 =
    none. static: "" = scales of activations are computed on the fly, "tensor" = one is stored for all, "block" = one for
    each block along K. Both belong to the trait of their name.
    """

    op: str
    device: str
    weight: str = ""
    act: str = ""
    dtype: torch.dtype = torch.bfloat16
    n: int = 0
    k: int = 0
    rank: int = 0
    capability: tuple[int, int] | str | None = None
    traits: frozenset[str] = frozenset()
    hadamard: int = 0
    static: str = ""

    def __str__(self) -> str:
        found = self.capability
        arch = "" if found is None else f" {found}" if isinstance(found, str) else f" sm_{found[0]}{found[1]}"
        formats = f"{self.weight} x {self.act or 'float'}"
        extras = f", Hadamard {self.hadamard}" if self.hadamard else ""
        extras += f", static scales per {self.static}" if self.static else ""
        return f"{self.op}({formats}, K={self.k}, N={self.n}, {str(self.dtype)[6:]}{extras}) on {self.device}{arch}"


@dataclass(frozen=True)
class Needs:
    """What a kernel requires, as data. An empty tuple or None means "anything".

    hadamards: sizes of the block transform that it computes. statics: kinds of stored activation scales that it reads, see
    `Ask.static`; () = none. refuses: traits that it cannot do at all.
    """

    devices: tuple[str, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    archs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    acts: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    k_multiple: int = 1
    n_multiple: int = 1
    rank_multiple: int = 1
    package: str | None = None
    refuses: frozenset[str] = frozenset()
    hadamards: tuple[int, ...] = ()
    statics: tuple[str, ...] | None = None

    def refusals(self, ask: Ask) -> list[str]:
        """Reasons why `ask` cannot be served; empty if it can."""
        why = []
        if self.devices and ask.device not in self.devices:
            why.append(f"runs on {'/'.join(self.devices)}, not {ask.device}")
        elif self.capability and isinstance(ask.capability, tuple):
            low, high = self.capability
            if not low <= ask.capability <= high:
                bounds = [f"{major}.{minor}" for major, minor in (low, high, ask.capability)]
                why.append(f"needs capability {bounds[0]} to {bounds[1]}, found {bounds[2]}")
        elif self.archs and isinstance(ask.capability, str) and ask.capability not in self.archs:
            why.append(f"serves {'/'.join(self.archs)}, found {ask.capability}")
        if self.weights and ask.weight not in self.weights:
            why.append(f"serves weights in {'/'.join(self.weights)}, asked {ask.weight}")
        if self.acts is not None and ask.act not in self.acts:
            why.append(f"serves activations in {'/'.join(a or 'float' for a in self.acts)}, asked {ask.act or 'float'}")
        if self.dtypes and ask.dtype not in self.dtypes:
            why.append(f"serves {'/'.join(str(d)[6:] for d in self.dtypes)}, asked {str(ask.dtype)[6:]}")
        for name, value, multiple in (
            ("K", ask.k, self.k_multiple),
            ("N", ask.n, self.n_multiple),
            ("rank", ask.rank, self.rank_multiple),
        ):
            if value % multiple:
                why.append(f"needs {name} divisible by {multiple}, found {value}")
        if self.refuses & ask.traits:
            why.append(f"cannot do {', '.join(sorted(self.refuses & ask.traits))}")
        if ask.hadamard and self.hadamards and ask.hadamard not in self.hadamards:
            why.append(f"serves block transforms of {'/'.join(map(str, self.hadamards))}, asked {ask.hadamard}")
        if ask.static and self.statics is not None and ask.static not in self.statics:
            served = f"stored per {'/'.join(self.statics)}" if self.statics else "computed on the fly"
            why.append(f"serves scales of activations {served}, asked one per {ask.static}")
        if self.package and importlib.util.find_spec(self.package) is None:
            why.append(f"needs the package {self.package!r}, which is not installed")
        return why


def _same(tensors: dict[str, torch.Tensor], ask: Ask) -> dict[str, torch.Tensor]:
    return tensors


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    run: called with the op's tensors, `run(x, slots)` for "linear". priority: among kernels that can serve, the highest wins.
    pack, unpack: `{slot: tensor}` in canonical bytes to the layout that `run` reads, and back; exact inverses.
    quantize, multiply: `run` in two halves, `multiply(x, quantize(x, slots), slots)`, where layers that read one input may share the
    first; None = the kernel has no halves. reads: slots that the first half looks at, beside the formats.
    """

    op: str
    name: str
    needs: Needs
    run: Callable[..., Any]
    priority: int = 0
    pack: Callable[[dict, Ask], dict] = field(default=_same)
    unpack: Callable[[dict, Ask], dict] = field(default=_same)
    quantize: Callable[..., Any] | None = None
    multiply: Callable[..., Any] | None = None
    reads: tuple[str, ...] = ("smooth", "shift", "act_scale")


def register(kernel: Kernel) -> Kernel:
    """Adds a kernel; names are unique per op."""
    return kernels.add(f"{kernel.op}/{kernel.name}", kernel)


def find(op: str, name: str) -> Kernel:
    """The kernel `name` of `op`; ValueError listing the op's kernels if there is none."""
    key = f"{op}/{name}"
    if key not in kernels:
        raise ValueError(
            unknown(f"kernel of {op}", name, [k.partition("/")[2] for k in kernels if k.startswith(op + "/")])
        )
    return kernels[key]


def choose(ask: Ask, prefer: str | None = None) -> Kernel:
    """The best kernel for `ask`, or exactly `prefer` (or the one forced by `use`); NoKernel with every reason otherwise."""
    prefer = prefer or _forced.get()
    if prefer is not None:
        kernel = find(ask.op, prefer)
        if why := kernel.needs.refusals(ask):
            raise NoKernel(f"{ask}: {prefer} was asked for, but {'; '.join(why)}\n{explain(ask)}")
        return kernel
    able = [k for _, k in kernels.items() if k.op == ask.op and not k.needs.refusals(ask)]
    if not able:
        raise NoKernel(explain(ask))
    return max(able, key=lambda k: (k.priority, k.name))


def explain(ask: Ask) -> str:
    """A text that lists every kernel of the op and why it would or would not serve."""
    rows = [str(ask)]
    for _, kernel in kernels.items():
        if kernel.op == ask.op:
            why = kernel.needs.refusals(ask)
            rows.append(f"  {kernel.name:<16} {'; '.join(why) if why else f'available (priority {kernel.priority})'}")
    return "\n".join(rows)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, layers that are prepared choose the kernel `name` and nothing else."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
