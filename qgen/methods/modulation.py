r"""Modulation cache: what depends on the timestep alone (and on pooled text) is computed once for each step, then looked up.

Time embeddings and adaLN projections see one row per sample, and hold a quarter of a Flux model. Modules whose outputs are such rows are
found structurally, in one run under hooks: the largest ones that own a linear layer and return nothing but (B, D) tensors. Which arguments
of the denoiser they depend on is found by changing one at a time. A call's key is the bytes of those arguments:

    hit    every output is the stored tensor, bit for bit what was computed; the modules do not run, and their weights may lie elsewhere
    miss   computed as ever and stored: other steps, schedulers, prompts or guidance are right by construction

Where the timestep alone decides, a low-rank curve over t can stand for the modules on a miss (`qgen.methods.modulation_curve`), if what it
disturbs, measured between its knots, is little enough. Caching temporal features: Huang et al., 2024, https://arxiv.org/abs/2407.19547
"""

__all__ = ["ModulationCache", "cache_modulation", "temporal_modules"]

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import Call, _map
from qgen.errors import NotQuantizable
from qgen.methods.modulation_curve import Curve, Table
from qgen.nn.packed import Packed


def temporal_modules(module: nn.Module, call: Call) -> dict[str, tuple[str, ...]]:
    """Paths of modules that make one row per sample, and the arguments of the denoiser on which they depend; {} if there are none.

    Arguments:
        call: one that the denoiser answers; it is run once, and once more for each of its tensors.
    """
    plain = _outputs(module, call, [path for path, _ in module.named_modules() if path])
    batch = max((t.shape[0] for _, t in call.tensors() if t.ndim > 1), default=1)
    rows = {path for path, out in plain.items() if out and all(t.ndim == 2 and t.shape[0] in (1, batch) for t in out)}
    owners = [path for path in rows if any(isinstance(m, nn.Linear) for m in module.get_submodule(path).modules())]
    largest = [path for path in owners if not any(path.startswith(other + ".") for other in owners)]
    depends: dict[str, list[str]] = {path: [] for path in largest}
    for name, tensor in call.tensors():
        changed = _outputs(module, _changed(call, tensor), largest)
        for path in largest:
            if not all(torch.equal(a, b) for a, b in zip(plain[path], changed[path], strict=True)):
                depends[path].append(name)
    bulk = {name for name, t in call.tensors() if t.ndim > 2}  # latents and token texts are new at every call: no key
    return {path: tuple(names) for path, names in depends.items() if names and not bulk & set(names)}


def _changed(call: Call, tensor: Tensor) -> Call:

    def other(t: Tensor) -> Tensor:
        if t is not tensor or t.dtype == torch.bool:
            return t
        return t + 1 + t.abs() / 4 if t.is_floating_point() else t + 1  # + 1 alone is lost in bfloat16

    return Call(_map(call.args, other), _map(call.kwargs, other), call.moment)


