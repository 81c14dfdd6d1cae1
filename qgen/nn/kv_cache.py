r"""A cache of keys and values in 4 bits: keys per channel over groups of tokens, values per token, the newest tokens in 16 bits.

    keys (B, H, T, D):   one scale and zero for every `group` tokens of a channel, codes 0..15 along T
    values (B, H, T, D): one scale and zero for every block of channels of a token, codes 0..15 along D
    tokens:              [sink, 16 bits | packed in groups | window, 16 bits, up to window + group - 1 long]

Keys have channels that stand out in every token, values have tokens that do: each gets its scale along the other axis (KIVI,
https://arxiv.org/abs/2402.02750). The first tokens, which attention visits whatever they say, and the newest ones stay as they are.
A group is rounded once and never again. Bytes per 16-bit value: (4 + 32 / group) / 16, .281 for groups of 64, and the window on top.
`kv_cache()` makes a transformers `Cache` of it: `model.generate(..., cache=kv_cache())`,
or `past_key_values=` before transformers 5.24 (`qgen.nn.cache_name` tells).
"""

__all__ = ["KV4", "Packed4", "kv_cache"]

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor


@dataclass(frozen=True)
class KV4:
    """How a cache is packed. group: tokens of a key's channel that share a scale (a power of two from 16 to 256). window: newest tokens
    that stay in 16 bits at least. sink: first tokens that stay. keys: "channel", or "token" as paged kernels want it, which asks for
    smoothed keys (`methods.smooth_attention`). ValueError for what makes no sense."""

    group: int = 64
    window: int = 32
    sink: int = 4
    keys: str = "channel"

    def __post_init__(self) -> None:
        if self.group not in (16, 32, 64, 128, 256) or self.window < 0 or self.sink < 0:
            raise ValueError(
                f"a KV cache wants groups of 16, 32, 64, 128 or 256 tokens and no negative window or sink, found {self}"
            )
        if self.keys not in ("channel", "token"):
            raise ValueError(f"keys are packed per channel or per token, found keys={self.keys!r}")


