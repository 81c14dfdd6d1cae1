r"""Which numbers attention may use, by layer and timestep, decided by the error that was measured.

Recorded calls are replayed through the model as it is (its linear layers quantized already). At each call of torch's attention every
candidate computes the same output from the same q, k, v, and

    error = ‖candidate - float‖ / ‖float‖        over the whole output of the call, float computed in float32

is kept as the worst over the calls of its owner in each range of timesteps. The cheapest candidate whose error stays within the budget
serves that range; in "auto", torch's own attention does where none stays within it, and in the first and the last step, where images
get their layout and their detail. Adaptive choice over layers and steps: SageAttention 2, https://arxiv.org/abs/2411.10958.
"""

__all__ = ["AttentionSpec", "as_spec", "choose", "quantize_attention"]

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qgen.calibration.base import CalibrationSet, Call
from qgen.errors import BadData, unknown
from qgen.kernels import attention_ops, tuning
from qgen.kernels.attention_choice import kernel_for, smooths_q
from qgen.nn.attention import Choices, install, refusal, remove
from qgen.nn.attention_library import give_back, use_torch
from qgen.nn.clock import argument_of
from qgen.nn.multihead import multi_head

# Candidates, cheapest first; "" = torch's own attention. The last one is taken whatever its error.
MODES = {"int8": ("int8_fp8", "int8"), "fp4": ("fp4", "fp4_fp8")}


@dataclass(frozen=True)
class AttentionSpec:
    """How attention is quantized.

    mode: "auto" = what the device runs best, adaptive; "int8" = int8 q kᵀ everywhere, P v in fp8 within the budget, else in 16 bits;
    "fp4" = e2m1 q kᵀ everywhere, P v in e2m1 within the budget, else in fp8. budget: largest relative error of one layer's attention.
    margin: the share of it that the worst sample of the recorded calls may use, since others err a little more.
    ranges: of timesteps that choose for themselves. ends: whether the first and the last step stay in 16 bits (None = in "auto").
    calls: recorded calls that are looked at. ValueError for what makes no sense.
    """

    mode: str = "auto"
    budget: float = 0.02
    margin: float = 0.9
    ranges: int = 4
    ends: bool | None = None
    calls: int = 24

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *MODES):
            raise ValueError(unknown("attention", str(self.mode), ("auto", *MODES)))
        if not (self.budget > 0 and math.isfinite(self.budget)):
            raise ValueError(f"the budget of attention is a relative error above 0, found {self.budget}")
        if not 0 < self.margin <= 1:
            raise ValueError(
                f"the margin of attention is a share of the budget above 0 and up to 1, found {self.margin}"
            )
        if not 1 <= self.ranges <= 32 or self.calls < 1:
            raise ValueError(
                f"attention wants 1 to 32 ranges and at least one call, found {self.ranges} and {self.calls}"
            )

    @property
    def keeps_ends(self) -> bool:
        return self.mode == "auto" if self.ends is None else self.ends

    def candidates(self, device: torch.device) -> tuple[str, ...]:
        """Names of specs for a device, cheapest first."""
        if self.mode != "auto":
            return MODES[self.mode]
        best = "int8_fp8" if device.type == "cpu" else attention_ops.default_spec(tuning.capability_of(device))
        return (*dict.fromkeys(s for s in (best, "int8_fp8", "int8") if s), "") if best else ("",)


def as_spec(given: Any) -> AttentionSpec | None:
    """An AttentionSpec from what a user passes as `attention`; ValueError with the nearest mode."""
    if given is None or isinstance(given, AttentionSpec):
        return given
    if not isinstance(given, str):
        raise ValueError(f"attention is a mode or an AttentionSpec, found {type(given).__name__}")
    return AttentionSpec(given)


def quantize_attention(module: nn.Module, given: Any, calls: CalibrationSet | None) -> list[dict]:
    """Chooses and installs; returns one report row per owner, and per module whose attention stays as it is, with the reason.

    `given` None: nothing happens, no rows. Raises ValueError without calls, BadData if an attention's output is not finite.
    """
    spec = as_spec(given)
    if spec is None:
        return []
    if calls is None or not calls.calls:
        raise ValueError(
            f"attention={spec.mode!r} is chosen by measured error: pass calibration=[...] with recorded calls of {type(module).__name__}"
        )
    choices, rows = choose(module, spec, calls)
    install(module, choices)
    return rows


