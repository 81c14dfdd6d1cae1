"""Yardsticks: the pipeline as it is, from which all others are measured, and its denoiser in float32.

The first must show no error and a paired time of 1; the second shows what rounding to 16 bits alone does to pictures: no quantizer can
be told from the original beyond that.
"""

import torch
from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers

__all__ = ["REFERENCE", "Unquantized"]

REFERENCE = ("unquantized", "original")


@peers.register("unquantized")
class Unquantized(Peer):
    configs = (
        Config("original", 16, 16, "the pipeline as it is", control=True),
        Config("float32", 32, 32, "the denoiser in float32", control=True),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        if config == "original":
            return part.module
        before, module = part.dtype, part.module.float()
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output: _cast(output, before))
        return module


def _cast(value, dtype: torch.dtype):
    """Floating tensors in tuples, lists and dicts (a model's output is one) cast to dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        new = {k: _cast(v, dtype) for k, v in value.items()}
        return new if type(value) is dict else type(value)(**new)
    return value