def _outputs(module: nn.Module, call: Call, paths: list[str]) -> dict[str, list[Tensor]]:
    """Output tensors of the modules at `paths` in one run of `call`; [] for one that returns anything else, or runs more than once."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Callable:
        return lambda m, a, out: found.__setitem__(path, [] if path in found else _flat(out))

    hooks = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        with torch.no_grad():
            call.run(module)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found.get(path, []) for path in paths}


def _flat(out: Any) -> list[Tensor]:
    parts = out if isinstance(out, tuple) else (out,)
    return [t.detach().clone() for t in parts] if all(isinstance(t, Tensor) for t in parts) else []


@dataclass
class _Entry:
    """Outputs of every module for one key."""

    outputs: dict[str, Any]
    nbytes: int = 0


class ModulationCache:
    """Serves a denoiser's temporal modules; made by `cache_modulation`. `hits` and `misses` count calls of the denoiser.

    curves: {path: a curve, or a table, for each output} of modules that are not computed on a miss, see `bend` and
    `qgen.methods.modulation_table`.
    """

    def __init__(self, module: nn.Module, names: dict[str, tuple[str, ...]], limit: int, offload: bool):
        self.module, self.limit = module, limit
        self.parts = {path: module.get_submodule(path) for path in names}
        self.names = names
        self.keys = sorted({name for depends in names.values() for name in depends})
        self.curves: dict[str, tuple[Curve | Table, ...]] = {}
        self.clock, self.t = "", torch.zeros(1)
        self.entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.now: _Entry | None = None
        self.hit = False
        self.hits = self.misses = 0
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.offloaded = offload
        self.hooks = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]
        for path, part in self.parts.items():
            part.__dict__["forward"] = self._serving(path, part.forward)
            if offload:
                part.to("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of all stored outputs."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weights that a hit does not need."""
        return sum(
            sum(t.nbytes for t in (m.slots().values() if isinstance(m, Packed) else m.parameters(recurse=False)))
            for part in self.parts.values() for m in part.modules()
        )  # fmt: skip

    def report(self) -> dict[str, int]:
        """{"modules", "entries", "weight_bytes", "table_bytes", "saved_bytes", "hits", "misses"}: saved where weights lie elsewhere."""
        weights, table = self.weight_nbytes, self.nbytes
        return {
            "modules": len(self.parts), "entries": len(self.entries), "weight_bytes": weights, "table_bytes": table,
            "saved_bytes": weights - table, "hits": self.hits, "misses": self.misses,
        } | ({"curve_bytes": sum(c.nbytes for made in self.curves.values() for c in made)} if self.curves else {})  # fmt: skip

    def bend(self, call: Call, timesteps: Tensor, rank: int = 16, budget: float = 1e-5) -> dict[str, float]:
        """Fits curves to modules that depend on the timestep alone; on a miss within their range they answer in the modules' place.

        Arguments:
            call: a recorded call; it is run once for each knot, and once between each two.
            timesteps: (n,) knots, in the scheduler's units. rank: of the curves.
            budget: largest disturbance, relative squared error between the knots; a module above it goes on being computed.

        Returns the disturbance of each such module, kept or not. What was stored is forgotten.
        """
        paths = self.timed()
        knots = timesteps.double().sort().values.unique()
        between = (knots[1:] + knots[:-1]) / 2
        self.curves = {}
        at_knots, at_middles = (self.outputs_at(call, paths, t) for t in (knots, between))
        found = {}
        for path in paths:
            made = tuple(Curve.fit(knots, values, rank) for values in at_knots[path])
            lost = [curve.disturbance(between, values) for curve, values in zip(made, at_middles[path], strict=True)]
            found[path] = max(lost, default=1.0)
            if made and found[path] <= budget:
                self.curves[path] = made
        self.clear()
        return found

    def timed(self) -> list[str]:
        """Paths of the modules that depend on the timestep alone. NotQuantizable if there are none."""
        clocks = {names[0] for names in self.names.values() if len(names) == 1}
        if len(clocks) != 1:
            raise NotQuantizable(
                f"{type(self.module).__name__} has no modules that depend on one argument alone: found {sorted(clocks) or 'none'}"
            )
        self.clock = clocks.pop()
        return [path for path, names in self.names.items() if len(names) == 1]

    def outputs_at(self, call: Call, paths: list[str], times: Tensor) -> dict[str, list[Tensor]]:
        """Outputs (n, D) of the first sample at timesteps `times` (n,), for each output of each module."""
        rows: dict[str, list[list[Tensor]]] = {path: [] for path in paths}
        given = dict(call.tensors())[self.clock]
        for t in times.tolist():
            self.clear()
            moved = lambda old, t=t: torch.full_like(old, t) if old is given else old  # noqa: E731
            with torch.no_grad():
                Call(_map(call.args, moved), _map(call.kwargs, moved), call.moment).run(self.module)
            entry = next(reversed(self.entries.values()))
            for path in paths:
                rows[path].append([out[0].float().clone() for out in _tensors(entry.outputs[path])])
        return {path: [torch.stack(column) for column in zip(*made, strict=True)] for path, made in rows.items()}

    def _from_curve(self, path: str, like: torch.dtype) -> Any:
        """What the curves of a module give at the running call's timesteps, or None where there are none, or it lies beyond them."""
        made = self.curves.get(path)
        if made is None or not made[0].serves(self.t):
            return None
        outs = tuple(curve(self.t).to(like) for curve in made)
        return outs if len(outs) > 1 else outs[0]

    def clear(self) -> None:
        """Forgets all entries: call it after weights or adapters of the modules have changed."""
        self.entries.clear()

    def remove(self) -> None:
        """The denoiser as it was, weights back where it computes."""
        for hook in self.hooks:
            hook.remove()
        for part in self.parts.values():
            part.__dict__.pop("forward", None)
            if self.offloaded:
                part.to(self.device)
        self.module.__dict__.pop("qgen_modulation", None)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(Call(args, kwargs).tensors())
        numbers = [(i, v) for i, v in (*enumerate(args), *kwargs.items()) if isinstance(v, (bool, int, float))]
        key = b"".join(_bytes(name, given.get(name)) for name in self.keys) + repr(numbers).encode()
        self.hit = key in self.entries
        self.now = self.entries.setdefault(key, _Entry({}))
        if self.curves:
            self.t = given[self.clock].detach().float().reshape(-1)
        self.entries.move_to_end(key)
        self.hits, self.misses = self.hits + self.hit, self.misses + (not self.hit)

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.now is not None and (output is None or len(self.now.outputs) < len(self.parts)):
            self.entries.popitem()  # the call failed, or did not reach every module: nothing to go by
        self.now = None
        while len(self.entries) > 1 and self.nbytes > self.limit:
            self.entries.popitem(last=False)

    def _serving(self, path: str, forward: Callable) -> Callable:
        def serve(*args: Any, **kwargs: Any) -> Any:
            entry, part = self.now, self.parts[path]
            if entry is not None and path in entry.outputs:
                return entry.outputs[path]
            out = (
                self._from_curve(path, next(t.dtype for t in part.parameters() if t.is_floating_point()))
                if self.curves
                else None
            )
            if out is None:
                if self.offloaded:
                    part.to(self.device)
                out = forward(*args, **kwargs)
                if self.offloaded:
                    part.to("cpu")
            if entry is not None:
                kept = _kept(out)
                entry.outputs[path] = kept
                entry.nbytes += sum(t.untyped_storage().nbytes() for t in _tensors(kept))
            return out

        return serve