def choose(module: nn.Module, spec: AttentionSpec, calls: CalibrationSet) -> tuple[Choices, list[dict]]:
    """Choices for every owner that the calls reach, and rows for the report. The module is left as it was."""
    edges, argument, ends = _edges(module, calls, spec)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    names = spec.candidates(device)
    remove(module)
    seen = observe(module, _spread(calls.calls, spec.calls), edges, [n for n in names if n])
    kept = {0, len(edges)} if ends else set()
    layers, rows = {}, []
    for path, owner in seen.owners.items():
        used = [
            "" if i in kept else _cheapest(owner, i, names, spec.budget * spec.margin) for i in range(len(edges) + 1)
        ]
        if any(used):
            layers[path] = tuple(used)
        rows.append(_row(path, used, owner, spec, ends))
    rows += [_untouched(path, why) for path, why in seen.untouched.items()]
    return Choices(layers, edges, argument), rows


def _cheapest(owner: "_Owner", at: int, names: Sequence[str], budget: float) -> str:
    """The first candidate whose worst error is within the budget. A range that no call reached goes by all calls."""
    errors = owner.errors.get(at) or owner.overall()
    able = [name for name in names if not name or name in errors]
    if not able:
        return ""
    return next((name for name in able if not name or errors[name] <= budget), able[-1])


def _row(path: str, used: list[str], owner: "_Owner", spec: AttentionSpec, ends: bool) -> dict:
    """What the report says of one owner: the share of ranges that each choice serves, and the worst error of what was chosen."""
    errors = [owner.errors.get(i, owner.overall()).get(name, 0.0) for i, name in enumerate(used) if name]
    counts = {name: used.count(name) for name in dict.fromkeys(used)}
    many = len(used) > 1
    text = ", ".join(f"{name or '16-bit'}{f' x{n}' if many else ''}" for name, n in counts.items())
    why = f"{spec.mode}, budget {spec.budget:g}" + (", first and last step kept" if ends else "")
    if not errors:
        all_errors = owner.overall()
        best = min(all_errors.values(), default=None)
        over = "no kernel of this device serves it" if best is None else f"smallest error {best:.2g} is over the budget"
        return _untouched(path, f"{why}: {over}")
    worst = max(errors)
    made = {"path": path, "kind": "attention", "spec": text, "kernel": ", ".join(sorted(owner.kernels)), "why": why}
    return {**made, "sqnr_db": -20 * math.log10(max(worst, 1e-9)), "log": {"worst error": f"{worst:.3g}"}}


def _untouched(path: str, why: str) -> dict:
    return {"path": path, "kind": "attention", "spec": "float", "kernel": "", "why": why}


# -- measuring -----------------------------------------------------------------------------------------------------------
@dataclass
class _Owner:
    """Worst errors of one owner: {range: {spec: error}}, and the kernels that served."""

    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    kernels: set[str] = field(default_factory=set)

    def add(self, at: int, spec: str, error: float) -> None:
        mine = self.errors.setdefault(at, {})
        mine[spec] = max(mine.get(spec, 0.0), error)

    def overall(self) -> dict[str, float]:
        """Worst errors over all ranges."""
        worst: dict[str, float] = {}
        for mine in self.errors.values():
            for spec, error in mine.items():
                worst[spec] = max(worst.get(spec, 0.0), error)
        return worst


