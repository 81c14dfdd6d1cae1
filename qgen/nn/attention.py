r"""Low-bit attention inside a model: calls of torch's attention are caught in the module that makes them, and nowhere else.

The innermost module whose forward calls `scaled_dot_product_attention` *owns* the call. An owner becomes an instance of a subclass of its
class, the same in all but one thing: while it runs, a torch-function mode sends those calls to `qgen::attention_choice`. So it does not
matter how the call is written: by a processor, by a dispatcher, by transformers' attention functions, by hand. Other models, and other
modules of this one, see nothing of it; copies, hooks, offloading and `torch.compile(fullgraph=True)` work as before.

Which numbers an owner uses depends on where sampling is: `Choices` lists them for each owner and range of timesteps, as plain data that
a checkpoint holds. The model's `nn.clock` reads the timestep once per call. What a kernel does not mean (dropout, other shapes, causal
calls with more keys than queries, a single query) goes through to torch untouched.
"""

__all__ = ["Choices", "install", "refusal", "remove"]

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qgen.errors import unknown
from qgen.kernels import attention_choice  # noqa: F401 (defines the op)
from qgen.kernels.attention_ops import SPECS
from qgen.nn.attention_library import give_back, use_torch
from qgen.nn.clock import NAMES, Clock, argument_of, clock_of, stop
from qgen.nn.multihead import multi_head

_MOST = 64  # ranges of timesteps; more is damage


@dataclass(frozen=True)
class Choices:
    """Which numbers attention uses: {path of the owner: a spec for each range of timesteps}, "" = torch's own attention.

    edges: ascending; range i holds edges[i - 1] < t <= edges[i]. argument: name of the denoiser's argument that holds t, "" = none, and
    then there is one range. ValueError for anything else.
    """

    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    argument: str = ""

    def __post_init__(self) -> None:
        edges, argument = tuple(self.edges), self.argument
        object.__setattr__(self, "edges", edges)
        if argument not in ("", *NAMES) or len(edges) >= _MOST or (edges and not argument):
            raise ValueError(
                f"choices of attention have edges of an argument {'/'.join(NAMES)}, found {argument!r}, {edges}"
            )
        if any(type(e) not in (int, float) or not math.isfinite(e) for e in edges) or list(edges) != sorted(edges):
            raise ValueError(f"edges of timesteps are ascending numbers, found {edges}")
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers with attention are a mapping, found {type(self.layers).__name__}")
        made = {}
        for path, specs in self.layers.items():
            if not isinstance(path, str) or not isinstance(specs, (list, tuple)) or len(specs) != len(edges) + 1:
                raise ValueError(f"attention of {str(path)[:80]!r} is {len(edges) + 1} names of specs, found {specs!r}")
            for spec in specs:
                if spec != "" and (not isinstance(spec, str) or spec not in SPECS):
                    raise ValueError(unknown("attention spec", str(spec)[:80], SPECS))
            made[path] = tuple(specs)
        object.__setattr__(self, "layers", made)

    @property
    def specs(self) -> tuple[str, ...]:
        """The names in use, in a fixed order, "" first."""
        used = {spec for specs in self.layers.values() for spec in specs}
        return ("", *(spec for spec in SPECS if spec in used))

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            **asdict(self),
            "edges": list(self.edges),
            "layers": {path: list(specs) for path, specs in sorted(self.layers.items())},
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Choices":
        """Inverse of `to_dict`; ValueError for anything that it does not write."""
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
            raise ValueError(f"choices of attention are an object of {', '.join(f.name for f in fields(cls))}")
        if not isinstance(data["edges"], (list, tuple)) or not isinstance(data["argument"], str):
            raise ValueError("choices of attention have a list of edges and the name of an argument")
        return cls(**data)

    def check(self, module: nn.Module) -> None:
        """ValueError if an owner is not in the module, or the module takes no such argument."""
        known = dict(module.named_modules(remove_duplicate=False))
        for path in self.layers:
            if path not in known:
                raise ValueError(
                    f"{type(module).__name__} has no module {path[:80]!r} whose attention could be quantized"
                )
        if self.argument and self.argument != (found := argument_of(module)):
            raise ValueError(
                f"attention chosen by the argument {self.argument!r}: the timestep of {type(module).__name__} is {found or 'no argument'!r}"
            )


