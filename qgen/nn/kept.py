r"""One activation quantization per input: what a layer made of a tensor is kept with the tensor, and the next layer takes it.

    q = Q(x / s)   once;      y_q = q W_qᵀ + …,   y_k = q W_kᵀ + …,   y_v = q W_vᵀ + …

q, k and v, or gate and up, read one input. Where their kernel quantizes it alike (same smoothing, shift, scales, formats) the codes are
equal, and the first of the layers leaves them as an attribute of the tensor itself: they live as long as it does, and nobody has to know
which layers belong together. Only the last result is kept: layers that share an input follow each other. Parameters, files, LoRA
and offloading know nothing of it.

A tensor that was changed in place has another version and is quantized again. Nothing is kept where versions are not counted (inference
mode), where a gradient is wanted, while a graph is compiled or captured (it would hold values as constants), and for subclasses of tensors.
"""

__all__ = ["keeps", "kept", "key_of"]

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAME = "_qgen_kept"


def keeps(x: Tensor) -> bool:
    """Whether something may be kept with x now."""
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_inference()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    ):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def kept(x: Tensor, key: bytes, make: Callable[[], Any]) -> Any:
    """What the last call with this x, unchanged since, and this key made of it, else `make()`, which is then kept."""
    found = x.__dict__.get(_NAME)
    if found is not None and found[0] == x._version and found[1] == key:
        return found[2]
    made = make()
    x.__dict__[_NAME] = (x._version, key, made)
    return made


def key_of(tensors: dict[str, Tensor | None], *facts: Any) -> bytes:
    """A fingerprint of tensors, bit for bit, and of further facts: equal for layers that quantize their input alike."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, t in tensors.items():
        digest.update(f"{name} {None if t is None else (t.dtype, tuple(t.shape))}".encode())
        if t is not None:
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
