r"""Modulation cache: what depends on the timestep alone (and on pooled text) is computed once for each step, then looked up.

Time embeddings and adaLN projections see one row per sample, and hold a quarter of a Flux model. Modules whose outputs are such rows are
found structurally, in one run under hooks: the largest ones that own a linear layer and return nothing but (B, D) tensors. Which arguments
of the denoiser they depend on is found by changing one at a time. A call's key is the bytes of those arguments:

    hit    every output is the stored tensor, bit for bit what was computed; the modules do not run, and their weights may lie elsewhere
    miss   computed as ever and stored: other steps, schedulers, prompts or guidance are right by construction

Where the timestep alone decides, `Curve` replaces the weights by a low-rank curve over t, m(t) ≈ Σ_r c_r(t) v_r, exact at its knots up to
the rank. Caching temporal features: Huang et al., 2024, https://arxiv.org/abs/2407.19547
"""

__all__ = ["Curve", "ModulationCache", "cache_modulation", "temporal_modules"]

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import Call, _map
from qgen.errors import NotQuantizable
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
    """Serves a denoiser's temporal modules; made by `cache_modulation`. `hits` and `misses` count calls of the denoiser."""

    def __init__(self, module: nn.Module, names: dict[str, tuple[str, ...]], limit: int, offload: bool):
        self.module, self.limit = module, limit
        self.parts = {path: module.get_submodule(path) for path in names}
        self.keys = sorted({name for depends in names.values() for name in depends})
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
        }  # fmt: skip

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


@dataclass(frozen=True)
class Curve:
    """m(t) (D,) as a low-rank curve: knots (n,) ascending, coefficients (n, R) linear between them, basis (R, D), mean (D,)."""

    knots: Tensor
    coefficients: Tensor
    basis: Tensor
    mean: Tensor

    @classmethod
    def fit(cls, t: Tensor, values: Tensor, rank: int) -> "Curve":
        """From values (n, D) at timesteps t (n,): the best of this rank at the knots (Eckart and Young). ValueError for equal timesteps."""
        order = t.float().argsort()
        t, values = t.float()[order], values.float()[order]
        if len(t) < 2 or not bool((t.diff() > 0).all()):
            raise ValueError(
                f"a curve needs at least two different timesteps, found {len(t)}, {len(t.unique())} different"
            )
        mean = values.mean(0)
        u, s, vh = torch.linalg.svd(values - mean, full_matrices=False)
        rank = min(rank, len(s))
        return cls(t, u[:, :rank] * s[:rank], vh[:rank], mean)

    def __call__(self, t: Tensor) -> Tensor:
        """Values (B, D) float32 at timesteps t (B,); beyond the knots, those of the outermost."""
        t = t.float().clamp(self.knots[0], self.knots[-1])
        high = torch.bucketize(t, self.knots).clamp(1, len(self.knots) - 1)
        left, right = self.knots[high - 1], self.knots[high]
        w = ((t - left) / (right - left))[:, None]
        return torch.lerp(self.coefficients[high - 1], self.coefficients[high], w) @ self.basis + self.mean

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.knots, self.coefficients, self.basis, self.mean))

    def disturbance(self, t: Tensor, values: Tensor) -> float:
        """Relative squared error at timesteps t (n,) whose true values (n, D) are known: what decides between curve and layer."""
        return float((self(t) - values.float()).square().sum() / values.float().square().sum().clamp_min(1e-30))
