"""Other people's quantized layers and attention, where their packages are installed: rows to compare with, never a
dependency.

bitsandbytes (NF4 weights), torchao (int8), comfy-kitchen (int8), SageAttention. A package that does not serve this
GPU fails in its own row of the table.
"""

__all__ = ["attention_packages", "linear_packages"]

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Call = Callable[[], Tensor]


def _have(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def linear_packages(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Call]]:
    """(name, call) for y = x · weightᵀ, x (M, K), weight (N, K) in bf16 on a GPU."""
    if _have("bitsandbytes"):
        yield "bitsandbytes NF4", _lazily(lambda: _bitsandbytes(x, weight))
    if _have("torchao"):
        yield "torchao int8 x int8", _lazily(lambda: _torchao(x, weight))
    if _have("comfy_kitchen"):
        yield "comfy-kitchen int8", _lazily(lambda: _comfy_kitchen(x, weight))


def attention_packages(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Call]]:
    """(name, call) for softmax attention of q, k, v (B, H, L, D)."""
    if _have("sageattention"):
        yield "SageAttention", _lazily(lambda: _sage(q, k, v))
    if _have("flash_attn"):
        yield "FlashAttention", _lazily(lambda: _flash(q, k, v))


def _lazily(prepare: Callable[[], Call]) -> Call:
    """A call that prepares itself when it is first made, so that a failure happens inside its own row."""
    ready: list[Call] = []

    def call() -> Tensor:
        if not ready:
            ready.append(prepare())
        return ready[0]()

    return call


def _bitsandbytes(x: Tensor, weight: Tensor) -> Call:
    import bitsandbytes

    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=x.dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight.cpu()})
    layer = layer.to(x.device)
    return lambda: layer(x)


def _torchao(x: Tensor, weight: Tensor) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=x.dtype, device=x.device).requires_grad_(False)
    layer.weight.copy_(weight)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(layer, mode="max-autotune-no-cudagraphs")  # how its documentation says it should be run
    return lambda: compiled(x)


def _comfy_kitchen(x: Tensor, weight: Tensor) -> Call:
    import comfy_kitchen

    codes, scales = comfy_kitchen.quantize_int8_rowwise(weight)
    return lambda: comfy_kitchen.int8_linear(x, codes, scales, out_dtype=x.dtype)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Call:
    from sageattention import sageattn

    return lambda: sageattn(q, k.clone(), v, tensor_layout="HND")  # it may change k in place


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Call:
    from flash_attn import flash_attn_func

    rows = [t.transpose(1, 2) for t in (q, k, v)]
    return lambda: flash_attn_func(*rows).transpose(1, 2)
