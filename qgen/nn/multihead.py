"""torch's `nn.MultiheadAttention` asks for attention inside one function, and what a torch-function mode sees is that function alone.

`multi_head` is that function once more: torch's own code, among its own names but two. What it calls attention is what it is given, and it
does not ask for overrides a second time. Nothing of torch is changed. With `need_weights=True` torch computes the products itself, and
nobody is asked.
"""

__all__ = ["multi_head"]

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F


def multi_head(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` whose calls of `scaled_dot_product_attention` go to `attention`."""
    theirs: Any = F.multi_head_attention_forward
    names = {**vars(F), "scaled_dot_product_attention": attention, "has_torch_function": lambda tensors: False}
    made = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    made.__kwdefaults__ = theirs.__kwdefaults__
    return made