def _bytes(name: str, value: Any) -> bytes:
    """The bytes of an argument, with its name, shape and dtype: two keys are equal where the calls are."""
    if not isinstance(value, Tensor):
        return f"{name}={value!r};".encode()
    data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{name}:{tuple(value.shape)}:{value.dtype};".encode() + data


def _tensors(out: Any) -> Iterator[Tensor]:
    yield from out if isinstance(out, tuple) else (out,)


def _kept(out: Any) -> Any:
    """A copy of an output; samples that are alike, bit for bit, are stored once."""

    def copy(t: Tensor) -> Tensor:
        t = t.detach()
        alike = len(t) > 1 and bool((t == t[:1]).all())
        return t[:1].clone().expand(t.shape) if alike else t.clone()

    return tuple(copy(t) for t in out) if isinstance(out, tuple) else copy(out)


def cache_modulation(
    module: nn.Module, call: Call, *, limit: int = 256 << 20, offload: bool = False
) -> ModulationCache:
    """Caches a denoiser's temporal modules from now on; the first run of a schedule fills the table. Reading keys waits for the device once
    a call. `torch.compile` the blocks, not the whole denoiser, with it.

    Arguments:
        call: a recorded call, to find the modules by. limit: bytes of stored outputs; the calls that were not used longest go first.
        offload: weights of the modules lie in the computer's memory and come for misses alone.

    NotQuantizable if no module of the denoiser makes one row per sample, or it is cached already.
    """
    if "qgen_modulation" in module.__dict__:
        raise NotQuantizable(
            f"{type(module).__name__} has a modulation cache already: module.qgen_modulation.remove() takes it off"
        )
    names = temporal_modules(module, call)
    if not names:
        raise NotQuantizable(
            f"{type(module).__name__} has no module that depends on the timestep alone: nothing to cache"
        )
    cache = module.__dict__["qgen_modulation"] = ModulationCache(module, names, limit, offload)
    return cache