@dataclass
class _Slot:
    """What an owner knows: one entry of `table` (int64, on the CPU) for each range of timesteps, an index into `specs`.

    multi: `nn.MultiheadAttention`'s function for this owner.
    """

    clock: Clock
    table: Tensor
    specs: str
    multi: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.multi = multi_head(functools.partial(_serve, self))

    def __deepcopy__(self, memo: dict) -> "_Slot":
        return _Slot(copy.deepcopy(self.clock, memo), self.table.clone(), self.specs)


class _Reroute(TorchFunctionMode):
    def __init__(self, slot: _Slot):
        super().__init__()
        self.slot = slot

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _serve(self.slot, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self.slot.multi(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _serve(
    slot: _Slot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if refusal(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return torch.ops.qgen.attention_choice(
        query, key, value, attn_mask, is_causal, scale, slot.clock.where, slot.table, slot.specs
    )


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Why a call of torch's attention is left to torch; "" if it is ours to serve. Looks at shapes and dtypes alone."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        return "wants q, k, v of four dimensions, k and v of one shape"
    if query.is_nested or key.is_nested:
        return "sequences of different lengths are packed"
    (b, h, lq, d), (bk, hk, lk, dk) = query.shape, key.shape
    if (bk, dk) != (b, d) or h % hk or (h != hk and not enable_gqa):
        return "q and k differ in batch or width"
    if lq < 2 or lk < 1:
        return "a single query: reading the keys is all the work"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        return "q, k, v are not of one float dtype"
    if dropout_p:
        return "dropout"
    if is_causal and (lq != lk or attn_mask is not None):
        return "causal with a mask, or with more keys than queries"
    if isinstance(scale, Tensor) or (scale is not None and not scale > 0):
        return "a scale that is not above 0"
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() > 4):
        return "a mask that is trained"
    return ""


@functools.cache
def _rerouted(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an owner's class. It overrides `__call__`, since hooks of offloading put their own `forward` on instances."""

    class Owner(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _Reroute(self._qgen_attention):
                return super().__call__(*args, **kwargs)

    Owner.__name__, Owner.__qualname__, Owner.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    Owner.__doc__ = kind.__doc__
    return Owner


def install(module: nn.Module, choices: Choices) -> None:
    """Reroutes the attention of `module`'s owners, in place, and leaves `module.qgen_attention = choices`. What was installed goes.

    ValueError, before anything is changed, if the choices do not fit the module.
    """
    choices.check(module)
    remove(module)
    specs = choices.specs
    clock = clock_of(module)
    clock.edges = choices.edges
    owners = {path: module.get_submodule(path) for path, used in choices.layers.items() if any(used)}
    module._qgen_backend = use_torch(module, owners.values())
    for path, owner in owners.items():
        table = torch.tensor([specs.index(spec) for spec in choices.layers[path]])
        owner._qgen_attention = _Slot(clock, table, ",".join(specs))
        owner.__class__ = _rerouted(type(owner))
    stop(module)  # unless there is something to tell the time to
    module.qgen_attention = choices


def remove(module: nn.Module) -> None:
    """Undoes `install`: classes, hook and marks are as they were."""
    for owner in module.modules():
        if "_qgen_attention" in owner.__dict__:
            owner.__class__ = type(owner).__bases__[0]
            del owner._qgen_attention
    if "_qgen_backend" in module.__dict__:
        give_back(module, module.__dict__.pop("_qgen_backend"))
    if "qgen_clock" in module.__dict__:
        module.__dict__["qgen_clock"].edges = ()
        stop(module)
    module.__dict__.pop("qgen_attention", None)