class _Seen(TorchFunctionMode):
    """Watches a replay: who calls attention, and how far each candidate is from float. Float goes on."""

    def __init__(self, specs: Sequence[str]):
        super().__init__()
        self.specs = specs
        self.stack: list[str] = []
        self.at = 0
        self.ran: set[str] = set()
        self.owners: dict[str, _Owner] = {}
        self.untouched: dict[str, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._watched(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multi_head(self._watched)(*args, **kwargs)
        return func(*args, **kwargs)

    def _watched(self, *args: Any, **kwargs: Any) -> Tensor:
        self._compare(*args, **kwargs)
        return F.scaled_dot_product_attention(*args, **kwargs)

    def _compare(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        path = self.stack[-1] if self.stack else ""
        if why := refusal(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
            self.untouched.setdefault(path, why)
            return
        owner = self.owners.setdefault(path, _Owner())
        q, k, v = (t.float() for t in (query, key, value))
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
        want = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        some = torch.ones_like(want[..., :1], dtype=torch.bool) if mask is None else _sees(mask, want)
        energy = _by_sample(torch.where(some, want, 0.0)).clamp_min(1e-30)
        for spec in self.specs:
            kernel = kernel_for(query, spec, attn_mask, is_causal)
            if kernel is None:
                continue
            args = (attn_mask, is_causal, scale, spec, True, smooths_q(spec), kernel)
            got, _ = torch.ops.qgen.attention(query, key, value, *args)
            lost = _by_sample(torch.where(some, got.float() - want, 0.0))
            error = math.sqrt(float((lost / energy).max())) if want.numel() else 0.0
            if not math.isfinite(error):
                raise BadData(
                    f"attention of {path or 'the module'}: its output holds NaN or infinity; nothing was changed"
                )
            owner.add(self.at, spec, error)
            owner.kernels.add(kernel)


def _by_sample(t: Tensor) -> Tensor:
    """Sum of squares of each sample of a batch (B, H, L, D), or of the whole where there is no batch: a call's worst is not its mean."""
    return t.square().flatten(1 if t.ndim == 4 else 0).sum(-1)


def _sees(mask: Tensor, out: Tensor) -> Tensor:
    """(B, H, Lq, 1): rows that see any key; torch gives NaN for the others."""
    allowed = mask if mask.dtype == torch.bool else mask > -math.inf
    rows = allowed.any(-1, keepdim=True) if allowed.dim() else allowed
    return rows.expand((*out.shape[:-1], 1))


def observe(module: nn.Module, calls: Iterable[Call], edges: Sequence[float], specs: Sequence[str]) -> _Seen:
    """Errors of `specs` at every call of torch's attention while `calls` run through `module`."""
    seen, hooks = _Seen(specs), []
    kinds: dict[str, nn.Module] = dict(module.named_modules())
    before = use_torch(module, kinds.values())

    def entering(path: str) -> Callable:
        def hook(*_: Any) -> None:
            seen.stack.append(path)
            seen.ran.add(path)

        return hook

    def leaving(*_: Any) -> None:
        seen.stack.pop()

    try:
        for path, child in kinds.items():
            hooks.append(child.register_forward_pre_hook(entering(path)))
            hooks.append(child.register_forward_hook(leaving, always_call=True))
        for call in calls:
            seen.stack.clear()
            seen.at = bisect.bisect_left(edges, call.moment.t) if edges and call.moment.t is not None else 0
            with torch.no_grad(), seen:
                call.run(module)
    finally:
        for hook in hooks:
            hook.remove()
        give_back(module, before)
    for path in seen.owners:
        seen.untouched.pop(path, None)
    seen.untouched.update(_silent(kinds, seen))
    return seen


def _silent(kinds: dict[str, nn.Module], seen: _Seen) -> dict[str, str]:
    """Modules that are called attention, ran, and asked neither torch nor a child of theirs for it: {path: reason}."""
    busy = [*seen.owners, *seen.untouched]
    found: dict[str, str] = {}
    for path, child in kinds.items():
        inside = path + "." if path else ""
        named = "attention" in type(child).__name__.lower() or type(child).__name__.lower().endswith("attn")
        holds = any(isinstance(m, nn.Linear) for m in child.modules())
        if not named or not holds or path not in seen.ran or any(p == path or p.startswith(inside) for p in busy):
            continue
        if not any(path.startswith(other + ".") for other in found):
            found[path] = "computes attention by itself (linear attention, or its own products)"
    return found


def _spread(calls: Sequence[Call], count: int) -> list[Call]:
    """At most `count` calls, spread over samples and over timesteps: evenly through the calls in the order of t."""
    ordered = sorted(calls, key=lambda c: (c.moment.t or 0.0, c.moment.sample, c.moment.step))
    picks = sorted({round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(min(count, len(ordered)))})
    return [ordered[i] for i in picks]


def _edges(module: nn.Module, calls: CalibrationSet, spec: AttentionSpec) -> tuple[tuple[float, ...], str, bool]:
    """Edges of the ranges of timesteps, the argument that holds t, and whether the outermost ranges are the first and last step.

    They are where eight or more different steps were recorded: of fewer, two would be too many to keep.
    """
    argument = argument_of(module)
    times = sorted({call.moment.t for call in calls.calls if call.moment.t is not None})
    if not argument or len(times) < 2:
        return (), "", False
    ends = spec.keeps_ends and len(times) >= 8
    start, stop = (1, len(times) - 1) if ends else (0, len(times))
    ranges = min(spec.ranges, stop - start)
    cuts = {start + round(i * (stop - start) / ranges) for i in range(ranges + 1)} - {0, len(times)}
    return tuple((times[i - 1] + times[i]) / 2 for i in sorted(cuts)), argument, ends
