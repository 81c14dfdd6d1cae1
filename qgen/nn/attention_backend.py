r"""qgen's attention by name in diffusers: `model.set_attention_backend("qgen_int8")`, undone by `model.reset_attention_backend()`.

There is a backend for each of `attention_ops.SPECS`: qgen_int8, qgen_int8_fp8, qgen_fp4_fp8, qgen_fp4. Each is the op that
`qgen.quantize(..., attention=...)` installs, with one choice for all layers and timesteps and nothing measured. What the op does not mean
(`nn.attention.refusal`: dropout, a single query, nested sequences …) goes to torch's attention untouched.

diffusers has no public registration. Its table is an Enum and a registry beside it: both get our names, as members of the same class, so
that its own checks and messages know them. Its `set_attention_backend` also makes a backend the one of every model that has none of its
own; for our names, and for these alone, that global is put back as it was.
"""

__all__ = ["backend_name", "register"]

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qgen.errors import QgenError
from qgen.kernels import attention_choice  # noqa: F401 (defines the op)
from qgen.kernels.attention_ops import SPECS
from qgen.nn.attention import refusal


def backend_name(spec: str) -> str:
    """What diffusers calls a spec of `attention_ops.SPECS`."""
    return f"qgen_{spec}"


def register() -> None:
    """Adds the backends to diffusers; may be called any number of times. QgenError naming what this diffusers does otherwise."""
    from diffusers.models import attention_dispatch, modeling_utils

    names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    _check(names, registry, modeling_utils.ModelMixin)
    for spec in SPECS:
        if backend_name(spec) not in names._value2member_map_:
            registry.register(_member(names, backend_name(spec)))(_backend(spec))
    _keep_to_the_model(modeling_utils.ModelMixin, registry)


def _member(names: Any, value: str) -> Any:
    """A new member of diffusers' Enum, found by value, by name, and in its list of members."""
    made = str.__new__(names, value)
    made._name_, made._value_ = value.upper(), value
    made._sort_order_ = len(names._member_names_)
    type.__setattr__(names, made._name_, made)
    names._member_names_.append(made._name_)
    names._member_map_[made._name_] = made
    names._value2member_map_[value] = made
    return made


def _backend(spec: str) -> Callable[..., Tensor]:
    # What the op looks up: the first and only range of timesteps, which uses the first and only spec.
    where, table = torch.tensor(0), torch.tensor([0])

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """q (B, Lq, H, D); k, v (B, Lk, Hkv, D) to (B, Lq, H, D). A mask (B, Lk) counts for all heads and queries, as diffusers has it."""
        if return_lse or _parallel_config is not None:
            what = "return_lse" if return_lse else "context parallelism"
            raise ValueError(f"{backend_name(spec)} has no {what}; use set_attention_backend('native')")
        if attn_mask is not None and attn_mask.shape == (len(query), key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if refusal(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        else:
            out = torch.ops.qgen.attention_choice(q, k, v, attn_mask, is_causal, scale, where, table, spec)
        return out.transpose(1, 2)

    return attention


def _keep_to_the_model(mixin: Any, registry: Any) -> None:
    """Has `set_attention_backend` keep the global where the name is ours, and refuse models that ask no dispatcher."""
    theirs = mixin.set_attention_backend
    if hasattr(theirs, "_qgen"):
        return

    @functools.wraps(theirs)
    def set_attention_backend(self: Any, backend: str) -> None:
        if backend.lower() not in map(backend_name, SPECS):
            return theirs(self, backend)
        asking = [m for m in self.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
        if not asking:
            raise ValueError(
                f"attention of {type(self).__name__} does not go through diffusers' dispatcher, so that a backend has no effect on it; "
                "use qgen.quantize(pipe, attention='int8')"
            )
        before = registry._active_backend
        try:
            theirs(self, backend)
        finally:
            registry.set_active_backend(before)

    set_attention_backend._qgen = True  # type: ignore[attr-defined]
    mixin.set_attention_backend = set_attention_backend


def _check(names: Any, registry: Any, mixin: Any) -> None:
    wanted = {names: ("_member_names_", "_member_map_", "_value2member_map_"), mixin: ("set_attention_backend",)}
    wanted[registry] = ("register", "set_active_backend", "_active_backend")
    for holder, attributes in wanted.items():
        if missing := [name for name in attributes if not hasattr(holder, name)]:
            import diffusers

            raise QgenError(
                f"diffusers {diffusers.__version__} differs from what qgen was checked against (0.42): {holder.__name__} has no "
                f"{', '.join(missing)}; attention backends of qgen are not registered"
            )