@dataclass(frozen=True)
class Packed4:
    """Tokens of one layer in 4 bits: (B, H, T, D) as a QTensor along T (`along` = 2) or along D (`along` = 3)."""

    q: QTensor
    along: int

    @classmethod
    def of(cls, x: Tensor, along: int, group: int) -> "Packed4":
        """Rounds x (B, H, T, D); T must be a multiple of `group` for `along` = 2."""
        rows = x.transpose(2, 3) if along == 2 else x
        return cls(
            formats.get(_format(rows.shape[-1] if along == 3 else group, group)).quantize(rows.contiguous()), along
        )

    def values(self, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) in `dtype`."""
        x = self.q.dequantize(dtype)
        return x.transpose(2, 3) if self.along == 2 else x

    def then(self, other: "Packed4") -> "Packed4":
        """These tokens and those of `other` behind them."""
        dim = 3 if self.along == 2 else 2
        return self.map(lambda a, b: torch.cat([a, b], dim), other)

    def map(self, fn: Callable[..., Tensor], *others: "Packed4") -> "Packed4":
        """`fn` on codes, scales and zeros."""
        pairs = {
            name: fn(getattr(self.q, name), *(getattr(o.q, name) for o in others))
            for name in ("codes", "scales", "zero")
        }
        return Packed4(replace(self.q, **pairs), self.along)

    @property
    def nbytes(self) -> int:
        return self.q.codes.nbytes + self.q.scales.nbytes + self.q.zero.nbytes


def _format(width: int, group: int) -> str:
    """uint4 in blocks of the largest size up to `group` that divides `width`, else one block."""
    block = next((b for b in (256, 128, 64, 32, 16) if b <= group and width % b == 0), None)
    return f"uint4_g{block}" if block else "uint4_row"


class LayerKV:
    """Keys and values of one layer. `add` appends and returns all of them, dequantized: (B, H, T, D) each, in the dtype they came in."""

    def __init__(self, spec: KV4):
        self.spec = spec
        self.ends: dict[str, list[Tensor]] = {}  # per kind: first tokens, newest tokens
        self.packed: dict[str, Packed4 | None] = {"keys": None, "values": None}

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        made = [self._add("keys", keys, 2 if self.spec.keys == "channel" else 3), self._add("values", values, 3)]
        return made[0], made[1]

    def _add(self, kind: str, x: Tensor, along: int) -> Tensor:
        if kind not in self.ends:
            self.ends[kind] = [x[:, :, :0], x[:, :, :0]]
        first, newest = self.ends[kind]
        room = max(0, self.spec.sink - first.shape[2]) if self.packed[kind] is None and not newest.shape[2] else 0
        first, x = torch.cat([first, x[:, :, :room]], 2), x[:, :, room:]
        newest = torch.cat([newest, x], 2)
        known = self.packed[kind]
        parts = [first, *([known.values(x.dtype)] if known else ()), newest]
        whole = torch.cat(parts, 2)  # what is packed below is seen rounded from the next call on
        count = max(0, newest.shape[2] - self.spec.window) // self.spec.group * self.spec.group
        if count:
            fresh = Packed4.of(newest[:, :, :count], along, self.spec.group)
            self.packed[kind] = fresh if known is None else known.then(fresh)
            newest = newest[:, :, count:].clone()
        self.ends[kind] = [first, newest]
        return whole

    @property
    def length(self) -> int:
        if "keys" not in self.ends:
            return 0
        known = self.packed["keys"]
        packed = 0 if known is None else known.q.codes.shape[3] * 2 if known.along == 2 else known.q.codes.shape[2]
        return packed + sum(t.shape[2] for t in self.ends["keys"])

    @property
    def nbytes(self) -> int:
        ends = sum(t.nbytes for pair in self.ends.values() for t in pair)
        return ends + sum(p.nbytes for p in self.packed.values() if p is not None)

    def select(self, fn: Callable[[Tensor], Tensor]) -> None:
        """`fn` on every tensor, along the batch: beams, repeats."""
        self.ends = {kind: [fn(t) for t in pair] for kind, pair in self.ends.items()}
        self.packed = {kind: p and p.map(fn) for kind, p in self.packed.items()}

    def drop(self, count: int) -> None:
        """Forgets the newest `count` tokens, as speculative decoding does. ValueError if they are packed already."""
        newest = self.ends["keys"][1].shape[2] if self.ends else 0
        if count > newest and self.packed["keys"] is not None:
            raise ValueError(
                f"only the {newest} newest tokens of this cache are in 16 bits and can be dropped, asked {count}; raise `window`"
            )
        for pair in self.ends.values():
            kept = pair[0].shape[2] + pair[1].shape[2] - count
            whole = torch.cat(pair, 2)[:, :, : max(0, kept)]
            pair[:] = [whole[:, :, : pair[0].shape[2]], whole[:, :, pair[0].shape[2] :]]


def kv_cache(spec: KV4 = KV4(), **options: Any) -> Any:
    """A transformers `Cache` in 4 bits, for `cache=`; `options` are fields of KV4. Its `nbytes` counts all layers."""
    spec = replace(spec, **options) if options else spec
    cache, layer = _classes()
    return cache(layer_class_to_replicate=functools.partial(layer, spec))


@functools.cache
def _classes() -> tuple[type, type]:
    """The Cache and its layer; made on first use, so that importing this file does not import transformers."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class KV4Layer(CacheLayerMixin):
        """One layer's LayerKV under the names that transformers calls."""

        is_sliding = False

        def __init__(self, spec: KV4):
            super().__init__()
            self.kv = LayerKV(spec)

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.is_initialized, self.device = True, key_states.device

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.lazy_initialization(key_states, value_states)
            return self.kv.add(key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.kv.length + query_length, 0

        def get_seq_length(self) -> int:
            return self.kv.length

        def get_max_length(self) -> int:
            return -1

        def get_max_cache_shape(self) -> int:
            return -1

        def reset(self) -> None:
            self.kv, self.is_initialized = LayerKV(self.kv.spec), False

        def crop(self, tokens_to_remove: int) -> None:
            self.kv.drop(abs(tokens_to_remove))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.kv.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            self.kv.select(lambda t: t.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            self.kv.select(lambda t: t[indices])

    class KV4Cache(Cache):
        """A transformers Cache whose layers hold 4-bit keys and values."""

        @property
        def nbytes(self) -> int:
            """Bytes of all layers, 16-bit tokens included."""
            return sum(layer.kv.nbytes for layer in self.layers)

    return KV4Cache, KV4Layer
