"""4-bit Attention: low-bit attention in one MODEL, through ComfyUI's own override, between two points of sampling.

ComfyUI hands every attention of the diffusion model to the override together with what would have computed it. What qgen's kernels do not
serve (shapes, masks, GPUs) goes there untouched, and so does everything outside of the chosen part of sampling. An override that another
pack had set before stays in its place behind this one.

Adaptive: the first time in a sampling run that a block's attention comes by, both are computed and the relative error

    ‖low-bit − full‖ / ‖full‖

decides for the rest of the run. Decisions are forgotten before the next run, so that equal prompts give equal pictures.
"""

__all__ = ["LowBitAttention", "attention"]

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgen.nodes import registry
from qgen.nodes.registry import Input, Node, Output

KEY = "qgen_attention"
OVERRIDE = "optimized_attention_override"
NUMBERS = ("auto", "int8", "int8_fp8", "fp4_fp8", "fp4")


class LowBitAttention:
    """ComfyUI's override.

    spec: a name of `qgen.kernels.attention_ops.SPECS`, "" = what the device of q runs best. budget: largest relative error of a block's
    attention, None = use the kernel everywhere. sigmas: (highest, lowest) noise at which it serves. behind: an earlier override.
    """

    def __init__(self, spec: str, budget: float | None, sigmas: tuple[float, float], behind: Callable | None = None):
        self.spec, self.budget, self.sigmas, self.behind = spec, budget, sigmas, behind
        self.good: dict[tuple, bool] = {}

    def reset(self, *_: Any) -> None:
        """Forgets what was decided."""
        self.good.clear()

    def __call__(self, func: Callable, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        def full() -> Any:
            if self.behind is not None:
                return self.behind(func, q, k, v, heads, *args, **kwargs)
            return func(q, k, v, heads, *args, **kwargs)

        call = self._call(q, k, v, heads, args, kwargs)
        options = kwargs.get("transformer_options") or {}
        if call is None or not self._in_range(options):
            return full()
        key = (
            str(options.get("block")),
            str(options.get("block_type")),
            options.get("block_index"),
            tuple(q.shape),
            tuple(k.shape),
        )
        if self.budget is None or self.good.get(key):
            return call()
        if key in self.good:
            return full()
        want, got = full(), call()
        lost = torch.linalg.vector_norm((got - want).float()) / torch.linalg.vector_norm(want.float()).clamp_min(1e-30)
        self.good[key] = bool(lost <= self.budget)
        return got if self.good[key] else want

    def _in_range(self, options: dict) -> bool:
        sigma = options.get("sigmas")
        if not isinstance(sigma, Tensor) or not sigma.numel():
            return self.sigmas == (math.inf, 0.0)
        return self.sigmas[1] <= float(sigma.flatten()[0]) <= self.sigmas[0]

    def _call(self, q: Any, k: Any, v: Any, heads: int, args: tuple, kwargs: dict) -> Callable[[], Tensor] | None:
        """What computes it in low bits, or None."""
        from qgen.kernels import attention_ops, tuning
        from qgen.kernels.attention_choice import kernel_for, smooths_q

        if not all(isinstance(t, Tensor) for t in (q, k, v)):
            return None
        names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or (told.get("attn_precision") == torch.float32 and q.dtype != torch.float32):
            return None
        if not told.get("skip_reshape"):
            q, k, v = (t.reshape(t.shape[0], -1, heads, t.shape[-1] // heads).transpose(1, 2) for t in (q, k, v))
        mask = told.get("mask")
        if mask is not None:
            mask = mask[None] if mask.ndim == 2 else mask
            mask = mask[:, None] if mask.ndim == 3 else mask
        try:
            spec = self.spec or _best(q, tuning, attention_ops)
            attention_ops.check(q, k, v, mask, told.get("scale"), spec)
        except ValueError:  # no shape of the op's
            return None
        kernel = kernel_for(q, spec, mask, False)
        if kernel is None:
            return None

        def run() -> Tensor:
            scale = told.get("scale")
            out = torch.ops.qgen.attention(
                q, k, v, mask, False, None if scale is None else float(scale), spec, True, smooths_q(spec), kernel
            )[0]
            return (
                out if told.get("skip_output_reshape") else out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
            )

        return run


def _best(q: Tensor, tuning: Any, ops: Any) -> str:
    """What the device runs best; on the CPU the reference of the most accurate one. ValueError where 16 bits are best."""
    if q.device.type == "cpu":
        return "int8"
    found = ops.default_spec(tuning.capability_of(q.device))
    if found is None:
        raise ValueError("16 bits are best here")
    return found


def attention(
    model: Any,
    numbers: str = "auto",
    adaptive: bool = True,
    budget: float = 0.05,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> tuple[Any]:
    """The node."""
    from comfy.patcher_extension import CallbacksMP

    if start_percent > end_percent:
        raise ValueError(f"start_percent: {start_percent} lies behind end_percent {end_percent}")
    out = model.clone()
    sampling = model.get_model_object("model_sampling")
    whole = start_percent <= 0 and end_percent >= 1
    sigmas = (
        (math.inf, 0.0) if whole else tuple(float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
    )
    options = out.model_options.setdefault("transformer_options", {})
    override = LowBitAttention(
        "" if numbers == "auto" else numbers, budget if adaptive else None, sigmas, options.get(OVERRIDE)
    )
    out.model_options["transformer_options"] = {**options, OVERRIDE: override}
    out.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, override.reset)
    return (out,)


registry.register(
    Node(
        "QGenAttention",
        "4-bit Attention (qgen)",
        "Low-bit attention for this model alone. Blocks whose attention would lose more than the budget keep full precision, and so does "
        "what your GPU has no kernel for.",
        run=attention,
        search=("qgen", "sage", "sageattention", "attention", "int8", "fp4"),
        inputs=(
            Input("model", "MODEL", "Any diffusion model, quantized or not."),
            Input(
                "numbers",
                "COMBO",
                "Numbers of the two products; auto is what this device runs best.",
                default="auto",
                choices=NUMBERS,
            ),
            Input(
                "adaptive",
                "BOOLEAN",
                "Measures each block once per run; full precision where the error is too large.",
                default=True,
            ),
            Input(
                "budget",
                "FLOAT",
                "Largest relative error of a block's attention.",
                default=0.05,
                low=0.001,
                high=1.0,
                step=0.001,
            ),
            Input(
                "start_percent",
                "FLOAT",
                "Part of sampling at which it begins.",
                default=0.0,
                low=0.0,
                high=1.0,
                step=0.01,
            ),
            Input(
                "end_percent", "FLOAT", "Part of sampling at which it ends.", default=1.0, low=0.0, high=1.0, step=0.01
            ),
        ),
        outputs=(Output("MODEL", "model", "The same model with low-bit attention."),),
    )
)
